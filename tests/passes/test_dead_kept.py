"""What ``remove-dead-channels`` must not rely on: a constant that stays is read as it is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.dead import changes, remove, shapes, values, x
from tests.passes.rewriting import randomise


def test_a_constant_is_taken_into_a_bias_only_where_its_position_goes() -> None:
    """The norm makes channel 2 constant for one reader; the other still reads what came in."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Linear(3, 5), nn.BatchNorm1d(5)
            self.a, self.b = nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.stem(x)
            return self.a(self.norm(y)) + self.b(y)

    model: Any = randomise(Two().double())
    model.norm.weight.data[2] = 0
    assert not remove(model, x(4, 3)).changed
    for layer in (model.a, model.b):
        layer.weight.data[:, 4] = 0
    assert "(position 4): 1 unread" in changes(remove(model, x(4, 3)))["stem.weight[0]"]
    model.b.weight.data[:, 2] = 0
    assert "(positions 2, 4): 1 unread, 1 constant" in changes(remove(model, x(4, 3)))["stem.weight[0]"]


def test_what_keeps_a_gate_shut_stays_with_it() -> None:
    """Two gates are 0 at a channel that stays, both for what they read; one has to go on reading it."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(6, 4)
            self.skip, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.stem(x).clamp(1.0, 2.0)
            return self.head(self.first(h).relu() * self.second(h).relu() + self.skip(x))

    model: Any = randomise(Gated().double())
    for layer in (model.first, model.second):
        layer.weight.data[1] = 0
        layer.weight.data[:, 5] = 0
        layer.weight.data[1, 5] = -1.0
        layer.bias.data[1] = 1.0  # 1 - h is at most 0, and 1 without h
    result = remove(model, x(6, 3))
    assert not result.changed


def test_low_rank_weights() -> None:
    """A weight computed from two factors: a 0 that comes of terms that cancel is none to lean on."""

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a = nn.Linear(3, 4), nn.Parameter(torch.empty(2, 5))
            self.b = nn.Parameter(torch.empty(5, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(self.first(x), self.a @ self.b)

    model: Any = randomise(LowRank().double())
    model.a.data[:, 3] = 0
    model.b.data[:, 1] = 0
    result = remove(model, x(5, 3))
    assert shapes(result.graph, "a", "b", "first.weight") == [(2, 4), (4, 3), (3, 3)]


def test_a_computed_zero_that_stays_is_held_at_zero() -> None:
    """Ranks 0 and 1 cancel in column 2, which another layer keeps; rank 0 serves nothing else."""

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other = nn.Linear(3, 4), nn.Linear(4, 2)
            self.a, self.b = nn.Parameter(torch.empty(2, 3)), nn.Parameter(torch.empty(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return F.linear(y, self.a @ self.b) + self.other(y)

    model: Any = randomise(Cancelling().double())
    model.a.data[:, :2] = 1.0
    model.b.data[0] = values(0, 0, 1, 0)
    model.b.data[1] = values(5, 0, -1, 0)
    model.b.data[2, 2] = 0
    assert not remove(model, x(5, 3)).changed
    model.other.weight.data[:, 2] = 0
    assert shapes(remove(model, x(5, 3)).graph, "a", "b") == [(2, 2), (2, 3)]
