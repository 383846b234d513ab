"""How much each position of an axis matters: one score a position, larger is more important.

A magnitude importance sums over every parameter the axis runs through (its members), so that coupled
layers are judged together (Fang et al., *DepGraph*, CVPR 2023, section 3.3). Each member contributes
the norm of its slice divided by the mean over positions, so that no member dominates by its scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Union

import torch

from .axes.axis import Axis
from .errors import InputError, suggestion

if TYPE_CHECKING:
    from .graph import Graph

Importance = Union[str, Callable[["Graph", Axis], torch.Tensor]]  # noqa: UP007 - needed at run time

NAMES = ("l1", "l2", "random")


def scores(graph: Graph, axis: Axis, importance: Importance = "l2", seed: int = 0) -> torch.Tensor:
    """Scores ``[axis.size]`` in float64.

    Args:
        graph: the graph the axis belongs to.
        axis: a prunable axis.
        importance: ``"l1"``, ``"l2"``, ``"random"`` or ``(graph, axis) -> tensor [axis.size]``.
        seed: for ``"random"``.

    Raises:
        InputError: an unknown name, or a callable whose result has another size or is not finite.
    """
    if callable(importance):
        result = torch.as_tensor(importance(graph, axis), dtype=torch.float64).flatten().cpu()
        if result.shape != (axis.size,) or not bool(torch.isfinite(result).all()):
            raise InputError(
                f"the importance of axis {axis.name!r} must be {axis.size} finite numbers, "
                f"got shape {tuple(result.shape)}; return one score a position"
            )
        return result
    if importance == "random":
        generator = torch.Generator().manual_seed(seed + hash_name(axis.name))
        return torch.rand(axis.size, generator=generator, dtype=torch.float64)
    if importance not in ("l1", "l2"):
        raise InputError(
            f"unknown importance {importance!r}{suggestion(str(importance), NAMES)}; "
            f"known: {', '.join(NAMES)}, or a callable (graph, axis) -> scores"
        )
    return _magnitude(graph, axis, 1 if importance == "l1" else 2)


def hash_name(name: str) -> int:
    """A number for a name that is the same in every process."""
    import zlib

    return zlib.crc32(name.encode())


def _magnitude(graph: Graph, axis: Axis, order: int) -> torch.Tensor:
    total = torch.zeros(axis.size, dtype=torch.float64)
    parameters = graph.parameters
    for member in dict.fromkeys((m.tensor, m.dim) for m in axis.members):
        tensor, dim = member
        weight = parameters.get(tensor)
        if weight is None or weight.is_meta:
            continue
        powers = weight.detach().to(torch.float64).abs() ** order
        slices = powers.movedim(dim, 0).flatten(1).sum(1) if powers.dim() > 1 else powers
        summed = torch.zeros(axis.size, dtype=torch.float64)
        for found, index in graph.axes.of(tensor, dim):
            if found is axis:
                where = torch.from_numpy(index)
                summed.index_add_(0, where[where >= 0], slices[where >= 0].cpu())
        norm = summed ** (1 / order)
        mean = float(norm.mean())
        total += norm / mean if mean else norm
    return total
