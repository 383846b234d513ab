"""What the tests of repair share: a residual network, pruned, and how far two graphs are apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.graph import Graph
from graphprune.pipeline import Pipeline
from graphprune.plans.plan import Plan

from .rewriting import randomise


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trace(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> Graph:
    return graphprune.trace(randomise(model.double()), inputs, **options)


def error(graph: Graph, other: Graph, x: torch.Tensor) -> float:
    wanted = graph(x)
    return float((wanted - other(x)).norm() / wanted.norm())


def fold(graph: Graph) -> Graph:
    return Pipeline.parse("fold-batch-norm").run(graph).graph


class Residual(nn.Module):
    """Convolutions, batch norms, a shortcut, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(y)) + x)
        return self.head(x.mean((2, 3)))


def pruned_residual() -> Iterator[tuple[Graph, Plan, Graph]]:
    """The network, a plan for half of every axis, and what that leaves; neither graph may be changed."""
    graph = trace(Residual(), normal(2, 3, 8, 8), dynamic_batch=True)
    plan = graph.plan(ratio=0.5)
    small = graph.apply(plan)
    prints = graph.fingerprint(), small.fingerprint()
    yield graph, plan, small
    assert prints == (graph.fingerprint(), small.fingerprint()), "a graph that was given was changed"
