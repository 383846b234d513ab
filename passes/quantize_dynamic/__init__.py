"""Linears and LSTMs on integers, what they read rounded at run time: no calibration.

Weights are int8 with one scale an output. What is multiplied with them gets its scale from its own
values, each time; so nothing has to be known beforehand, and a runtime looks for the extremes of every
input. Embeddings are kept as integers, too, looked up row by row.

>>> import torch, graphprune
>>> from graphprune.pipeline import Pipeline
>>> _ = torch.manual_seed(0)
>>> graph = graphprune.trace(torch.nn.Linear(64, 8), torch.zeros(1, 64))
>>> small = Pipeline.parse("quantize-dynamic").run(graph).graph
>>> [str(node.target).split(".")[1] for node in small.nodes if "quantized" in str(node.target)]
['choose_qparams', 'quantize_per_tensor', 'dequantize_per_tensor', 'dequantize_per_channel']
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from graphprune.passes.quantize_weights.places import Place, kept, places, selected
from torch import fx

from graphprune.errors import InputError
from graphprune.graph import Graph
from graphprune.operands import CONVOLUTIONS
from graphprune.pipeline import Context, Note, Pass, PassResult

from .products import Writer
from .recurrent import Recurrent, recurrents, write


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Linears, constant products and LSTMs multiply integers; their inputs are rounded as they come.

    Attributes:
        ignored: weights, operators or modules that stay in float, by name or glob.
        only: those alone that are quantized, in the same way.
    """

    name: ClassVar[str] = "quantize-dynamic"
    exact: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    destroys: ClassVar[frozenset[str]] = frozenset({"float", "trainable"})

    ignored: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Integers in place of weights, and quantizers before what multiplies with them, in a copy."""
        if graph.is_meta:
            raise InputError("the weights have shapes only (meta device), so there is nothing to round")
        products, notes = places(graph)
        layers, said = recurrents(graph)
        notes += said
        notes += kept(
            graph, {"convolution": CONVOLUTIONS}, "they pay with scales set beforehand, see quantize"
        )
        everything: list[Place | Recurrent] = [*products, *layers]
        chosen = selected(everything, self.only, self.ignored)
        if not chosen:
            return PassResult(graph, False, (Note("info", "", "nothing to quantize"), *notes))
        work = graph.copy()
        twins = dict(zip(graph.fx.nodes, work.fx.nodes, strict=True))
        writer = Writer(work)
        changes = []
        for one in chosen:
            if isinstance(one, Recurrent):
                off = write(work, replace(one, node=twins[one.node]))
                what = "LSTM in int8, one scale a unit of a gate; its state is rounded at every step"
            else:
                off = writer.write(_twin(one, twins))
                what = "int8, one scale an output" if one.products else "int8, one scale a row"
            changes.append(Note("changed", one.name, f"{what}: weights off by {off:.2%}"))
        work.sweep()
        work.propagate()
        work.floating = graph
        multiplied = sum(len(one.products) for one in chosen if isinstance(one, Place))
        recurrent = sum(isinstance(one, Recurrent) for one in chosen)
        summary = f"{multiplied} products and {recurrent} LSTMs in integers"
        return PassResult(work, True, (Note("info", "", summary), *changes, *notes))


def _twin(place: Place, twins: dict[fx.Node, fx.Node]) -> Place:
    own = (tuple(twins[node] for node in nodes) for nodes in (place.products, place.lookups))
    products, lookups = own
    return Place(place.name, products, lookups, place.transposed)
