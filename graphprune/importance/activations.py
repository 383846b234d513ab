"""Importance from activations: how large, or how varied, the channels are that an axis gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..axes.axis import Axis
from ..errors import InputError
from .probe import gradients
from .readers import Linear, linears

if TYPE_CHECKING:
    from ..graph import Graph


def statistics(
    graph: Graph, axes: Sequence[Axis], calls: Sequence[Sequence[torch.Tensor]], *, variance: bool
) -> dict[str, torch.Tensor]:
    """Axis name → ``[size]``: mean ``|x|`` or variance of what is read from each position.

    Taken where convolutions and linears read the axis (behind the activation function), each divided by its
    mean over positions, and summed; where none reads it, at the results of those that give it.

    Raises:
        InputError: neither reads nor gives an axis.
    """
    every = linears(graph)
    places: dict[str, list[tuple[Linear, bool]]] = {}
    for axis in axes:
        read = [(entry, True) for entry in every if any(axis.atom is a for a, _ in entry.inputs)]
        made = [(entry, False) for entry in every if any(axis.atom is a for a, _ in entry.outputs)]
        places[axis.name] = read or made
        if not places[axis.name]:
            raise InputError(
                f"no convolution or linear reads or gives axis {axis.name!r}, so that its activations cannot "
                "be told apart; put it into `ignored`, or use another importance"
            )
    wanted = {place for found in places.values() for place in found}
    moments: dict[tuple[Linear, bool], _Moments] = {place: _Moments() for place in wanted}
    by_node: dict[fx.Node, Linear] = {entry.node: entry for entry in every}

    def look(node: fx.Node, args: Sequence[Any], value: Any) -> None:
        entry = by_node.get(node)
        if entry is None:
            return
        for reads, tensor in ((True, args[entry.operand]), (False, value)):
            if (entry, reads) in moments:
                moments[entry, reads].add(entry.rows(tensor))

    for _ in gradients(graph, calls, (), look=look):
        pass
    totals = {}
    for axis in axes:
        totals[axis.name] = torch.zeros(axis.size, dtype=torch.float64)
        for place in places[axis.name]:
            entry, reads = place
            each = moments[place].variance() if variance else moments[place].magnitude()
            sums = torch.zeros(axis.size, dtype=torch.float64)
            for atom, index in entry.inputs if reads else entry.outputs:
                if atom is axis.atom:
                    at = torch.from_numpy(index)
                    sums.index_add_(0, at[at >= 0], each[at >= 0])
            mean = float(sums.mean())
            totals[axis.name] += sums / mean if mean else sums
    return totals


class _Moments:
    """Sums over rows, a channel each, in float64."""

    def __init__(self) -> None:
        self._rows = 0
        self._sums: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        rows = rows.double().cpu()
        found = torch.stack([rows.abs().sum(0), rows.sum(0), rows.square().sum(0)])
        self._sums = found if self._sums is None else self._sums + found
        self._rows += len(rows)

    def magnitude(self) -> torch.Tensor:
        assert self._sums is not None
        return self._sums[0] / self._rows

    def variance(self) -> torch.Tensor:
        assert self._sums is not None
        return (self._sums[2] / self._rows - (self._sums[1] / self._rows).square()).clamp_min(0)
