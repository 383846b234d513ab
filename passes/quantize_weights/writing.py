"""Integers and scales in place of a weight, in the graph.

Linears read ``dequantize_per_channel_group`` of an integer constant, which a runtime either multiplies
with as it is (ONNX Runtime's MatMulNBits) or unpacks. Symmetric integers are signed and need no zero
point. An embedding of its own, in 8 bits, looks up rows of integers and the scale of each, so that
nothing unpacks the table:

    y = table[ids] * scale[ids]

A table of fewer bits, or one that linears multiply with, too, is one dequantized constant for all its
readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from graphprune.passes.repair.rows import operands
from torch import Tensor, fx
from torch.nn import functional as F

from graphprune.graph import Graph
from graphprune.operands import argument
from graphprune.quantization.round_blocks import round_blocks

from .places import Place
from .rounding import Rounded

aten = torch.ops.aten
quantized = torch.ops.quantized_decomposed

_KEPT = ("stack_trace", "module", "module_type")


def write(graph: Graph, place: Place, result: Rounded, *, symmetric: bool, rows: bool, inputs: bool) -> None:
    """Let everything that read a weight read its integers, in place.

    Args:
        graph: changed.
        place: the weight and what reads it, of this graph.
        result: the integers.
        symmetric: all zero points are the format's middle.
        rows: look integers and scales up row by row; for embeddings alone, with one block a row.
        inputs: whether what is multiplied with the weight is rounded to 8 bits, in the same blocks.
    """
    form = result.how.format
    shift = form.middle if symmetric else 0
    dtype = torch.int8 if symmetric else torch.uint8
    integers = (result.integers.to(torch.int32) - shift).to(dtype)
    if rows:
        scale = result.how.scale.contiguous()
        zero = None if symmetric else result.how.zero_point.float().contiguous()
        for node in place.lookups:
            look_up(graph, place.name, node, integers, scale, zero)
        return
    first = min(place.readers, key=list(graph.fx.nodes).index)
    width = integers.shape[1]
    padded = F.pad(integers, (0, -width % result.how.size))
    matrix = constant(graph, first, f"{place.name}_integers", padded)
    scale_node = constant(graph, first, f"{place.name}_scale", result.how.scale.contiguous())
    zero_node = None
    if not symmetric:
        zero_node = constant(graph, first, f"{place.name}_zero_point", result.how.zero_point.contiguous())
    low, high = form.range
    with graph.fx.inserting_before(first):
        weight = call(
            graph, first, quantized.dequantize_per_channel_group.default,
            (matrix, scale_node, zero_node, low - shift, high - shift, dtype, result.how.size, torch.float32),
        )  # fmt: skip
        if padded.shape[1] != width:
            weight = call(graph, first, aten.slice.Tensor, (weight, 1, 0, width))
    for node in place.lookups:
        node.args = (weight, *node.args[1:])
    for node in place.products:
        source = _rounded(graph, operands(node)[0], result.how.size) if inputs else None
        multiply(graph, node, weight, source)


def _rounded(graph: Graph, source: fx.Node, size: int) -> fx.Node:
    """What a linear reads, rounded block by block; once for all that read the same."""
    target = round_blocks._opoverload
    for user in source.users:
        if user.target is target and user.args == (source, size):
            return user
    after = graph.placeholders[-1] if source.op == "placeholder" else source
    with graph.fx.inserting_after(after):
        return call(graph, source, target, (source, size))


def multiply(graph: Graph, node: fx.Node, weight: fx.Node, source: fx.Node | None = None) -> None:
    """Let a product multiply with ``weight`` ``[outputs, inputs]``, as a linear, and ``source`` if given."""
    if node.target is aten.linear.default:
        node.args = (source or node.args[0], weight, *node.args[2:])
        return
    before, _, bias = operands(node)
    source = source or before
    joins = isinstance(bias, fx.Node) and bias.meta["val"].dim() == 1
    with graph.fx.inserting_before(node):
        fresh = call(graph, node, aten.linear.default, (source, weight, *([bias] if joins else [])))
        if isinstance(bias, fx.Node) and not joins:
            fresh = call(graph, node, aten.add.Tensor, (bias, fresh))
    node.replace_all_uses_with(fresh)
    graph.fx.erase_node(node)


def look_up(
    graph: Graph, name: str, node: fx.Node, integers: Tensor, scale: Tensor, zero: Tensor | None
) -> None:
    """Let an embedding look up integers ``[entries, width]`` and the scale ``[entries, 1]`` of each row."""
    ids = argument(node, "indices")
    table = constant(graph, node, f"{name}_integers", integers)
    scales = constant(graph, node, f"{name}_scale", scale)
    zeros = None if zero is None else constant(graph, node, f"{name}_zero_point", zero)
    with graph.fx.inserting_before(node):
        row = call(graph, node, aten.embedding.default, (table, ids))
        value = call(graph, node, aten.to.dtype, (row, torch.float32))
        if zeros is not None:
            middle = call(graph, node, aten.embedding.default, (zeros, ids))
            value = call(graph, node, aten.sub.Tensor, (value, middle))
        factor = call(graph, node, aten.embedding.default, (scales, ids))
        value = call(graph, node, aten.mul.Tensor, (value, factor))
    node.replace_all_uses_with(value)
    graph.fx.erase_node(node)


def constant(graph: Graph, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    """A buffer in front of a node; the one that was added for another reader, if it is the same tensor."""
    if graph.tensors.get(name) is not value:
        return graph.add_tensor(name, value, before=before, trainable=False)
    known = graph.fx.find_nodes(op="get_attr", target=name)[0]
    with graph.fx.inserting_before(before):
        node = graph.fx.get_attr(name)
    node.meta.update(known.meta)
    return node


def call(graph: Graph, like: fx.Node, target: Any, args: Sequence[Any]) -> fx.Node:
    """An operator that stands for ``like`` in the source."""
    node = graph.fx.call_function(target, tuple(args))
    node.meta.update({key: like.meta[key] for key in _KEPT if key in like.meta})
    return node
