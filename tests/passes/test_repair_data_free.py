"""Repair without data, held to closed forms and to channels that are constant."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from graphprune.passes.repair import RepairResult, repair
from graphprune.passes.repair.data_free import expected
from torch import nn
from torch.nn import functional as F

from graphprune.graph import Graph

from .repairing import Residual, error, fold, normal, trace


def compensated(graph: Graph, removed: dict[str, list[int]], **options: Any) -> tuple[Graph, RepairResult]:
    plan = graph.plan(removed)
    small = graph.apply(plan)
    before = small.fingerprint()
    result = repair(graph, small, plan, None, **options)
    assert small.fingerprint() == before
    result.graph.fx.lint()
    return small, result


class Pooled(nn.Module):
    """Two branches behind batch norms, joined, pooled and flattened, into a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 5, 1), nn.Conv2d(2, 4, 1)
        self.norm_a, self.norm_b = nn.BatchNorm2d(5), nn.BatchNorm2d(4)
        self.head = nn.Linear(9 * 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = F.gelu(self.norm_a(self.a(x))), F.hardtanh(self.norm_b(self.b(x)) * 2.0, 0, 6)
        return self.head(F.avg_pool2d(torch.cat([a, b], 1), 2).flatten(1))


def test_constant_channels_are_made_up_for_exactly() -> None:
    x = normal(3, 2, 4, 4)
    graph = trace(Pooled(), x)
    for name in ("norm_a.weight", "norm_b.weight"):  # channels 1 and 2 do not depend on the input
        graph.set_tensor(name, graph.tensors[name].detach().index_fill(0, torch.tensor([1, 2]), 0))
    small, result = compensated(graph, {"a.weight[0]": [1, 2], "b.weight[0]": [1]})
    assert error(graph, small, x) > 1e-3
    assert error(graph, result.graph, x) < 1e-12
    assert [(r.nodes, r.kind) for r in result.records] == [(("linear",), "bias")]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_behind_each_other(groups: int, transposed: bool) -> None:
    middle: nn.Module = nn.Conv2d(8, 4, 3, groups=groups, bias=False)
    if transposed:
        middle = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=groups, bias=False)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        middle,
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.Conv2d(4, 2, 1),
    )
    x = normal(3, 2, 5, 5)
    graph = trace(model, x)
    if transposed:  # an output meets one element of each kernel: which one must not matter
        weight = graph.tensors["3.weight"].detach()
        graph.set_tensor("3.weight", weight.mean((2, 3), keepdim=True).expand_as(weight).contiguous())
    places = graph.axes.of("1.weight", 0)
    axis, gone = places[-1][0], [1, 2] if groups == 1 else [1]
    going = sum(index == place for place in gone for member, index in places if member is axis)
    stays = torch.from_numpy(going == 0)
    graph.set_tensor("1.weight", graph.tensors["1.weight"].detach() * stays)
    small, result = compensated(graph, {axis.name: gone})
    assert error(graph, small, x) > 1e-3
    assert error(graph, result.graph, x) < 1e-12
    assert any("'4.running_mean'" in note.message for note in result.notes)


def test_the_mean_behind_relu_is_the_closed_form() -> None:
    graph = trace(nn.Sequential(nn.Conv1d(2, 6, 1), nn.BatchNorm1d(6), nn.ReLU()), normal(2, 2, 3))
    beta, gamma = (graph.tensors[f"1.{n}"].detach() for n in ("bias", "weight"))
    ratio = beta / gamma.abs()
    density = torch.exp(-0.5 * ratio**2) / math.sqrt(2 * math.pi)
    wanted = gamma.abs() * density + beta * torch.special.ndtr(ratio)
    found = expected(graph, next(n for n in graph.nodes if n.name == "relu"))
    assert found.shape == (2, 6, 3)
    assert torch.allclose(found[0, :, 0], wanted, atol=1e-5)


def test_channels_no_batch_norm_tells_of_are_left_with_a_note() -> None:
    x = normal(4, 3, 8, 8)
    graph = trace(Residual(), x)
    plan = graph.plan(ratio=0.5)
    result = repair(graph, graph.apply(plan), plan, None)
    refused = [note.message for note in result.notes if note.kind == "refused"]
    assert refused == [
        "not compensated: its input comes through add.Tensor (add); "
        "a removed channel's mean is known behind batch norms alone"
    ]
    assert [record.nodes[0] for record in result.records] == ["conv2d_1", "conv2d_2"]


def test_folded_batch_norms_tell_nothing() -> None:
    graph = fold(trace(Residual(), normal(4, 3, 8, 8)))
    plan = graph.plan(ratio=0.5)
    small = graph.apply(plan)
    result = repair(graph, small, plan, None)
    assert result.graph is small
    assert len([note for note in result.notes if note.kind == "refused"]) == 3


def test_a_bias_is_added_only_where_allowed() -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1, bias=False))
    x = normal(3, 2, 4, 4)
    graph = trace(model, x)
    graph.set_tensor("1.weight", graph.tensors["1.weight"].detach().index_fill(0, torch.tensor([1, 2]), 0))
    graph.set_tensor("1.bias", graph.tensors["1.bias"].detach().abs())
    small, result = compensated(graph, {"0.weight[0]": [1, 2]})
    assert result.graph is small
    assert any("add_bias=True would give it one" in note.message for note in result.notes)
    small, result = compensated(graph, {"0.weight[0]": [1, 2]}, add_bias=True)
    assert error(graph, result.graph, x) < 1e-12
