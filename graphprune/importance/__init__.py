"""How much each position of an axis matters: one score a position, larger is more important.

A magnitude importance sums over every parameter the axis runs through (its members), so that coupled
layers are judged together (Fang et al., *DepGraph*, CVPR 2023, section 3.3). Each member contributes
the norm of its slice divided by the mean over positions, so that no member dominates by its scale.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Union

import torch

from ..axes.axis import Axis
from ..errors import InputError, suggestion

if TYPE_CHECKING:
    from ..graph import Graph

Importance = Union[str, Callable[["Graph", Axis], torch.Tensor]]  # noqa: UP007 - needed at run time

NAMES = ("l1", "l2", "random")


def scores(
    graph: Graph, axes: Sequence[Axis], importance: Importance = "l2", seed: int = 0
) -> dict[str, torch.Tensor]:
    """Axis name → scores ``[axis.size]`` in float64.

    Args:
        graph: the graph the axes belong to.
        axes: prunable axes.
        importance: ``"l1"``, ``"l2"``, ``"random"`` or ``(graph, axis) -> tensor [axis.size]``.
        seed: for ``"random"``.

    Raises:
        InputError: an unknown name, a callable whose result has another size or is not finite, or a
            magnitude of weights on the meta device.
    """
    if callable(importance):
        return {axis.name: _called(graph, axis, importance) for axis in axes}
    if importance == "random":
        return {axis.name: _drawn(axis, seed) for axis in axes}
    if importance not in ("l1", "l2"):
        raise InputError(
            f"unknown importance {importance!r}{suggestion(str(importance), NAMES)}; "
            f"known: {', '.join(NAMES)}, or a callable (graph, axis) -> scores"
        )
    if graph.is_meta:
        raise InputError(
            f"importance {importance!r} reads weights, and these are on the meta device; "
            'load them, or use importance="random" or a callable'
        )
    return _magnitudes(graph, axes, 1 if importance == "l1" else 2)


def _called(graph: Graph, axis: Axis, importance: Callable[[Graph, Axis], torch.Tensor]) -> torch.Tensor:
    result = torch.as_tensor(importance(graph, axis), dtype=torch.float64).flatten().cpu()
    if result.shape != (axis.size,) or not bool(torch.isfinite(result).all()):
        raise InputError(
            f"the importance of axis {axis.name!r} must be {axis.size} finite numbers, "
            f"got shape {tuple(result.shape)}; return one score a position"
        )
    return result


def _drawn(axis: Axis, seed: int) -> torch.Tensor:
    # Seeded by the name, so that an axis draws the same scores whichever others are asked for.
    generator = torch.Generator().manual_seed(seed + zlib.crc32(axis.name.encode()))
    return torch.rand(axis.size, generator=generator, dtype=torch.float64)


def _magnitudes(graph: Graph, axes: Sequence[Axis], order: int) -> dict[str, torch.Tensor]:
    """One reduction a parameter dimension, shared out to every axis in it."""
    totals = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
    for name, weight in graph.parameters.items():
        for dim in range(weight.dim()):
            inside = [(axis, index) for axis, index in graph.axes.of(name, dim) if axis.name in totals]
            if not inside:
                continue
            slices = _power_sums(weight.detach(), dim, order)
            summed: dict[str, torch.Tensor] = {}
            for axis, index in inside:
                where = torch.from_numpy(index)
                into = summed.setdefault(axis.name, torch.zeros(axis.size, dtype=torch.float64))
                into.index_add_(0, where[where >= 0], slices[where >= 0])
            for axis_name, powers_sum in summed.items():
                norm = powers_sum ** (1 / order)
                mean = float(norm.mean())
                totals[axis_name] += norm / mean if mean else norm
    return totals


def _power_sums(weight: torch.Tensor, dim: int, order: int) -> torch.Tensor:
    """``[size of dim]`` float64: ``sum |w|^order`` over the other dimensions, without a float64 copy."""
    # The square of a half-precision number may be out of its range.
    wide = weight.float() if weight.element_size() < 4 else weight
    powers = wide.abs() if order == 1 else wide.square()
    others = [d for d in range(weight.dim()) if d != dim]
    return (powers.sum(others, dtype=torch.float64) if others else powers.to(torch.float64)).cpu()
