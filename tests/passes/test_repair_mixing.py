"""Operators too wide for a fit of their own, held to explicit least squares over channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphprune.passes.repair import Repair, match, repair
from torch import nn

import graphprune
from graphprune.graph import Graph
from graphprune.pipeline import Context
from graphprune.plans.plan import Plan, keep_masks

from .repairing import error, normal, trace
from .rewriting import randomise
from .test_repair import Values, cut


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of more than 20 inputs is too wide."""
    monkeypatch.setattr(match, "MAX_COLUMNS", 20)


def channels_last(value: torch.Tensor, channels: int) -> np.ndarray:
    """``[rows, channels]`` of ``[N, C, …]`` or of a flattened ``[N, C · …]``."""
    return value.reshape(len(value), channels, -1).transpose(1, 2).flatten(0, 1).numpy()


MIDDLES = {
    "convolution": nn.Conv2d(8, 5, 3, stride=2, padding=1, dilation=2),
    "no-bias": nn.Conv2d(8, 5, 3, bias=False),
    "transposed": nn.ConvTranspose2d(8, 5, (3, 2), stride=2, padding=1),
    "flattened": nn.Sequential(nn.Flatten(), nn.Linear(8 * 7 * 6, 5)),
}


@pytest.mark.parametrize("ridge", [0.02, 0.2])
@pytest.mark.parametrize("middle", MIDDLES)
def test_weights_are_the_originals_on_channels_put_back_together(middle: str, ridge: float) -> None:
    layer = MIDDLES[middle]
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Tanh(), layer, nn.Tanh(), nn.Flatten())
    x = normal(9, 2, 7, 6, seed=4)
    graph = trace(model, x, dynamic_batch=True)
    gone, kept = [1, 2, 6], [0, 3, 4, 5, 7]
    plan = graph.plan({"0.weight[0]": gone})
    small = graph.apply(plan)
    result = repair(graph, small, plan, [x[:4], x[4:]], ridge=ridge, positions=None)
    (record,) = result.records
    assert record.kind == "mixing"
    assert any("too wide to fit: channels mixed" in note.message for note in result.notes)

    full = channels_last(Values(graph, x).by_name["tanh"], 8)
    left = channels_last(Values(small, x).by_name["tanh"], 5)
    full_centred, left_centred = full - full.mean(0), left - left.mean(0)
    selection = np.eye(8)[kept]
    rows, rest = left_centred, full_centred - left_centred @ selection
    if ridge:
        weight = np.sqrt(ridge * np.square(left_centred).sum(0).mean())
        rows, rest = np.vstack([rows, weight * np.eye(5)]), np.vstack([rest, np.zeros((5, 8))])
    mixture = selection + np.linalg.lstsq(rows, rest)[0]

    name = "2.1.weight" if middle == "flattened" else "2.weight"
    original, found = (g.tensors[name].detach().numpy() for g in (graph, result.graph))
    if middle == "transposed":
        wanted = np.einsum("ci,iokl->cokl", mixture, original)
    elif middle == "flattened":
        wanted = np.einsum("ci,oit->oct", mixture, original.reshape(5, 8, 42)).reshape(5, -1)
    else:
        wanted = np.einsum("ci,oikl->ockl", mixture, original)
    assert np.allclose(found, wanted, atol=1e-9)

    node = record.nodes[0]
    target, after = Values(graph, x).by_name[node], Values(result.graph, x).by_name[node]
    assert record.after == pytest.approx(float((target - after).norm() / target.norm()), rel=1e-9)
    if middle != "no-bias":
        around = [d for d in range(target.dim()) if d != 1]
        assert torch.allclose(target.mean(around), after.mean(around), atol=1e-12)
    assert record.after < record.before


