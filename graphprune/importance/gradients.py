"""Taylor importance: the first-order change of a loss when a position's weights become zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..axes.axis import Axis
from ..errors import InputError
from .probe import gradients

if TYPE_CHECKING:
    from ..graph import Graph


def taylor(
    graph: Graph,
    axes: Sequence[Axis],
    calls: Sequence[Sequence[torch.Tensor]],
    loss: Callable[[Any], Any] | None,
    *,
    squared: bool,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Axis name → ``[size]``: ``|sum w dL/dw|`` over a position's weights, summed over members.

    Absolute values are taken after the sum over batches; squares batch by batch, before it.

    Args:
        calls: flat inputs, used where there is no ``loss``.
        loss: ``module -> loss`` or an iterator of losses, one a batch.
        squared: take ``(sum w dL/dw)^2``.
        seed: of the random projections where there is no ``loss``.

    Raises:
        InputError: the loss is no scalar, is not finite, or depends on no parameter.
    """
    shares = _Shares(graph, axes)
    totals = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
    sums: dict[tuple[str, str, int], torch.Tensor] = {}
    for slopes in slopes_of(graph, shares.names, calls, loss, seed):
        for key, effect in shares.effects(slopes):
            if squared:
                totals[key[0]] += effect.square()
            else:
                sums[key] = sums[key] + effect if key in sums else effect
    for (axis, _, _), effect in sums.items():
        totals[axis] += effect.abs()
    return totals


def slopes_of(
    graph: Graph,
    names: Sequence[str],
    calls: Sequence[Sequence[torch.Tensor]],
    loss: Callable[[Any], Any] | None,
    seed: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Parameter → gradient, batch by batch: of the caller's losses, or of the randomly projected outputs.

    Raises:
        InputError: the loss is no scalar, is not finite, or depends on no parameter.
    """
    return _of_loss(graph, names, loss) if loss is not None else _of_outputs(graph, names, calls, seed)


class _Shares:
    """Which parameter dimensions hold which axes."""

    def __init__(self, graph: Graph, axes: Sequence[Axis]):
        wanted = {axis.name for axis in axes}
        self._graph = graph
        self._inside: list[tuple[str, int, str, int, torch.Tensor]] = [
            (name, dim, axis.name, axis.size, torch.from_numpy(index))
            for name, weight in graph.parameters.items()
            for dim in range(weight.dim())
            for axis, index in graph.axes.of(name, dim)
            if axis.name in wanted
        ]
        self.names = list(dict.fromkeys(entry[0] for entry in self._inside))

    def effects(self, slopes: dict[str, torch.Tensor]) -> Iterator[tuple[tuple[str, str, int], torch.Tensor]]:
        """``(axis, parameter, dimension)`` and the sums ``[size]`` of weight times gradient."""
        for name, dim, axis, size, index in self._inside:
            if name not in slopes:
                continue
            product = self._graph.tensors[name].detach().double() * slopes[name].double()
            others = [d for d in range(product.dim()) if d != dim]
            along = (product.sum(others) if others else product).cpu()
            known = index >= 0
            yield (axis, name, dim), along.new_zeros(size).index_add_(0, index[known], along[known])


def _of_outputs(
    graph: Graph, names: Sequence[str], calls: Sequence[Sequence[torch.Tensor]], seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Gradients of the randomly projected output, a call each."""
    nodes = [next(iter(graph.fx.find_nodes(op="get_attr", target=name))) for name in names]
    for found in gradients(graph, calls, nodes, seed=seed):
        yield {name: gradient for name, (_, gradient) in zip(names, found, strict=True)}


def _of_loss(
    graph: Graph, names: Sequence[str], loss: Callable[[Any], Any]
) -> Iterator[dict[str, torch.Tensor]]:
    """Gradients of each of the caller's losses, on a copy: the caller's graph is not touched."""
    module = graph.copy().module.eval()
    parameters = dict(module.named_parameters())
    known = [name for name in names if name in parameters]
    found = loss(module)
    losses: Iterable[Any] = [found] if isinstance(found, torch.Tensor) else found
    count = 0
    for count, value in enumerate(losses, 1):
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or not bool(torch.isfinite(value)):
            raise InputError(f"`loss` must give finite scalar tensors; number {count} is {value!r:.80}")
        if not value.requires_grad:
            raise InputError("`loss` does not depend on its module: was it computed without gradients?")
        slopes = torch.autograd.grad(value, [parameters[name] for name in known], allow_unused=True)
        yield {name: slope for name, slope in zip(known, slopes, strict=True) if slope is not None}
    if not count:
        raise InputError("`loss` gave no value; an iterator that was used up before gives none, too")
