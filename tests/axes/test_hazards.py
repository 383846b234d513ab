"""Where a smaller axis could change what an operator means: sizes of one, layouts, order, symbolic sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import graphprune

from .pruning import Small, proved, small_net

_X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def _channels_last(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


HAZARDS: dict[str, Callable[[], nn.Module]] = {
    "squeeze() of a dimension that shrinks to one": lambda: Small(
        lambda m, x: m.b(m.a(x).unsqueeze(1).squeeze()), a=nn.Linear(4, 6), b=nn.Linear(6, 3)
    ),
    "squeeze(dim) of a dimension that shrinks to one": lambda: Small(
        lambda m, x: m.b(m.a(x).squeeze(-1)), a=nn.Linear(4, 6), b=nn.Linear(6, 3)
    ),
    "squeeze(dims)": lambda: Small(
        lambda m, x: m.b(m.a(x).unsqueeze(0).squeeze((0, 2))), a=nn.Linear(4, 6), b=nn.Linear(6, 3)
    ),
    "broadcast against a row": lambda: Small(
        lambda m, x: m.b(m.a(x) * m.g + m.h),
        a=nn.Linear(4, 6),
        b=nn.Linear(6, 3),
        g=torch.randn(1, 6),
        h=torch.randn(6),
    ),
    "expand of a parameter, then contraction": lambda: Small(
        lambda m, x: (m.w.unsqueeze(0).expand(2, 5, 7) @ m.v).sum(1) + x[:, :3],
        w=torch.randn(5, 7),
        v=torch.randn(7, 3),
    ),
    "two parameters and no input": lambda: Small(
        lambda m, x: x @ (m.w @ m.v), w=torch.randn(4, 6), v=torch.randn(6, 3)
    ),
    "a parameter's Gram matrix": lambda: Small(lambda m, x: (m.w @ m.w.T).sum() * x, w=torch.randn(6, 5)),
    "outer product with itself": lambda: Small(
        lambda m, x: x * torch.outer(m.a, m.a).sum(), a=torch.randn(6)
    ),
    "the same tensor concatenated twice": lambda: Small(
        lambda m, x: m.b(torch.cat([y := m.a(x), y], 1)), a=nn.Linear(4, 6), b=nn.Linear(12, 3)
    ),
    "grouped convolution over a concatenation": lambda: Small(
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1).unsqueeze(-1)).flatten(1) @ m.d,
        a=nn.Linear(4, 8),
        b=nn.Linear(4, 4),
        c=nn.Conv1d(12, 12, 1, groups=6),
        d=torch.randn(12, 3),
    ),
    "channels padded on both sides": lambda: Small(
        lambda m, x: m.b(nn.functional.pad(m.a(x), (2, 3))), a=nn.Linear(4, 6), b=nn.Linear(11, 3)
    ),
    "flip along channels": lambda: Small(
        lambda m, x: m.c(m.b(m.a(x).flip(1)).relu()), a=nn.Linear(4, 6), b=nn.Linear(6, 8), c=nn.Linear(8, 3)
    ),
    "cumsum, argmax and topk": lambda: Small(
        lambda m, x: m.b(m.a(x).cumsum(1)).topk(2).values + m.c(x).argmax(1, keepdim=True),
        a=nn.Linear(4, 6),
        b=nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)),
        c=nn.Linear(4, 6),
    ),
    "a batch merged with channels": lambda: Small(
        lambda m, x: m.b(m.a(x).reshape(-1)), a=nn.Linear(4, 6), b=nn.Linear(12, 3)
    ),
    "complex numbers": lambda: Small(
        lambda m, x: torch.view_as_real(torch.view_as_complex(m.a(x).view(2, 6, 2)) * m.c).flatten(1) @ m.w,
        a=nn.Linear(4, 12),
        c=torch.randn(6, dtype=torch.complex64),
        w=torch.randn(12, 3),
    ),
    "a mask for each head": lambda: Small(
        lambda m, x: (
            nn.functional.scaled_dot_product_attention(
                *m.a(x).view(2, 1, 3, 4, 3).permute(2, 0, 3, 1, 4).unbind(),
                m.bias,  # type: ignore[call-arg]
            ).flatten(1)
            @ m.w
        ),
        a=nn.Linear(4, 36),
        bias=torch.randn(4, 1, 1),
        w=torch.randn(12, 3),
    ),
    "an empty slice": lambda: Small(
        lambda m, x: torch.cat([m.a(x)[:, :0].flatten(), m.b(m.a(x)).flatten()]),
        a=nn.Linear(4, 6),
        b=nn.Linear(6, 3),
    ),
    "a convolution laid out channels-last": lambda: Small(
        lambda m, x: m.a(x.view(1, 2, 2, 2)).permute(0, 2, 3, 1).view(4, 6) @ m.b,
        a=_channels_last(nn.Conv2d(2, 6, 1)),
        b=torch.randn(6, 3),
    ),
    "a permutation of channels in a buffer": lambda: Small(
        lambda m, x: m.b(m.a(x)[:, m.order.long()]),
        a=nn.Linear(4, 6),
        b=nn.Linear(6, 3),
        order=torch.tensor([5.0, 3, 1, 0, 2, 4]),
    ),
    "tied encoder and decoder": lambda: Small(lambda m, x: m.a(x).relu() @ m.a.weight, a=nn.Linear(4, 6)),
    "a maximum over channels and a plain one": lambda: Small(
        lambda m, x: m.a(x).amax(1, keepdim=True) + m.c(m.b(x)),
        a=nn.Linear(4, 6),
        b=nn.Linear(4, 8),
        c=nn.Linear(8, 3),
    ),
    "repeat and repeat_interleave": lambda: Small(
        lambda m, x: m.b(m.a(x).repeat(1, 2)) + m.c(m.a(x).repeat_interleave(2, 1)),
        a=nn.Linear(4, 6),
        b=nn.Linear(12, 3),
        c=nn.Linear(12, 3),
    ),
}
NOTHING_EXACT = {"a permutation of channels in a buffer"}


@pytest.mark.parametrize("hazard", HAZARDS)
@pytest.mark.parametrize("ratio", [0.4, 0.99])
def test_hazards(hazard: str, ratio: float) -> None:
    torch.manual_seed(2)
    graph = graphprune.trace(HAZARDS[hazard]().eval(), _X)
    plan = graph.plan(ratio=ratio, importance="random")
    assert bool(plan) != (hazard in NOTHING_EXACT)
    proved(graph, plan, [[torch.randn(2, 4)] for _ in range(3)])


@pytest.mark.parametrize("hazard", HAZARDS)
def test_hazards_with_statistical_axes_still_run(hazard: str) -> None:
    torch.manual_seed(2)
    graph = graphprune.trace(HAZARDS[hazard]().eval(), _X)
    plan = graph.plan(ratio=0.4, importance="random", statistical=True)
    assert all(torch.isfinite(y).all() for y in graph.apply(plan).run())


# ---- dynamic batch ---------------------------------------------------------------------------------

DYNAMIC: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (small_net, (3, 6, 6)),
    "transformer": (lambda: nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), (5, 12)),
    "lstm": (
        lambda: Small(
            lambda m, x: m.b(m.a(x)[0][:, -1]),
            a=nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True),
            b=nn.Linear(12, 3),
        ),
        (5, 4),
    ),
    "gru": (
        lambda: Small(
            lambda m, x: m.b(m.a(x)[0][:, -1]), a=nn.GRU(4, 6, batch_first=True), b=nn.Linear(6, 3)
        ),
        (5, 4),
    ),
    "batch merged and taken apart": (
        lambda: Small(
            lambda m, x: m.b(m.a(x).view(-1, 3, 2).transpose(1, 2).reshape(x.shape[0], 6)),
            a=nn.Linear(4, 6),
            b=nn.Linear(6, 3),
        ),
        (4,),
    ),
    "heads merged into the batch": (
        lambda: Small(
            lambda m, x: m.b(
                torch.bmm(
                    *(
                        y.view(-1, 5, 3, 4).transpose(1, 2).reshape(-1, 5, 4).transpose(-1, d)
                        for y, d in ((m.a(x), -1), (m.c(x), -2))
                    )
                ).view(x.shape[0], -1)
            ),
            a=nn.Linear(4, 12),
            c=nn.Linear(4, 12),
            b=nn.Linear(75, 3),
        ),
        (5, 4),
    ),
    "a new tensor of the batch's size": (
        lambda: Small(
            lambda m, x: m.b(torch.cat([m.a(x), x.new_ones(x.shape[0], 3)], 1)),
            a=nn.Linear(4, 6),
            b=nn.Linear(9, 3),
        ),
        (4,),
    ),
}


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("captured", [2, 3])
def test_a_dynamic_batch_stays_dynamic(name: str, captured: int) -> None:
    build, shape = DYNAMIC[name]
    torch.manual_seed(4)
    graph = graphprune.trace(build().eval(), torch.randn(captured, *shape), dynamic_batch=True)
    plan = graph.plan(ratio=0.5, importance="random")
    assert plan
    pruned = proved(graph, plan, [[torch.randn(batch, *shape)] for batch in (1, 2, 3, 7)])
    assert pruned.is_dynamic
    assert not isinstance(pruned.output.args[0][0].meta["val"].shape[0], int)  # type: ignore[index,union-attr]
    assert pruned.module(torch.randn(9, *shape)).shape[0] == 9


def test_a_batch_that_looks_like_channels_is_none() -> None:
    """A batch of the captured size must not pass for a static dimension of that size."""
    for batch in (2, 3, 4, 6):
        model = Small(
            lambda m, x: (m.a(x).view(x.shape[0], 2, 3).transpose(0, 1).reshape(2, -1, 3) @ m.w).sum(0),
            a=nn.Linear(4, 6),
            w=torch.randn(3, 5),
        )
        graph = graphprune.trace(model, torch.randn(batch, 4), dynamic_batch=True)
        plan = graph.plan(ratio=0.5, importance="random")
        assert plan
        proved(graph, plan, [[torch.randn(b, 4)] for b in (1, 2, 5)])
