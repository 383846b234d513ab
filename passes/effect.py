"""How far a changed network is from the original: on calibration inputs, by the caller's measure, or both.

>>> import torch, graphprune
>>> graph = graphprune.trace(torch.nn.Linear(3, 2), torch.zeros(1, 3))
>>> measure = Measured(graph, [(torch.ones(1, 3),)], None)
>>> other = graph.copy()
>>> other.set_tensors({name: 1.1 * value for name, value in graph.tensors.items()})
>>> print(measure(other))
outputs off by 10.0%
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import torch

from graphprune.errors import InputError
from graphprune.graph import Graph


@dataclass(frozen=True)
class Effect:
    """Relative error of the outputs, and the caller's measure (larger is better); ``None`` if not taken."""

    error: float | None
    value: float | None

    def rise(self, before: Effect) -> tuple[float, ...]:
        """How much worse this is, the caller's measure first; smaller sorts first."""
        found = []
        if self.value is not None and before.value is not None:
            found.append(before.value - self.value)
        if self.error is not None and before.error is not None:
            found.append(self.error - before.error)
        return tuple(found)

    def __str__(self) -> str:
        said = [f"evaluate gives {self.value:.4g}"] if self.value is not None else []
        said += [f"outputs off by {self.error:.1%}"] if self.error is not None else []
        return ", ".join(said)


class Measured:
    """Measures networks against one original.

    Args:
        original: the network; its outputs on all calls are kept.
        calls: flat inputs; none for the caller's measure alone.
        evaluate: ``module -> float``, or ``None``.

    Raises:
        InputError: the outputs hold no real numbers, and there is no other measure.
    """

    def __init__(
        self,
        original: Graph,
        calls: Sequence[Sequence[torch.Tensor]],
        evaluate: Callable[[Any], float] | None,
    ):
        self._calls, self._evaluate = calls, evaluate
        self._wanted = list(_outputs(original, calls))
        if calls and evaluate is None and not any(self._wanted):
            raise InputError(
                "the outputs hold no real numbers, so they have no relative error; give evaluate"
            )

    def __call__(self, graph: Graph) -> Effect:
        """The effect of what was changed; a network whose outputs are not finite is infinitely far."""
        value = None
        if self._evaluate is not None:
            # Of a copy: a graph's module takes over its tensors.
            value = float(self._evaluate(graph.copy().module))
            if not isfinite(value):
                raise InputError(f"evaluate gave {value}; it must be finite")
        return Effect(self._error(graph) if any(self._wanted) else None, value)

    def _error(self, graph: Graph) -> float:
        off = [0.0] * len(self._wanted[0])
        length = [0.0] * len(off)
        for found, wanted in zip(_outputs(graph, self._calls), self._wanted, strict=True):
            for i, (y, original) in enumerate(zip(found, wanted, strict=True)):
                off[i] += float((y - original).double().square().sum())
                length[i] += float(original.double().square().sum())
        # Every output counts alike, whatever its size and scale.
        mean = sum(o / max(n, 1e-30) for o, n in zip(off, length, strict=True)) / len(off)
        return mean**0.5 if isfinite(mean) else inf


def _outputs(graph: Graph, calls: Sequence[Sequence[torch.Tensor]]) -> Any:
    run = graph.callable()
    for call in calls:
        with torch.no_grad():
            outputs = run(*call)
        yield [y for y in outputs if isinstance(y, torch.Tensor) and y.is_floating_point()]
