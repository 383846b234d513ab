"""Targets behind shortcuts: what the sum lacks, by explicit least squares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from graphprune.passes.repair import repair
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.graph import Graph

from .repairing import Residual, error, fold, normal, trace
from .test_repair import Values, cut


def lstsq(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The least-squares prediction of the target from rows and a constant."""
    rows = np.hstack([rows, np.ones((len(rows), 1))])
    return rows @ np.linalg.lstsq(rows, target)[0]


def patches(value: torch.Tensor, kernel: int = 3, padding: int = 1) -> np.ndarray:
    return F.unfold(value, kernel, padding=padding).transpose(1, 2).flatten(0, 1).numpy()


def rows_of(value: torch.Tensor) -> np.ndarray:
    return value.flatten(2).transpose(1, 2).flatten(0, 1).numpy()


class Late(Residual):
    """The stem reads errors already, so that the shortcut has some."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.stem = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.tanh(self.before(x)))


@pytest.fixture
def network() -> Graph:
    return trace(Late(), normal(2, 3, 8, 8), dynamic_batch=True)


@pytest.mark.parametrize("folded", [False, True])
def test_a_block_is_fitted_to_what_its_sum_lacks(network: Graph, folded: bool) -> None:
    graph = fold(network) if folded else network
    x = normal(30, 3, 8, 8)
    plan = graph.plan(ratio=0.5)
    small = graph.apply(plan)
    result = repair(graph, small, plan, [x[:7], x[7:]], ridge=0.0, positions=None).graph
    after, before = Values(result, x).by_name, Values(graph, x).by_name
    wanted = cut(graph, plan, "add", before["add"])
    shortcut, read = after["relu"], after["relu_1"]
    best = lstsq(patches(read), rows_of(wanted - shortcut))
    assert np.allclose(rows_of(after["add"] - shortcut), best, atol=1e-8)
    own = repair(graph, small, plan, [x], ridge=0.0, positions=None, residual=False).graph
    apart = [float((Values(g, x).by_name["add"] - wanted).norm()) for g in (result, own)]
    assert apart[0] < apart[1]


def test_a_channel_whose_scale_is_next_to_nothing_keeps_its_own_target(network: Graph) -> None:
    scale = network.tensors["norm2.weight"].detach().clone()
    plan = network.plan(ratio=0.5)
    gone = plan.removed["stem.weight[0]"]
    weak = next(i for i in range(8) if i not in gone)
    scale[weak] = 1e-5
    network.set_tensor("norm2.weight", scale)
    plan = network.plan(dict(plan.removed))
    small = network.apply(plan)
    x = normal(30, 3, 8, 8)
    result = repair(network, small, plan, [x], ridge=0.0, positions=None).graph
    place = [i for i in range(8) if i not in gone].index(weak)
    after, before = Values(result, x).by_name, Values(network, x).by_name
    wanted = cut(network, plan, "conv2d_3", before["conv2d_3"])[:, place : place + 1]
    best = lstsq(patches(after["relu_1"]), rows_of(wanted))
    found = rows_of(after["conv2d_3"][:, place : place + 1])
    assert np.allclose(found - found.mean(), best - best.mean(), atol=1e-8)
    assert all(bool(torch.isfinite(t).all()) for t in result.tensors.values())


class Projected(nn.Module):
    """Both sides of the sum can be fitted; the shortcut's convolution runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 3, padding=1)
        self.side = nn.Conv2d(8, 5, 1)
        self.last = nn.Conv2d(5, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(F.dropout(self.branch(x), training=self.training) + self.side(x)))


def test_of_two_branches_the_last_takes_what_is_left() -> None:
    x = normal(30, 3, 6, 6)
    graph = trace(Projected(), x)
    plan = graph.plan({"first.weight[0]": [0, 3, 4]})
    result = repair(graph, graph.apply(plan), plan, [x], ridge=0.0, positions=None).graph
    after, before = Values(result, x).by_name, Values(graph, x).by_name
    branch = lstsq(patches(after["tanh"]), rows_of(before["conv2d_1"]))
    assert np.allclose(rows_of(after["conv2d_1"]), branch, atol=1e-8)
    side = lstsq(rows_of(after["tanh"]), rows_of(before["add"] - after["conv2d_1"]))
    assert np.allclose(rows_of(after["conv2d_2"]), side, atol=1e-8)


class Block(nn.Module):
    """A transformer's feed-forward half, with a layer scale, dropout and a factor in the sum."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.embed, self.stem, self.norm = nn.Linear(4, 8), nn.Linear(8, 10), nn.LayerNorm(10)
        self.fc1, self.fc2, self.scale = nn.Linear(10, 12), nn.Linear(12, 10), nn.Parameter(torch.ones(10))
        self.head, self.alpha = nn.Linear(10, 3), alpha

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(torch.tanh(self.embed(x)))
        y = F.dropout(self.fc2(F.gelu(self.fc1(self.norm(x)))), training=self.training) * self.scale
        return self.head(torch.add(x, y, alpha=self.alpha))


@pytest.mark.parametrize("alpha", [1.0, -0.5])
def test_transformers_sums(alpha: float) -> None:
    x = normal(9, 7, 4)
    graph = trace(Block(alpha), x)
    plan = graph.plan({"embed.weight[0]": [1, 5], "fc1.weight[0]": [0, 2, 3]})
    small = graph.apply(plan)
    result = repair(graph, small, plan, [x], ridge=0.0, positions=None).graph
    after, before = Values(result, x).by_name, Values(graph, x).by_name
    names = [n.name for n in result.nodes if n.target is torch.ops.aten.add.Tensor]
    total = names[-1]
    node: Any = next(n for n in result.nodes if n.name == total)
    wanted = cut(graph, plan, total, before[total])
    shortcut = after[node.args[0].name]
    best = lstsq(after["gelu"].flatten(0, 1).numpy(), (wanted - shortcut).flatten(0, 1).numpy())
    assert np.allclose((after[total] - shortcut).flatten(0, 1).numpy(), best, atol=1e-8)


@pytest.mark.parametrize("statistics", ["kept", "replaced"])
def test_other_statistics(network: Graph, statistics: str) -> None:
    """With statistics kept there is no constant to fit; replaced ones have no fixed scale to count with."""
    plan = network.plan(ratio=0.5)
    small = network.apply(plan)
    x = normal(30, 3, 8, 8)
    options = {"statistics": statistics, "positions": None, "ridge": 0.0}
    result = repair(network, small, plan, [x], **options).graph  # type: ignore[arg-type]
    own = repair(network, small, plan, [x], residual=False, **options).graph  # type: ignore[arg-type]
    assert (result.fingerprint() == own.fingerprint()) == (statistics == "replaced")
    if statistics == "kept":
        after, before = Values(result, x).by_name, Values(network, x).by_name
        left = cut(network, plan, "add", before["add"]) - after["add"]
        rows = patches(after["relu_1"])
        assert np.abs(rows.T @ rows_of(left)).max() < 1e-7 * np.abs(rows.T @ rows_of(after["add"])).max()


def test_the_errors_of_a_long_stream_stay_smaller() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 4)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)) for _ in range(6)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = x + 0.3 * block(x)
            return self.head(x)

    torch.manual_seed(0)
    x = normal(600, 6)
    graph = graphprune.trace(Stream().double().eval(), x[:2], dynamic_batch=True)
    plan = graph.plan(ratio=0.5)
    small = graph.apply(plan)
    errors = [
        error(graph, repair(graph, small, plan, [x], residual=r).graph, normal(200, 6, seed=7))
        for r in (True, False)
    ]
    assert errors[0] < errors[1]
