"""Importance from weights alone: norms, batch norm scales, distances between filters, chance."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ..axes.axis import Axis
from ..errors import InputError

if TYPE_CHECKING:
    from ..graph import Graph


def drawn(axis: Axis, seed: int) -> torch.Tensor:
    """``[size]`` uniform random numbers, the same for an axis whichever others are asked for."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(axis.name.encode()))
    return torch.rand(axis.size, generator=generator, dtype=torch.float64)


def magnitudes(graph: Graph, axes: Sequence[Axis], order: int) -> dict[str, torch.Tensor]:
    """Norms of order 1 or 2 of every position's weights, each member divided by its mean."""

    def norm(sums: torch.Tensor) -> torch.Tensor:
        return sums ** (1 / order)

    return _summed(graph, axes, lambda weight, dim: _power_sums(weight, dim, order), norm)


def batch_norm_scales(graph: Graph, axes: Sequence[Axis]) -> dict[str, torch.Tensor]:
    """``|gamma|`` summed over the batch norms that an axis runs through.

    Raises:
        InputError: an axis runs through no batch norm: its scores would say nothing.
    """
    aten = torch.ops.aten
    scales = {
        str(node.args[1].target)  # type: ignore[union-attr]
        for node in graph.find(aten.batch_norm.default)
        if graph.constant(node.args[1]) is not None
    }
    for axis in axes:
        if not any(member.tensor in scales for member in axis.members):
            raise InputError(
                f"importance 'bn-scale' says nothing of axis {axis.name!r}: no batch norm scales it (or "
                "it is folded already); put it into `ignored`, or use another importance"
            )
    return _summed(graph, axes, lambda weight, dim: weight.detach().double().abs().cpu(), only=scales)


def distances(graph: Graph, axes: Sequence[Axis]) -> dict[str, torch.Tensor]:
    """Sum of the Euclidean distances of a position's weights to those of all others.

    The parts of a member that belong to one position are one vector; each member is divided by its mean.
    """
    totals = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
    for name, weight, dim, inside in _members(graph, totals):
        del name
        for axis_name, index in inside:
            slices = weight.detach().double().movedim(dim, 0).cpu()
            slices = slices.reshape(len(slices), -1)
            order = torch.argsort(index[index >= 0], stable=True)
            vectors = slices[index >= 0][order].reshape(totals[axis_name].numel(), -1)
            found = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
            totals[axis_name] += _over_mean(found)
    return totals


def _summed(
    graph: Graph,
    axes: Sequence[Axis],
    measure: Callable[[torch.Tensor, int], torch.Tensor],
    finish: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
    only: set[str] | None = None,
) -> dict[str, torch.Tensor]:
    """One reduction a parameter dimension, shared out to every axis in it."""
    totals = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
    for name, weight, dim, inside in _members(graph, totals):
        if only is not None and name not in only:
            continue
        slices = measure(weight, dim)
        summed: dict[str, torch.Tensor] = {}
        for axis_name, index in inside:
            into = summed.setdefault(axis_name, torch.zeros_like(totals[axis_name]))
            into.index_add_(0, index[index >= 0], slices[index >= 0])
        for axis_name, sums in summed.items():
            totals[axis_name] += _over_mean(finish(sums))
    return totals


def _members(
    graph: Graph, wanted: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, int, list[tuple[str, torch.Tensor]]]]:
    """Parameter, its value, a dimension, and the wanted axes in it with their index ``[size of dim]``."""
    for name, weight in graph.parameters.items():
        for dim in range(weight.dim()):
            inside = [
                (axis.name, torch.from_numpy(index))
                for axis, index in graph.axes.of(name, dim)
                if axis.name in wanted
            ]
            if inside:
                yield name, weight, dim, inside


def _over_mean(found: torch.Tensor) -> torch.Tensor:
    mean = float(found.mean())
    return found / mean if mean else found


def _power_sums(weight: torch.Tensor, dim: int, order: int) -> torch.Tensor:
    """``[size of dim]`` float64: ``sum |w|^order`` over the other dimensions, without a float64 copy."""
    weight = weight.detach()
    # The square of a half-precision number may be out of its range.
    wide = weight.float() if weight.element_size() < 4 else weight
    powers = wide.abs() if order == 1 else wide.square()
    others = [d for d in range(weight.dim()) if d != dim]
    return (powers.sum(others, dtype=torch.float64) if others else powers.to(torch.float64)).cpu()
