"""How much each position of an axis matters, and in which order the positions go.

=================== ================================================================================
name                a position's score, larger is more important
=================== ================================================================================
``l1``, ``l2``      norm of its weights (Li et al., *Pruning Filters for Efficient ConvNets*, 2017)
``bn-scale``        ``|gamma|`` of its batch norms (Liu et al., *Network Slimming*, 2017, section 3)
``fpgm``            distance to the other positions (He et al., *FPGM*, 2019, eq. 5)
``taylor``          ``|sum w dL/dw|`` (Molchanov et al., 2017, eq. 8; over weights, Molchanov et al., 2019)
``taylor-squared``  ``(sum w dL/dw)^2``, summed over batches (Molchanov et al., 2019, eq. 8)
``activation-mean`` mean of ``|x|`` over samples and places (Polyak and Wolf, 2015; Hu et al., *APoZ*, 2016)
``activation-var``  variance of ``x`` (Polyak and Wolf, 2015, *inbound pruning*)
``reconstruction``  error that the best repair leaves (:mod:`graphprune.importance.reconstruction`)
``random``          a random number
a callable          ``(graph, axis) -> tensor [axis.size]``
=================== ================================================================================

Scores of weights are summed over all parameters the axis runs through (its members), so that coupled
layers are judged together (Fang et al., *DepGraph*, CVPR 2023, section 3.3). Each member contributes its
scores divided by their mean over positions, so that no member dominates by its scale; ``taylor`` and
``taylor-squared``, which are in units of the loss, and ``reconstruction`` are not divided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import torch

from ..axes.axis import Axis
from ..errors import InputError, suggestion
from .ranking import Ranking

if TYPE_CHECKING:
    from ..calibration import Calibration
    from ..graph import Graph

__all__ = ["NAMES", "Data", "Importance", "Ranking", "additive", "rank", "scores"]

Importance = Union[str, Callable[["Graph", Axis], torch.Tensor]]  # noqa: UP007 - needed at run time

OF_WEIGHTS = ("l1", "l2", "bn-scale", "fpgm", "random")
OF_DATA = ("taylor", "taylor-squared", "activation-mean", "activation-var", "reconstruction")
NAMES = (*OF_WEIGHTS, *OF_DATA)


@dataclass(frozen=True)
class Data:
    """What importances beyond the weights look at.

    Attributes:
        calibration: any iterable of inputs (:func:`graphprune.calibration.read`).
        loss: ``module -> loss``, or an iterator of losses, a batch each, for ``taylor``; without one, the
            output itself is differentiated, projected on random directions (see :mod:`.probe`).
        limit: samples read from ``calibration``.
    """

    calibration: Iterable[Any] | None = None
    loss: Callable[[Any], Any] | None = None
    limit: int = 512


def additive(importance: Importance) -> bool:
    """Whether scores are costs in one unit, which may be weighed against what a removal saves."""
    return importance == "reconstruction"


def rank(
    graph: Graph, axes: Sequence[Axis], importance: Importance = "l2", seed: int = 0, data: Data | None = None
) -> dict[str, Ranking]:
    """Axis name → the order in which its positions go, and what each costs.

    Args:
        graph: the graph the axes belong to.
        axes: prunable axes.
        importance: a name or a callable, see the module docstring.
        seed: for ``random`` and for random projections.
        data: calibration inputs, for the importances that need them.

    Raises:
        InputError: an unknown name, a callable whose result has another size or is not finite, weights
            on the meta device, or data that is missing or does not fit.
    """
    if importance == "reconstruction":
        from .reconstruction import rankings

        _weights_needed(graph, importance)
        return rankings(graph, axes, _read(graph, importance, data).calls, seed=seed)
    return {name: Ranking.of(found) for name, found in scores(graph, axes, importance, seed, data).items()}


def scores(
    graph: Graph, axes: Sequence[Axis], importance: Importance = "l2", seed: int = 0, data: Data | None = None
) -> dict[str, torch.Tensor]:
    """Axis name → scores ``[axis.size]`` in float64; arguments and errors as of :func:`rank`."""
    if callable(importance):
        return {axis.name: _called(graph, axis, importance) for axis in axes}
    if importance not in NAMES:
        raise InputError(
            f"unknown importance {importance!r}{suggestion(str(importance), NAMES)}; "
            f"known: {', '.join(NAMES)}, or a callable (graph, axis) -> scores"
        )
    from . import activations, gradients, weights

    if importance == "random":
        return {axis.name: weights.drawn(axis, seed) for axis in axes}
    _weights_needed(graph, importance)
    if importance in ("l1", "l2"):
        return weights.magnitudes(graph, axes, 1 if importance == "l1" else 2)
    if importance == "bn-scale":
        return weights.batch_norm_scales(graph, axes)
    if importance == "fpgm":
        return weights.distances(graph, axes)
    if importance == "reconstruction":
        ranked = rank(graph, axes, importance, seed, data)
        return {name: _undone(ranking) for name, ranking in ranked.items()}
    if importance in ("taylor", "taylor-squared"):
        loss = None if data is None else data.loss
        calls = () if loss is not None else _read(graph, importance, data).calls
        return gradients.taylor(graph, axes, calls, loss, squared=importance == "taylor-squared", seed=seed)
    calls = _read(graph, importance, data).calls
    return activations.statistics(graph, axes, calls, variance=importance == "activation-var")


def _undone(ranking: Ranking) -> torch.Tensor:
    """Scores in the order of positions: the cost of everything up to and including each."""
    found = torch.empty(len(ranking.order), dtype=torch.float64)
    found[list(ranking.order)] = torch.tensor(ranking.costs, dtype=torch.float64).cumsum(0)
    return found


def _read(graph: Graph, importance: str, data: Data | None) -> Calibration:
    from ..calibration import read

    if data is None or data.calibration is None:
        more = " or a `loss`" if importance.startswith("taylor") else ""
        raise InputError(
            f"importance {importance!r} looks at data: give `calibration`, some inputs without labels{more}"
        )
    return read(graph, data.calibration, data.limit)


def _weights_needed(graph: Graph, importance: str) -> None:
    if graph.is_meta:
        raise InputError(
            f"importance {importance!r} reads weights, and these are on the meta device; "
            'load them, or use importance="random" or a callable'
        )


def _called(graph: Graph, axis: Axis, importance: Callable[[Graph, Axis], torch.Tensor]) -> torch.Tensor:
    result = torch.as_tensor(importance(graph, axis), dtype=torch.float64).flatten().cpu()
    if result.shape != (axis.size,) or not bool(torch.isfinite(result).all()):
        raise InputError(
            f"the importance of axis {axis.name!r} must be {axis.size} finite numbers, "
            f"got shape {tuple(result.shape)}; return one score a position"
        )
    return result
