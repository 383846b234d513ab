"""A latency budget, and what one measurement says of it.

>>> Goal.parse("5ms").ms, bounds([0.48, 0.49, 0.5, 0.5, 0.52, 0.55])
(5.0, (0.48, 0.55))
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, isfinite

from ..errors import InputError
from ..measure import Ratio

Samples = tuple[Sequence[float], Sequence[float]]
"""Milliseconds of the smaller and of the whole network, taken in turns: one of each a round."""

_TIME = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*(us|µs|ms|s)\s*")
_NUMBER = re.compile(r"\s*-?(\d+\.?\d*|\.\d+)\s*")
_MS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True)
class Goal:
    """A latency budget: a share of the whole network's latency, or milliseconds.

    >>> Goal.parse("0.8s").ms, Goal.parse(0.5).share
    (800.0, 0.5)
    """

    text: str
    share: float | None = None
    ms: float | None = None

    @staticmethod
    def parse(budget: float | str) -> Goal:
        """A budget as users write it: ``0.5``, ``"0.5"``, ``"5ms"``, ``"0.8s"``, ``"300us"``.

        Raises:
            InputError: it is neither, or out of range.
        """
        known = "a share up to 1.0 of the unpruned network's, or a time such as '5ms' or '0.8s'"
        if isinstance(budget, str) and _NUMBER.fullmatch(budget):
            budget = float(budget)  # a share, as a command line has it
        if isinstance(budget, str):
            match = _TIME.fullmatch(budget)
            if match is None:
                raise InputError(f"latency budget {budget!r} is not understood; it is {known}")
            ms = float(match[1]) * _MS[match[2]]
            if not ms > 0:
                raise InputError(f"latency budget {budget!r} must be more than nothing")
            return Goal(budget.strip(), ms=ms)
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not isfinite(budget):
            raise InputError(f"latency budget {budget!r} is not understood; it is {known}")
        if not 0 < budget <= 1:
            raise InputError(f"latency budget {budget} is out of range; it is {known}")
        return Goal(f"{budget:g}", share=float(budget))


@dataclass(frozen=True)
class Probe:
    """One measured network.

    Attributes:
        count: steps of the queue that were taken.
        macs: multiply-accumulates that are left, and their ``share``.
        ratio: its latency to the whole network's, over rounds: median and quartiles.
        bounds: one-sided 95 % confidence bounds of that median, lower and upper.
        latency_ms, whole_ms: medians of both, milliseconds.
        rounds: how many.
        fresh: whether this is a confirmation, with samples of its own.
        predicted: its latency to the whole network's, as foretold by a model of it before anything was
            pruned; ``None`` without a model.
        expected: the same with what had been measured until then.
    """

    count: int
    macs: int
    share: float
    ratio: Ratio
    bounds: tuple[float, float]
    latency_ms: float
    whole_ms: float
    rounds: int
    fresh: bool = False
    predicted: float | None = None
    expected: float | None = None

    def __str__(self) -> str:
        kind = "confirmed at" if self.fresh else "probed at"
        return (
            f"{kind} {self.share:.3f} of the MACs: latency {self.ratio.median:.3f} of the unpruned "
            f"({self.ratio.low:.3f} to {self.ratio.high:.3f}, {self.rounds} rounds), {self.latency_ms:.3g} ms"
            + (f"; {self.expected:.3f} was expected" if self.expected is not None else "")
        )


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """One-sided 95 % bounds of the median of what ascending ``values`` are drawn from.

    Of n values, the median is below the k-th with the probability that a fair coin falls on one side fewer
    than k times in n; the bound is the first k for which that is 95 %.

    >>> bounds(list(range(1, 21)))
    (6, 15)
    """
    n, below = len(values), 0.0
    for k in range(1, n + 1):
        below += comb(n, k - 1) / 2**n
        if below >= 0.95:
            return values[n - k], values[k - 1]
    return values[0], values[-1]


def quartiles(values: Sequence[float]) -> Ratio:
    """Median, lower and upper quartile of ascending values."""
    if len(values) == 1:
        return Ratio(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, low, high)
