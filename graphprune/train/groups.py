"""The parameters of every position of an axis, as one group: what regularisers are sums over.

Position ``i`` of an axis owns every entry of every parameter that would go with it: a filter, its bias, its
batch norm scale and shift, and the columns that read it. Which those are follows from the axis types, so
that coupled layers, heads and grouped convolutions need no case of their own. An entry that a position owns
twice (in a square weight whose rows and columns are one axis) counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..axes.axis import Axis
from ..errors import InputError
from ..graph import Graph
from ..module import TracedModule, require_traced
from ..plans.candidates import Limits, allowed


@dataclass(frozen=True, eq=False)
class Place:
    """One dimension of a parameter that an axis stands in.

    Attributes:
        parameter: its name.
        dim: the dimension.
        index: ``[known]``, the axis's position of every place in ``where``.
        where: ``[known]``, the places of the dimension that belong to the axis.
        counted: what the position owns already by an earlier dimension, to be left out, as a tensor that
            broadcasts to the parameter; ``None`` where there is nothing.
    """

    parameter: str
    dim: int
    index: Tensor
    where: Tensor
    counted: Tensor | None

    def sums(self, squares: Tensor, size: int) -> Tensor:
        """``[size]``: squares of the parameter's entries, summed for every position."""
        if self.counted is not None:
            squares = squares.masked_fill(self.counted.to(squares.device), 0.0)
        others = [d for d in range(squares.dim()) if d != self.dim]
        along = squares.sum(others) if others else squares
        where, index = self.where.to(squares.device), self.index.to(squares.device)
        return along.new_zeros(size).index_add(0, index, along.index_select(0, where))


class Groups:
    """The groups of a module's axes, found again whenever the module's graph becomes another one."""

    def __init__(self, module: TracedModule, limits: Limits):
        """Arguments: a traced network, and which of its axes count.

        Raises:
            InputError: the module is not traced, a name matches nothing, or no axis is left.
        """
        require_traced(module)
        self.module, self._limits = module, limits
        self._seen: tuple[fx.Graph, dict[str, Axis], dict[str, list[Place]]] | None = None
        if not self.axes:
            raise InputError("there is no axis whose positions could go; graph.explain(name) says why not")

    @property
    def axes(self) -> dict[str, Axis]:
        """The axes, by name."""
        return self._found()[0]

    def squares(self) -> dict[str, Tensor]:
        """Axis → ``[size]``: the sum of the squares of every position's entries; gradients pass."""
        axes, places = self._found()
        named = dict(self.module.named_parameters())
        known: dict[str, Tensor] = {}
        found = {}
        for name, axis in axes.items():
            total: Tensor | None = None
            for place in places[name]:
                if place.parameter not in known:
                    known[place.parameter] = named[place.parameter].square()
                part = place.sums(known[place.parameter], axis.size)
                total = part if total is None else total + part
            if total is not None:
                found[name] = total
        return found

    def sizes(self) -> dict[str, Tensor]:
        """Axis → ``[size]``: how many entries every position owns."""
        axes, places = self._found()
        named = dict(self.module.named_parameters())
        found = {}
        for name, axis in axes.items():
            parts = [p.sums(torch.ones_like(named[p.parameter]), axis.size) for p in places[name]]
            if parts:
                found[name] = torch.stack(parts).sum(0)
        return found

    def _found(self) -> tuple[dict[str, Axis], dict[str, list[Place]]]:
        if self._seen is None or self._seen[0] is not self.module.graph:
            graph = self.module.captured
            axes = {axis.name: axis for axis in allowed(graph, self._limits)}
            self._seen = self.module.graph, axes, places_of(graph, list(axes.values()))
        return self._seen[1:]


def places_of(graph: Graph, axes: Sequence[Axis]) -> dict[str, list[Place]]:
    """Axis → every place that it has in a parameter that trains."""
    found: dict[str, list[Place]] = {axis.name: [] for axis in axes}
    for name, parameter in graph.parameters.items():
        if not parameter.requires_grad:
            continue
        earlier: dict[str, list[tuple[int, Tensor]]] = {}
        for dim in range(parameter.dim()):
            for axis, positions in graph.axes.of(name, dim):
                if axis.name not in found:
                    continue
                index = torch.from_numpy(positions)
                before = earlier.setdefault(axis.name, [])
                where = (index >= 0).nonzero()[:, 0]
                counted = _counted(index, dim, before, parameter.dim())
                found[axis.name].append(Place(name, dim, index[where], where, counted))
                before.append((dim, index))
    return found


def _counted(index: Tensor, dim: int, before: Sequence[tuple[int, Tensor]], dims: int) -> Tensor | None:
    """Where an earlier place of the same axis has the same position."""
    counted: Tensor | None = None
    for other, positions in before:
        mine, theirs = [1] * dims, [1] * dims
        mine[dim], theirs[other] = -1, -1
        left, right = index.reshape(mine), positions.reshape(theirs)
        same = (left == right) & (left >= 0)
        if bool(same.any()):
            counted = same if counted is None else counted | same
    return counted
