"""``remove-dead-heads``: every planted head goes, constants move into the bias, and nothing else goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune
from graphprune.pipeline import PassResult
from tests.passes.dead import changes, shapes, x
from tests.passes.rewriting import apply, assert_same, randomise, refusals, trace
from tests.passes.test_dead_sequences import HEADS, STREAM, WIDTH, Attention, attention, head

FORMS = [(fused, core) for fused in (True, False) for core in ("sdpa", "causal", "spelled out")]


def remove(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> PassResult:
    result = apply("remove-dead-heads", trace(model, *inputs, **options))
    assert_same(result.graph, model, *inputs)
    return result


@pytest.mark.parametrize(("fused", "core"), FORMS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_heads_go_and_all_else_stays(fused: bool, core: str, dynamic: bool) -> None:
    """One head is unread, one is constant; dead keys and a dead hidden unit are left to another pass."""
    model = attention(fused=fused, core=core)
    model.out.weight.data[:, head(1)] = 0
    weight, bias = model.rows("v")
    weight[head(2)] = 0
    for tensor in model.rows("k"):
        tensor.view(HEADS, WIDTH, -1)[:, 1] = 0
    result = remove(model, x(2, 5, STREAM), dynamic_batch=dynamic)
    assert shapes(result.graph, "out.weight") == [(STREAM, 2 * WIDTH)]
    (message,) = changes(result).values()
    assert message == ("2 of 4 removed (positions 1, 2): 1 unread, 1 constant, taken into the bias behind it")
    moved = model.out.bias + model.out.weight[:, head(2)] @ bias[head(2)]
    assert torch.allclose(result.graph.tensors["out.bias"], moved)


@pytest.mark.parametrize("core", ["gqa", "sdpa", "spelled out"])
def test_groups(core: str) -> None:
    model = attention(core=core, kv_heads=2)
    model.out.weight.data[:, head(2)] = 0
    assert not remove(model, x(2, 5, STREAM)).changed
    model.out.weight.data[:, head(3)] = 0
    assert shapes(remove(model, x(2, 5, STREAM)).graph, "out.weight") == [(STREAM, 2 * WIDTH)]


@pytest.mark.parametrize("kind", ["boolean", "additive", "computed"])
@pytest.mark.parametrize("hides", [False, True])
def test_a_known_mask_counts_where_it_hides_a_whole_row(kind: str, hides: bool) -> None:
    """A row that sees nothing is 0 and not the constant of the head."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = attention(fused=False)
            seen = torch.ones(5, 5, dtype=torch.bool).tril()
            seen[2] &= not hides
            added = torch.zeros(5, 5).double().masked_fill(~seen, -torch.inf)
            self.mask = nn.Buffer(added if kind == "additive" else seen)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            m, mask = self.inner, self.mask
            if kind == "computed":
                place = torch.arange(5)
                mask = (place[:, None] >= place) & (place[:, None] != (2 if hides else 9))
            q, k, v = (p(x).view(2, 5, HEADS, WIDTH).transpose(1, 2) for p in (m.q, m.k, m.v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return m.out(y.transpose(1, 2).reshape(2, 5, -1))

    model: Any = Masked().eval()
    model.inner.v.weight.data[head(1)] = 0
    assert remove(model, x(2, 5, STREAM)).changed != hides


def test_projections_that_a_split_takes_from_one_weight() -> None:
    """Cross-attention of torch's own layer: the query's rows and those of key and value."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(STREAM, 5, batch_first=True)

        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            return self.attention(x, memory, memory, need_weights=False)[0]

    model: Any = randomise(Cross().double())
    model.attention.in_proj_weight.data[24:26] = 0  # values of head 2: its bias
    model.attention.out_proj.weight.data[:, 8:10] = 0
    result = remove(model, x(2, 3, STREAM), x(2, 4, STREAM))
    (message,) = changes(result).values()
    assert message == ("2 of 5 removed (positions 2, 4): 1 unread, 1 constant, taken into the bias behind it")


def test_other_dead_channels_stay() -> None:
    model: Any = randomise(nn.Sequential(nn.Linear(STREAM, 6), nn.ReLU(), nn.Linear(6, STREAM)).double())
    model[2].weight.data[:, 3] = 0
    both = nn.Sequential(*model, attention())
    assert not remove(both, x(2, 5, STREAM)).changed
    both[3].out.weight.data[:, head(0)] = 0
    assert list(changes(remove(both, x(2, 5, STREAM)))) == ["3.qkv.weight[0].0"]


def test_all_heads_dead_leaves_one() -> None:
    model = attention()
    model.out.weight.data.zero_()
    result = remove(model, x(2, 5, STREAM))
    assert shapes(result.graph, "out.weight") == [(STREAM, WIDTH)]
    assert refusals(result) == ["every position is dead; one stays, for an axis cannot be empty"]


def test_a_head_the_caller_sees_is_refused() -> None:
    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(STREAM, 5, batch_first=True)

        def forward(self, x: torch.Tensor) -> Any:
            return self.attention(x, x, x, average_attn_weights=False)

    model: Any = randomise(Shown().double())
    model.attention.out_proj.weight.data[:, 2:4] = 0
    result = remove(model, x(2, 3, STREAM))
    assert not result.changed


def test_nothing_planted_and_no_heads() -> None:
    assert [n.message for n in remove(attention(), x(2, 5, STREAM)).notes] == ["no dead heads to remove"]
    assert not remove(nn.Linear(3, 2).double(), x(2, 3)).changed


def test_meta_weights() -> None:
    with torch.device("meta"):
        graph = graphprune.trace(Attention(), torch.empty(1, 5, STREAM))
    assert not apply("remove-dead-heads", graph).changed
