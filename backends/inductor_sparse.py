"""Linears whose weights have two zeros in every four, on the tensor cores of a GPU (Ampere and later).

cuSPARSELt multiplies a compressed ``[outputs, inputs]`` matrix with a dense one, in half precision (Mishra et
al., *Accelerating Sparse Deep Neural Networks*, 2021; the operators are those behind
``torch.sparse.to_sparse_semi_structured``). A linear ``x Wᵀ + b`` becomes ``(W xᵀ + b)ᵀ`` on them. What
``prune-weights{pattern=2:4}`` and ``half-precision`` leave fits; what does not stays dense, with a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphprune.graph import Graph

aten = torch.ops.aten

HALVES = (torch.float16, torch.bfloat16)
WEIGHT = 16  # both sizes of a weight are multiples of it
ROWS = 8  # and those of its input's rows of this


def two_of_four(weight: torch.Tensor) -> bool:
    """Whether no four neighbouring inputs of an output have more than two weights.

    >>> two_of_four(torch.tensor([[1.0, 0.0, 2.0, 0.0]])), two_of_four(torch.ones(1, 4))
    (True, False)
    """
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())


def compressed(
    graph: Graph, compress: Callable[[torch.Tensor], torch.Tensor] = torch._cslt_compress
) -> tuple[str, ...]:
    """Put sparse products in place of the linears that have such weights; returns a note on each of those.

    Args:
        graph: on the GPU; changed in place.
        compress: ``[outputs, inputs]`` → what the product takes.
    """
    notes: list[str] = []
    packed: dict[str, fx.Node] = {}
    for node in list(graph.find(aten.linear.default)):
        name = _weight(graph, node)
        if name is None:
            continue
        reason = _unfit(graph, node, graph.tensors[name])
        if reason:
            notes.append(f"{name} has two zeros in every four and stays dense: {reason}")
            continue
        if name not in packed:
            value = compress(graph.tensors[name].detach())
            packed[name] = graph.add_tensor(f"{name}.two_of_four", value, before=node, trainable=False)
        _replace(graph, node, packed[name])
        notes.append(f"{name}: a sparse product, two of every four weights")
    if packed:
        graph.sweep()
        graph.propagate()
    return tuple(notes)


def _weight(graph: Graph, node: fx.Node) -> str | None:
    """The parameter of a linear, if it has the pattern."""
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.target not in graph.tensors:
        return None
    name = str(weight.target)
    return name if two_of_four(graph.tensors[name]) else None


def _unfit(graph: Graph, node: fx.Node, weight: torch.Tensor) -> str:
    if weight.dtype not in HALVES:
        return f"sparse products are of half precision, and it is {str(weight.dtype).removeprefix('torch.')}"
    if any(size % WEIGHT for size in weight.shape):
        return f"its sizes {tuple(weight.shape)} are not multiples of {WEIGHT}"
    if not all(isinstance(size, int) for size in node.meta["val"].shape):
        return "the sizes of its input are open"
    return ""


def _replace(graph: Graph, node: fx.Node, packed: fx.Node) -> None:
    source: Any = node.args[0]
    bias = node.args[2] if len(node.args) > 2 else None
    shape = list(node.meta["val"].shape)
    rows, inputs = node.meta["val"].numel() // shape[-1], graph.constant(node.args[1]).shape[1]  # type: ignore[union-attr]
    with graph.fx.inserting_before(node):
        value = graph.fx.call_function(aten.reshape.default, (source, [rows, inputs]))
        if rows % ROWS:
            value = graph.fx.call_function(aten.constant_pad_nd.default, (value, [0, 0, 0, -rows % ROWS]))
        value = graph.fx.call_function(aten.t.default, (value,))
        value = graph.fx.call_function(aten._cslt_sparse_mm.default, (packed, value, bias))
        value = graph.fx.call_function(aten.t.default, (value,))
        if rows % ROWS:
            value = graph.fx.call_function(aten.slice.Tensor, (value, 0, 0, rows))
        value = graph.fx.call_function(aten.reshape.default, (value, shape))
    node.replace_all_uses_with(value)
    graph.fx.erase_node(node)
