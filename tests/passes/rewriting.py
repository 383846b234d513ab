"""What the tests of passes share: run one on a module, and hold it to what every pass owes."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

import torch
from torch import nn

import graphprune
from graphprune.graph import Graph
from graphprune.pipeline import Context, PassResult
from graphprune.textual import parse_pipeline


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and statistics that leave no batch norm near the identity; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            positive = name.endswith("running_var")
            tensor.data.copy_(drawn.abs() + 0.5 if positive else drawn)
    return model.eval()


def trace(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> Graph:
    """The graph of a module."""
    return graphprune.trace(model, inputs, **options)


def apply(text: str, graph: Graph) -> PassResult:
    """Run one pass; the graph it was given must stay as it was, and an untouched one come back as itself."""
    before, module = graph.fingerprint(), str(graph)
    (step,) = parse_pipeline(text)
    result = step.run(graph, Context())
    assert graph.fingerprint() == before
    assert str(graph) == module
    result.graph.fx.lint()
    assert result.changed == (result.graph is not graph)
    assert result.notes, "a pass that says nothing"
    shapes = [n.meta["val"].shape for n in result.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    again = result.graph.copy().propagate()
    derived = [n.meta["val"].shape for n in again.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert shapes == derived, "the pass left shapes that the operators do not give"
    return result


def text(graph: Graph) -> str:
    """The printed graph."""
    return str(graph)


def expected(block: str) -> str:
    """An expected graph, indented as the test is."""
    return dedent(block).strip()


def refusals(result: PassResult) -> list[str]:
    """The reasons of what a pass would not do."""
    return [note.message for note in result.notes if note.kind == "refused"]


def assert_same(graph: Graph, model: nn.Module, *inputs: torch.Tensor, tolerance: float = 1e-9) -> None:
    """The graph's results are the eager model's, relative to the largest magnitude."""
    with torch.no_grad():
        wanted = model(*inputs)
    found = graph(*inputs)
    for a, b in zip(*(torch.utils._pytree.tree_leaves(v) for v in (found, wanted)), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = a.double(), b.double()
        scale = float(b.abs().max()) if b.numel() else 0.0
        assert not b.numel() or float((a - b).abs().max()) <= tolerance * max(scale, 1e-30)
