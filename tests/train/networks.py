"""Small networks, and a loop that trains them, for tests of what hangs in a loop."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import graphprune
from graphprune.graph import Graph
from graphprune.module import TracedModule


class Block(nn.Module):
    """``relu(x + f(x))`` with two convolutions and batch norms."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class Net(nn.Module):
    """A stem, two residual blocks and a classifier for images ``[n, 3, 8, 8]``."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.bn(self.stem(x)).relu()).mean((2, 3)))


def net(seed: int = 0, width: int = 8) -> tuple[Net, TracedModule]:
    """The network with random statistics, and the same traced with an open batch size; both of their own."""
    model, graph = _made(seed, width)
    return copy.deepcopy(model), graph.copy().module


@cache
def _made(seed: int, width: int) -> tuple[Net, Graph]:
    torch.manual_seed(seed)
    model = Net(width).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model, graphprune.trace(model, torch.randn(2, 3, 8, 8), dynamic_batch=True)


def batches(count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 3, 8, 8, generator=generator), torch.randint(4, (6,), generator=generator))
        for _ in range(count)
    ]


def train(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterable[tuple[Any, Tensor]],
    after: Sequence[Any] = (),
    penalties: Sequence[Any] = (),
) -> None:
    """The loop of the documentation. The loss of a step lives on until the next, as it does there."""
    module.train()
    for inputs, targets in data:
        loss = nn.functional.cross_entropy(module(inputs), targets) + sum(p() for p in penalties)
        loss.backward()
        optimizer.step()
        for thing in after:
            thing.step()
        optimizer.zero_grad()
    module.eval()
