"""What is kept as integers and computed with in float: tables that are looked up in or added, and the like.

Half of a small language model's file is its vocabulary. ``table[ids] * scale[ids]`` reads as few bytes as
there are tokens, on every runtime. Positions that are added are unpacked as a whole, and so are weights of
transposed convolutions, for which no runtime here has an integer kernel. A table that is the output layer's
weight, too, stays one constant.
"""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import fx

from graphprune.graph import Graph
from graphprune.integers import INT8
from graphprune.kinds import kind
from graphprune.notes import Note
from graphprune.operands import argument
from graphprune.quantization.parameters import of_weight, to_integers

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed

LEAST = 4096  # numbers in a table that is worth unpacking


def store(graph: Graph, ignored: frozenset[str] = frozenset()) -> list[Note]:
    """Replace the tables of embeddings, in place.

    Args:
        graph: after quantizers were put in; a linear that reads a table has left its integers under
            ``NAME.integers``.
        ignored: names of operators whose tables and weights stay in float.
    """
    notes = []
    for node in list(graph.find(aten.embedding.default)):
        table = graph.constant(node.args[0])
        if table is None or table.dtype != torch.float32 or node.name in ignored:
            continue
        name = str(node.args[0].target)  # type: ignore[union-attr]
        if f"{name}.integers" not in graph.tensors:
            how = of_weight(table, INT8, 0)
            graph.add_tensor(f"{name}.integers", to_integers(table, how), before=node, trainable=False)
            graph.add_tensor(f"{name}.scale", how.scale, before=node, trainable=False)
        ids = argument(node, "indices")
        with graph.fx.inserting_before(node):
            integers, scales = (graph.fx.get_attr(f"{name}.{part}") for part in ("integers", "scale"))
            row = graph.fx.call_function(aten.embedding.default, (integers, ids))
            scale = graph.fx.call_function(aten.embedding.default, (_column(graph, scales), ids))
            row = graph.fx.call_function(aten.to.dtype, (row, torch.float32))
            value = graph.fx.call_function(aten.mul.Tensor, (row, scale))
        for part in (row, scale, value):
            part.meta.update({k: node.meta[k] for k in ("stack_trace", "module") if k in node.meta})
        node.replace_all_uses_with(value)
        graph.fx.erase_node(node)
        notes.append(Note("changed", name, "looked up as int8, one scale a row"))
    notes += _unpacked(graph, ignored)
    graph.sweep()
    graph.propagate()
    return notes


def _unpacked(graph: Graph, ignored: frozenset[str]) -> list[Note]:
    """Tables that sums in float read, and weights of transposed convolutions, if nothing else reads them."""
    notes = []
    for name, table in list(graph.tensors.items()):
        readers = graph.readers(name)
        if table.dtype != torch.float32 or table.dim() < 2 or table.numel() < LEAST or not readers:
            continue
        if any(reader.name in ignored for reader in readers):
            continue
        if all(reader.target is aten.add.Tensor for reader in readers):
            axis, what = table.dim() - 2, "row"
        elif all(_multiplies(reader, name) for reader in readers):
            axis, what = 1, "output channel of a group"
        else:
            continue
        how = of_weight(table, INT8, axis)
        first = graph.fx.find_nodes(op="get_attr", target=name)[0]
        integers = graph.add_tensor(
            f"{name}.integers", to_integers(table, how), before=first, trainable=False
        )
        scale = graph.add_tensor(f"{name}.scale", how.scale, before=first, trainable=False)
        with graph.fx.inserting_before(first):
            args = (integers, scale, None, axis, *INT8.range, torch.int8)
            back = graph.fx.call_function(qd.dequantize_per_channel.default, args)
        for reader in readers:
            for node in graph.fx.find_nodes(op="get_attr", target=name):
                reader.replace_input_with(node, back)
        said = f"kept as int8, one scale for each {what}; computed with in float"
        notes.append(Note("changed", name, said))
    return notes


def _multiplies(node: fx.Node, name: str) -> bool:
    """Whether it is a transposed convolution with this weight."""
    if kind(node) != "transposed-convolution":
        return False
    weight = argument(node, "weight")
    return isinstance(weight, fx.Node) and weight.target == name


def _column(graph: Graph, scales: fx.Node) -> fx.Node:
    """Scales ``[rows]`` as ``[rows, 1]``, which is what a look-up takes."""
    return graph.fx.call_function(aten.unsqueeze.default, (scales, 1))