def test_channels_that_are_mixtures_of_others_cost_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1))
    x = normal(20, 3, 9, 9)
    randomise(model.double())
    with torch.no_grad():  # channels 4 to 7 are mixtures of 0 to 3, and a constant
        mix = normal(4, 4, seed=5)
        first: nn.Conv2d = model[0]  # type: ignore[assignment]
        first.weight[4:] = (mix @ first.weight[:4].flatten(1)).view(4, 3, 3, 3)
        first.bias[4:] = mix @ first.bias[:4] + 1  # type: ignore[index]
    graph = graphprune.trace(model, x, dynamic_batch=True)
    plan = graph.plan({"0.weight[0]": [4, 5, 6, 7]})
    small = graph.apply(plan)
    result = repair(graph, small, plan, [x[:10]], ridge=0.0)
    assert [record.kind for record in result.records] == ["mixing"]
    assert error(graph, small, x) > 0.1
    assert error(graph, result.graph, x) < 1e-10


def chain() -> tuple[Graph, Plan, Graph]:
    """Wide layers one behind the other, with batch norms and a channel gone from each."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 30), nn.ReLU(), nn.Linear(30, 4),
    )  # fmt: skip
    graph = trace(model, normal(2, 3, 8, 8), dynamic_batch=True)
    plan = graph.plan(ratio=0.4)
    return graph, plan, graph.apply(plan)


def test_a_chain_is_repaired_on_inputs_it_has_not_seen() -> None:
    graph, plan, small = chain()
    x = normal(64, 3, 8, 8, seed=9)
    result = repair(graph, small, plan, normal(128, 3, 8, 8).split(32))
    assert [r.kind for r in result.records] == ["mixing", "statistics", "mixing", "weights"]
    assert error(graph, result.graph, x) < 0.9 * error(graph, small, x)
    values, wanted = Values(result.graph, x[:2]).by_name, Values(graph, x[:2]).by_name
    assert values["conv2d_1"].shape == cut(graph, plan, "conv2d_1", wanted["conv2d_1"]).shape


def test_mixing_again_starts_from_the_original() -> None:
    small = chain()[2]
    x = normal(64, 3, 8, 8)
    context = Context(calibration=[x])
    once = Repair(positions=None).run(small, context)
    twice = Repair(positions=None).run(once.graph, context)
    for name, tensor in once.graph.tensors.items():
        if name.startswith(("3.", "4.", "7.")):
            assert torch.allclose(tensor, twice.graph.tensors[name], rtol=1e-8, atol=1e-10), name


def test_what_cannot_be_mixed_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 16, 1), nn.Tanh(), nn.Conv2d(16, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    x = normal(9, 2, 4, 4)
    graph = trace(model, x)
    plan = graph.plan({axis.name: [1] for axis, _ in graph.axes.of("0.weight", 0)})
    result = repair(graph, graph.apply(plan), plan, [x])
    assert [record.nodes for record in result.records] == [("conv2d_2",)]
    assert any("groups are too wide" in note.message for note in result.notes)


def test_single_inputs_are_not_channels() -> None:
    graph = trace(nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 2)), normal(9, 3))
    plan = graph.plan({"0.weight[0]": [3, 5]})
    keep = keep_masks(graph, plan)
    assert sum(int(mask.sum()) for mask in keep.values()) == 38
    result = repair(graph, graph.apply(plan), plan, [normal(9, 3)])
    assert any("it has 38 inputs; at most 20 are fitted" in note.message for note in result.notes)


def test_under_a_ridge_that_holds_everything_the_bias_moves_alone() -> None:
    x = normal(400, 6, 5)
    graph = trace(nn.Sequential(nn.Conv1d(6, 8, 1), nn.Flatten(), nn.Linear(8 * 5, 3)), x)
    plan = graph.plan({axis.name: [1] for axis, _ in graph.axes.of("0.weight", 0)})
    small = graph.apply(plan)
    result = repair(graph, small, plan, [x], ridge=1e9)
    assert [record.kind for record in result.records] == ["mixing"]
    missing = (graph(x) - small(x)).mean(0)
    moved = result.graph.tensors["2.bias"] - small.tensors["2.bias"]
    assert torch.allclose(moved, missing, atol=1e-4)
    assert torch.allclose(result.graph.tensors["2.weight"], small.tensors["2.weight"], atol=1e-4)
