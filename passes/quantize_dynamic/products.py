"""Linears on integers whose input is rounded as it comes, in the graph.

What a linear reads gets a scale and zero point from its own smallest and largest value at run time, once
for all the linears that read it:

    s, z = choose_qparams(x);  x' = dequantize(quantize(x, s, z), s, z);  y = linear(x', dequantize(W), b)

and a weight has one scale an output, symmetric. Runtimes multiply the integers and scale the sums.
"""

from __future__ import annotations

import operator

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from graphprune.passes.quantize_weights.places import Place
from graphprune.passes.quantize_weights.writing import call, constant, look_up, multiply
from graphprune.passes.repair.rows import operands
from torch import fx

from graphprune.graph import Graph
from graphprune.quantization.parameters import INT8, UINT8, of_weight, to_integers, to_numbers
from graphprune.quantization.recurrent import EPS

quantized = torch.ops.quantized_decomposed


class Writer:
    """Writes products and embeddings into a graph, in place.

    Args:
        graph: changed.
    """

    def __init__(self, graph: Graph):
        self._graph = graph
        self._rounded: dict[fx.Node, fx.Node] = {}
        self._order = {node: i for i, node in enumerate(graph.fx.nodes)}

    def write(self, place: Place) -> float:
        """Let everything that read a weight read its integers; returns how far they are off, relatively."""
        graph, name = self._graph, place.name
        matrix = place.matrix(graph).float().contiguous()
        how = of_weight(matrix, INT8, 0)
        integers, rows = to_integers(matrix, how), how.scale.unsqueeze(1)
        for node in place.lookups:
            look_up(graph, name, node, integers, rows, None)
        zeros = torch.zeros(len(integers), dtype=torch.int8)
        for node in sorted(place.products, key=self._order.__getitem__):
            source = self._round(operands(node)[0], node)
            table = constant(graph, node, f"{name}_integers", integers)
            scale = constant(graph, node, f"{name}_scales" if place.lookups else f"{name}_scale", how.scale)
            zero = constant(graph, node, f"{name}_zero_points", zeros)
            first, last = INT8.range
            with graph.fx.inserting_before(node):
                weight = call(
                    graph, node, quantized.dequantize_per_channel.default,
                    (table, scale, zero, 0, first, last, torch.int8),
                )  # fmt: skip
            multiply(graph, node, weight, source)
        size = float(matrix.norm())
        return float((to_numbers(integers, how) - matrix).norm()) / size if size else 0.0

    def _round(self, source: fx.Node, node: fx.Node) -> fx.Node:
        """What a linear reads, to 8 bits and back; shared by all that read the same."""
        if source not in self._rounded:
            self._rounded[source] = self._rounding(source)
        return self._rounded[source]

    def _rounding(self, source: fx.Node) -> fx.Node:
        graph, (first, last) = self._graph, UINT8.range
        after = source
        if source.op == "placeholder":
            after = graph.placeholders[-1]
        with graph.fx.inserting_after(after):
            chosen = call(
                graph, source, quantized.choose_qparams.tensor, (source, first, last, EPS, torch.uint8)
            )
        with graph.fx.inserting_after(chosen):
            zero = call(graph, source, operator.getitem, (chosen, 1))
            scale = call(graph, source, operator.getitem, (chosen, 0))
        how = (scale, zero, first, last, torch.uint8)
        with graph.fx.inserting_after(zero):
            integers = call(graph, source, quantized.quantize_per_tensor.tensor, (source, *how))
        with graph.fx.inserting_after(integers):
            return call(graph, source, quantized.dequantize_per_tensor.tensor, (integers, *how))
