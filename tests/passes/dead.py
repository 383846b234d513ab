"""What the tests of ``remove-dead-channels`` share: run it, compare, and read off what went."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graphprune.graph import Graph
from graphprune.pipeline import PassResult
from tests.passes.rewriting import apply, assert_same, randomise, trace


def remove(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> PassResult:
    """The pass on a float64 network, its results the eager network's."""
    result = apply("remove-dead-channels", trace(model, *inputs, **options))
    assert_same(result.graph, model, *inputs)
    return result


def double(*layers: nn.Module, seed: int = 0) -> Any:
    return randomise(nn.Sequential(*layers).double(), seed)


def x(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def shapes(graph: Graph, *names: str) -> list[tuple[int, ...]]:
    return [tuple(graph.tensors[name].shape) for name in names]


def changes(result: PassResult) -> dict[str, str]:
    """Axis → what was removed from it."""
    return {note.where: note.message for note in result.notes if note.kind == "changed"}
