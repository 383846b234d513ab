"""Convolutions and matrix products with a parameter: what they read, and which axes run into them.

An operator *mixes* an axis if the axis runs through its input channels and does not, position by position,
run through its output as well: a depthwise convolution hands every channel on and mixes none.

>>> import graphprune
>>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2))
>>> graph = graphprune.trace(model, torch.zeros(1, 1, 4, 4))
>>> axis = graph.axes["0.weight[0]"]
>>> for linear in linears(graph):
...     print(linear.node.name, linear.mixes(axis.atom))
conv2d False
linear True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from ..axes.terms import Atom, Term, placements
from ..operands import CONVOLUTIONS, PRODUCTS, argument, is_transposed

if TYPE_CHECKING:
    from ..graph import Graph

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Linear:
    """One operator that multiplies its input with a parameter.

    Attributes:
        node: the operator.
        source: what it reads, its positional argument number ``operand``.
        weight: the parameter's name.
        groups: of a convolution.
        transposed: whether the weight's input channels come first.
        channels: dimension of the channels in what it reads and gives.
    """

    graph: Graph
    node: fx.Node
    source: fx.Node
    operand: int
    weight: str
    groups: int
    transposed: bool
    channels: int

    @cached_property
    def inputs(self) -> list[tuple[Atom, np.ndarray]]:
        """The axes in the input channels: atom and, for every channel, its position or -1."""
        return placements(self._term(self.source))

    @cached_property
    def outputs(self) -> list[tuple[Atom, np.ndarray]]:
        """The axes in the output channels, in the same way."""
        return placements(self._term(self.node))

    def mixes(self, atom: Atom) -> bool:
        """Whether removed positions of the axis leave an error in the output that a refit makes smaller."""
        inside = any(atom is other for other, _ in self.inputs)
        return inside and (self.groups == 1 or not any(atom is other for other, _ in self.outputs))

    def columns(self, atom: Atom) -> list[np.ndarray]:
        """For every position of an axis the input channels that belong to it."""
        owner = owners(self.inputs, atom)
        order = np.argsort(owner, kind="stable")
        edges = np.searchsorted(owner[order], np.arange(atom.size + 1))
        return [order[edges[p] : edges[p + 1]] for p in range(atom.size)]

    def rows(self, value: torch.Tensor) -> torch.Tensor:
        """A value as ``[samples · positions, channels]``."""
        return value.detach().movedim(self.channels, -1).flatten(0, -2)

    def blocks(self) -> torch.Tensor:
        """The weight as ``[groups, outputs / groups, inputs / groups, taps]`` in float64."""
        weight = self.graph.tensors[self.weight].detach().double()
        weight = weight.reshape(*weight.shape[:2], -1)
        if self.transposed:
            return weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return weight.unflatten(0, (self.groups, -1))

    def _term(self, node: fx.Node) -> Term:
        return self.graph.typing.dims[node][self.channels]  # type: ignore[index,return-value]


def owners(places: Sequence[tuple[Atom, np.ndarray]], atom: Atom) -> np.ndarray:
    """For every place of a dimension the position of an axis that it belongs to, -1 for none."""
    owner = np.full(len(places[0][1]), -1)
    for other, index in places:
        if other is atom:
            owner = np.where(index >= 0, index, owner)
    return owner


def linears(graph: Graph) -> list[Linear]:
    """Every such operator whose weight is a parameter, in execution order."""
    found = (_linear(graph, node) for node in graph.fx.nodes if node.op == "call_function")
    return [linear for linear in found if linear is not None]


def _linear(graph: Graph, node: fx.Node) -> Linear | None:
    transposed, groups, channels, operand = False, 1, -1, 0
    if node.target is aten.addmm.default:
        source, weight, transposed, operand = node.args[1], node.args[2], True, 1
    elif node.target in PRODUCTS:
        source, weight, transposed = node.args[0], node.args[1], True
    elif node.target is aten.linear.default:
        source, weight = node.args[:2]
    elif node.target in CONVOLUTIONS:
        source, weight, groups = node.args[0], node.args[1], argument(node, "groups")
        transposed = is_transposed(node)
        channels = 1 - weight.meta["val"].dim()  # type: ignore[union-attr]
    else:
        return None
    if not _is_matrix(graph, weight) or not isinstance(source, fx.Node) or source.op == "get_attr":
        return None
    if node.target not in CONVOLUTIONS and weight.meta["val"].dim() != 2:  # type: ignore[union-attr]
        return None
    return Linear(graph, node, source, operand, str(weight.target), groups, transposed, channels)  # type: ignore[union-attr]


def _is_matrix(graph: Graph, value: Any) -> bool:
    return graph.constant(value) is not None and value.meta["val"].is_floating_point()
