"""What a pruned graph was before any plan: the shapes and arguments its operators had.

A graph remembers this from the first plan on, however many follow, so that sizes can be carried back to
the modules they came from (:mod:`graphprune.writeback`). Nothing here holds a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from ..graph import Graph


@dataclass(frozen=True)
class Operator:
    """An operator as it was: its arguments (operands by name), and the shape of each result."""

    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    shapes: tuple[tuple[Any, ...], ...]
    reads: tuple[str, ...]


@dataclass(frozen=True)
class Provenance:
    """The network before any plan.

    Attributes:
        shapes: parameter or buffer name → its shape.
        operators: node name → the operator.
    """

    shapes: Mapping[str, tuple[int, ...]]
    operators: Mapping[str, Operator]

    @staticmethod
    def of(graph: Graph) -> Provenance:
        """A graph's own provenance, or the graph as it is now if nothing was removed from it yet."""
        if graph.provenance is not None:
            return graph.provenance
        shapes = {name: tuple(tensor.shape) for name, tensor in graph.tensors.items()}
        return Provenance(shapes, {n.name: operator(n) for n in graph.fx.nodes if n.op == "call_function"})


def operator(node: fx.Node) -> Operator:
    """A node's arguments and result shapes as plain values."""
    reads = tuple(str(n.target) for n in node.all_input_nodes if n.op == "get_attr")
    arguments = fx.map_arg(node.args, lambda n: n.name)
    options = fx.map_arg(node.kwargs, lambda n: n.name)
    return Operator(tuple(arguments), dict(options), result_shapes(node.meta.get("val")), reads)


def result_shapes(value: Any) -> tuple[tuple[Any, ...], ...]:
    """The shape of a tensor, or of every tensor in a list."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape),)
    if isinstance(value, (tuple, list)):
        return tuple(shape for item in value for shape in result_shapes(item))
    return ()
