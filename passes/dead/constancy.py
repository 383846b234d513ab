"""What is known of every value before an input is seen: bounds for each channel, constants among them.

One pass in execution order, as an abstract interpretation with intervals (Cousot and Cousot, *Abstract
Interpretation*, 1977): a batch norm whose scale is 0 gives its bias, a ReLU whose operand never exceeds
0 gives 0, what comes out of a sigmoid lies in [0, 1]. An operator without a rule gives nothing known.

>>> import torch, graphprune
>>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU6(), torch.nn.Linear(2, 1)).eval()
>>> _ = model[2].weight.data.fill_(-1.0), model[2].bias.data.fill_(-0.5)
>>> found = Constancy(graphprune.trace(model, torch.zeros(1, 3)))
>>> bounds = found.of(found.graph.output.args[0][0])
>>> bounds.lo.item(), bounds.hi.item()
(-12.5, -0.5)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphprune.graph import Graph

from .contractions import Contraction, Weights, contraction
from .extents import Extents, is_float
from .intervals import Interval

aten = torch.ops.aten

# A wider weight is not multiplied with bounds: what comes out of it is not known.
MAX_WEIGHT = 1 << 23


class Constancy:
    """Bounds of every real value of a graph, on extents.

    Attributes:
        graph: what was interpreted.
        extents: how its values are looked at.
        weights: its tensors by node.
        saturated: clamping operators → where their result is constant although their operand is not.
    """

    def __init__(self, graph: Graph):
        from . import constancy_rules  # fills the table of rules

        self.graph = graph
        self.extents = Extents(graph)
        self.weights = Weights(graph)
        self.saturated: dict[fx.Node, torch.Tensor] = {}
        self._contractions: dict[fx.Node, Contraction | None] = {}
        self._values: dict[fx.Node, Any] = {}
        for node in graph.fx.nodes:
            if node.op == "call_function":
                self._values[node] = self._fitted(node, constancy_rules.bounds(self, node))

    def of(self, argument: Any) -> Interval:
        """The bounds of an operand; a Python number is a constant without dimensions.

        A parameter's are worked out when first asked for, at its extent.
        """
        if not isinstance(argument, fx.Node):
            return Interval.of(torch.tensor(float(argument), dtype=torch.float64))
        if argument not in self._values:
            self._values[argument] = self._leaf(argument)
        value = self._values[argument]
        if isinstance(value, list):
            raise TypeError(f"{argument.name} has several results")
        return value

    def results(self, node: fx.Node) -> list[Interval]:
        """The bounds of every result of an operator."""
        value = self._values[node]
        return value if isinstance(value, list) else [value]

    def contraction(self, node: fx.Node) -> Contraction | None:
        """The operator as a contraction over channels with a known weight, or ``None``."""
        if node not in self._contractions:
            self._contractions[node] = contraction(self.graph, self.weights, node)
        return self._contractions[node]

    def unknown(self, node: fx.Node) -> Any:
        """Nothing known about an operator's result, or its results."""
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            return [Interval.unknown(v.dim() if isinstance(v, torch.Tensor) else 0) for v in value]
        return Interval.unknown(value.dim() if isinstance(value, torch.Tensor) else 0)

    def _fitted(self, node: fx.Node, value: Any) -> Any:
        if value is None or (isinstance(value, Interval) and not is_float(node.meta.get("val"))):
            return self.unknown(node)
        if isinstance(value, list):
            types = self.extents.types(node)
            return [
                _on(v, self.extents.of(node, i)) if i < len(types) and types[i] else v
                for i, v in enumerate(value)
            ]
        return _on(value, self.extents.of(node))

    def _leaf(self, node: fx.Node) -> Interval:
        value = self.graph.constant(node)
        if value is None or not value.is_floating_point() or value.is_meta or not value.numel():
            return self.unknown(node)
        return _on(Interval.of(value), self.extents.of(node))


def _on(value: Interval, extent: Sequence[int]) -> Interval:
    value = value.over([d for d, size in enumerate(extent) if size == 1])
    # A bound that is not a number says nothing.
    lost = value.lo.isnan() | value.hi.isnan()
    return Interval(torch.where(lost, -math.inf, value.lo), torch.where(lost, math.inf, value.hi))
