"""Penalties against sums over groups that are written out by hand, and what they do to a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.errors import AxisError, InputError
from graphprune.graph import Graph
from graphprune.module import TracedModule
from graphprune.train import Constant, GroupLasso, Growing, Shrink, Slimming, Sparsify, remove
from tests.random_networks import build, sandwich

from .networks import batches, net, train


def norms(groups: list[list[Tensor]]) -> float:
    """``sum sqrt(n) ||w||`` over groups of pieces."""
    flat = [torch.cat([piece.detach().double().flatten() for piece in group]) for group in groups]
    return float(sum(len(w) ** 0.5 * w.norm() for w in flat))


def residual_groups(module: TracedModule) -> list[list[Tensor]]:
    """Every group of the residual network of these tests, channel by channel."""
    get = module.get_parameter
    inner = [
        [
            get(f"blocks.{b}.conv1.weight")[i], get(f"blocks.{b}.conv2.weight")[:, i],
            get(f"blocks.{b}.bn1.weight")[i], get(f"blocks.{b}.bn1.bias")[i],
        ]
        for b in (0, 1)
        for i in range(8)
    ]  # fmt: skip
    stream = []
    for i in range(8):
        group = [get("stem.weight")[i], get("bn.weight")[i], get("bn.bias")[i], get("head.weight")[:, i]]
        for b in (0, 1):
            group += [get(f"blocks.{b}.conv1.weight")[:, i], get(f"blocks.{b}.conv2.weight")[i]]
            group += [get(f"blocks.{b}.bn2.weight")[i], get(f"blocks.{b}.bn2.bias")[i]]
        stream.append(group)
    return stream + inner


def test_group_lasso_of_a_residual_network() -> None:
    _, module = net()
    penalty = GroupLasso(module, 0.01)
    assert set(penalty.axes) == {"stem.weight[0]", "blocks.0.conv1.weight[0]", "blocks.1.conv1.weight[0]"}
    assert penalty().item() == pytest.approx(0.01 * norms(residual_groups(module)), rel=1e-5)
    part = GroupLasso(module, 0.01, ignored=("stem",))
    assert part().item() == pytest.approx(0.01 * norms(residual_groups(module)[8:]), rel=1e-5)


def test_group_lasso_of_attention_heads() -> None:
    torch.manual_seed(0)
    width, heads, each = 12, 3, 4
    layer = nn.TransformerEncoderLayer(width, heads, 16, batch_first=True, norm_first=True).eval()
    module = graphprune.trace(layer, torch.randn(2, 5, width)).module
    get = module.get_parameter
    qkv, bias, out = (get(f"self_attn.{n}") for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight"))
    rows = torch.arange(3 * width).reshape(3, heads, each)  # of queries, keys and values
    columns = torch.arange(width).reshape(heads, each)
    by_head = [
        [qkv[rows[:, h].flatten()], bias[rows[:, h].flatten()], out[:, columns[h]]] for h in range(heads)
    ]
    by_width = [
        [qkv[rows[:, :, p].flatten()], bias[rows[:, :, p].flatten()], out[:, columns[:, p]]]
        for p in range(each)
    ]
    names = {size: f"self_attn.in_proj_weight[0].{place}" for place, size in ((1, heads), (2, each))}
    for size, groups in ((heads, by_head), (each, by_width)):
        assert GroupLasso(module, 1.0, only=(names[size],))().item() == pytest.approx(norms(groups), rel=1e-5)
    both = GroupLasso(module, 1.0, only=tuple(names.values()))().item()
    assert both == pytest.approx(norms(by_head) + norms(by_width), rel=1e-5)


class Square(nn.Module):
    """One matrix whose rows and columns are the same axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False)
        self.square = nn.Linear(5, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last(x + self.square(x))


def test_an_entry_on_the_diagonal_belongs_to_its_position_once() -> None:
    torch.manual_seed(0)
    module = graphprune.trace(Square(), torch.randn(2, 3)).module
    first, square, last = (module.get_parameter(f"{n}.weight") for n in ("first", "square", "last"))
    groups = []
    for i in range(5):
        mine = torch.zeros(5, 5, dtype=torch.bool)
        mine[i], mine[:, i] = True, True
        groups.append([first[i], square[mine], last[:, i]])
    assert GroupLasso(module, 1.0)().item() == pytest.approx(norms(groups), rel=1e-5)


def test_group_lasso_makes_channels_vanish_and_its_gradient_stays_finite() -> None:
    _, module = net()
    with torch.no_grad():
        for group in residual_groups(module)[8:10]:
            for piece in group:
                piece.zero_()
    penalty = GroupLasso(module, 0.1, ignored=("stem",))
    (slope,) = torch.autograd.grad(penalty(), [module.get_parameter("blocks.0.conv1.weight")])
    assert torch.isfinite(slope).all()
    assert not slope[:2].any()
    assert slope[2:].any()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    before = penalty.norms()["blocks.1.conv1.weight[0]"].sum().item()
    train(module, optimizer, batches(5), penalties=[penalty])
    assert penalty.norms()["blocks.1.conv1.weight[0]"].sum().item() < 0.85 * before


def test_slimming_is_the_sum_of_scales_whose_channels_could_go() -> None:
    _, module = net()
    penalty = Slimming(module, 0.001)
    scales = ["bn", "blocks.0.bn1", "blocks.0.bn2", "blocks.1.bn1", "blocks.1.bn2"]
    assert sorted(penalty.scales) == sorted(f"{name}.weight" for name in scales)
    with torch.no_grad():
        module.get_parameter("bn.weight").neg_()
    wanted = 0.001 * sum(float(module.get_parameter(n).detach().abs().sum()) for n in penalty.scales)
    assert penalty().item() == pytest.approx(wanted, rel=1e-5)
    inner = Slimming(module, 0.001, ignored=("stem",))
    assert sorted(inner.scales) == ["blocks.0.bn1.weight", "blocks.1.bn1.weight"]
    penalty().backward()
    slope = module.get_parameter("bn.weight").grad
    assert slope is not None
    torch.testing.assert_close(slope, torch.full((8,), -0.001))


def test_slimming_needs_a_batch_norm() -> None:
    module = graphprune.trace(Square(), torch.randn(2, 3)).module
    with pytest.raises(InputError, match="GroupLasso"):
        Slimming(module)


def test_growing_is_l2_on_what_the_plan_removes_and_grows() -> None:
    _, module = net()
    plan = module.captured.plan({"blocks.0.conv1.weight[0]": [1, 4], "stem.weight[0]": [2]})
    penalty = Growing(module, plan, rate=0.25, every=2, ceiling=0.5)
    small = module.captured.apply(plan)
    wanted = 0.0
    for name, parameter in module.named_parameters():
        squares = (
            parameter.detach().double().square().sum() - small.tensors[name].detach().double().square().sum()
        )
        wanted += float(squares)
    found = []
    for _ in range(6):
        found.append(penalty().item())
        penalty.step()
    assert found == pytest.approx([wanted / 2 * s for s in (0, 0, 0.25, 0.25, 0.5, 0.5)], rel=1e-4)
    assert penalty.done
    again = Growing(module, plan, rate=0.25, every=2, ceiling=0.5)
    again.load_state_dict(penalty.state_dict())
    assert again().item() == found[-1]


def test_after_growing_a_removal_changes_next_to_nothing() -> None:
    data = batches(1)[0][0]

    def change(grown: bool) -> float:
        _, module = net()
        plan = module.captured.plan(ratio=0.5)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        penalty = Growing(module, plan, rate=0.5, every=1, ceiling=5.0)
        train(module, optimizer, batches(40), [penalty] if grown else [], [penalty])
        assert penalty.done == grown
        before = module(data).detach()
        remove(module, plan, optimizer)
        return float((module(data).detach() - before).norm() / before.norm())

    assert change(True) < 1e-3 < 0.05 < change(False)


@pytest.mark.parametrize("make", [lambda m: GroupLasso(m, 0.1), lambda m: Slimming(m, 0.1)])
def test_a_penalty_follows_a_network_that_shrinks(make: Callable[[TracedModule], Any]) -> None:
    _, module = net()
    penalty = make(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    Sparsify(module, Constant(0.5), optimizer=optimizer)
    shrink = Shrink(module, Constant(0.5, begin=1), optimizer=optimizer)
    train(module, optimizer, batches(3), [shrink], [penalty])
    assert shrink.sparsity >= 0.5
    assert penalty().item() == pytest.approx(make(module)().item())


def test_growing_ends_with_its_plan() -> None:
    _, module = net()
    plan = module.captured.plan({"stem.weight[0]": [2]})
    penalty = Growing(module, plan)
    remove(module, plan)
    with pytest.raises(AxisError, match="another network"):
        penalty()


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda m: GroupLasso(m, -1.0), "at least 0"),
        (lambda m: GroupLasso(m, only=("nothing",)), "matches no axis"),
        (lambda m: GroupLasso(nn.Linear(2, 2)), r"graphprune\.trace"),  # type: ignore[arg-type]
        (lambda m: Growing(m, m.captured.plan({})), "removes nothing"),
        (lambda m: Growing(m, m.captured.plan(ratio=0.5), every=0), "at least 1"),
        (lambda m: Growing(m, m.captured.plan(ratio=0.5), rate=2.0), "ceiling"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        make(net()[1])


@pytest.mark.network
def test_a_vision_transformer() -> None:
    """Every penalty on a network of a library: finite, with a gradient for what the axes run through."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )
    module = graphprune.trace(model.eval(), torch.randn(1, 3, 16, 16)).module
    plain, wide = GroupLasso(module, 1.0), GroupLasso(module, 1.0, statistical=True)
    assert len(wide.axes) > len(plain.axes) > 0
    assert wide().item() > plain().item() > 0
    wide().backward()
    assert module.get_parameter("blocks.1.attn.qkv.weight").grad is not None
    assert module.get_parameter("pos_embed").grad is not None
    growing = Growing(module, module.captured.plan(ratio=0.3), rate=1.0, every=1)
    growing.step()
    assert growing().item() > 0


STEPS = [
    *(("image", n) for n in ("concat", "grouped", "shuffle", "squeeze_excitation")),
    *(("sequence", n) for n in ("gated_mlp", "multihead", "recurrent", "tied")),
]


@pytest.mark.parametrize(("family", "step"), STEPS, ids=lambda v: v)
def test_a_group_is_what_goes_with_its_position(family: str, step: str) -> None:
    """The oracle is the rewrite: how much less there is of a network without one position."""
    model, inputs, _ = build(sandwich(family, step, 0))
    module = graphprune.trace(model, inputs).module
    penalty = GroupLasso(module, 1.0, statistical=True)
    graph, norms = module.captured, penalty.norms()

    def squares(of: Graph) -> float:
        return sum(float(p.detach().square().sum()) for p in of.parameters.values())

    whole = squares(graph)
    assert norms
    for name, found in norms.items():
        for position in {0, len(found) // 2, len(found) - 1}:
            if len(found) > 1:
                small = graph.apply(graph.plan({name: [position]}))
                assert float(found[position].detach()) ** 2 == pytest.approx(whole - squares(small), abs=1e-8)
