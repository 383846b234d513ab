"""From streams of tensors to ranges: what is left of them when a number becomes an integer.

========================  ================================================================================
``minmax``                everything that was seen
``moving-average``        exponential mean of the batches' ends (``averaging``, torch's meaning); depends on
                          the batches and their order
``percentile``            between the ``100 - percentile``-th and the ``percentile``-th percentile
``entropy``               smallest divergence of the quantized distribution (Migacz, GTC 2017)
``mse``                   smallest expected squared error of the numbers in the given format, both ends
========================  ================================================================================

Every range holds zero and, beyond that, lies within what was seen. All of them need one pass and constant
memory (:mod:`graphprune.quantization.histogram`); all but ``moving-average`` are independent of the order
and of how the numbers are split into batches.

>>> import torch
>>> from graphprune.integers import UINT8
>>> watch = observer("percentile", percentile=99.0)
>>> watch.see(torch.arange(2000.0))
>>> watch.see(torch.tensor([1e6]))
>>> low, high = watch.range(UINT8)
>>> low, 1960 < high < 2000, watch.outlier > 400
(0.0, True, True)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..errors import InputError, suggestion
from ..integers import Format
from . import clipping
from .histogram import Histogram


class Observer:
    """Sees tensors one after the other; :meth:`range` says which part of them integers should cover.

    Attributes:
        name: what :func:`observer` calls it.
    """

    name: ClassVar[str]
    options: ClassVar[dict[str, float]] = {}

    def __init__(self, **options: float):
        self.values = Histogram()
        self._options = {**self.options, **options}

    def see(self, values: Tensor) -> None:
        """Take a batch in, of any shape; an empty one changes nothing.

        Raises:
            InputError: a number is NaN or infinite.
        """
        if values.numel():
            self._batch(*self.values.add(values))

    def range(self, form: Format) -> tuple[float, float]:
        """The numbers that integers of this format should cover; zero is among them.

        Raises:
            InputError: nothing was seen.
        """
        if not self.seen:
            raise InputError("an observer saw no values: no calibration input reached it")
        low, high = self._range(form)
        return min(low, 0.0), max(high, 0.0)

    @property
    def seen(self) -> int:
        """How many numbers it saw."""
        return self.values.total

    @property
    def extent(self) -> tuple[float, float]:
        """The smallest and the largest number it saw."""
        return self.values.low, self.values.high

    @property
    def constant(self) -> bool:
        """Whether all numbers it saw are one and the same."""
        return self.values.low == self.values.high

    @property
    def outlier(self) -> float:
        """The largest magnitude over the 99.9th percentile of magnitudes, exact zeros left out.

        Near 1 without outliers, some 1.3 for a normal distribution; 1 where all is zero.
        """
        if not self.seen:
            return 1.0
        usual = self.values.magnitude(0.999)
        return max(abs(self.values.low), abs(self.values.high)) / usual if usual else 1.0

    def _batch(self, low: float, high: float) -> None:
        """What else to keep of a batch, given its ends."""

    def _range(self, form: Format) -> tuple[float, float]:
        return self.extent

    def _merge(self, others: Sequence[Observer]) -> None:
        self.values = Histogram.sum(other.values for other in others)


class MinMax(Observer):
    """Everything that was seen."""

    name = "minmax"


class MovingAverage(Observer):
    """``end += averaging * (batch's end - end)``, from the first batch's ends on."""

    name = "moving-average"
    options: ClassVar = {"averaging": 0.01}

    def __init__(self, **options: float):
        super().__init__(**options)
        self._ends: tuple[float, float] | None = None

    def _batch(self, low: float, high: float) -> None:
        part = self._options["averaging"]
        before = self._ends or (low, high)
        self._ends = before[0] + part * (low - before[0]), before[1] + part * (high - before[1])

    def _range(self, form: Format) -> tuple[float, float]:
        assert self._ends is not None
        return self._ends

    def _merge(self, others: Sequence[Observer]) -> None:
        super()._merge(others)
        ends = [other._ends for other in others if isinstance(other, MovingAverage) and other._ends]
        if ends:
            self._ends = min(low for low, _ in ends), max(high for _, high in ends)


class Percentile(Observer):
    """Between two percentiles; where both are zero, but not all of the numbers, everything seen."""

    name = "percentile"
    options: ClassVar = {"percentile": 99.99}

    def _range(self, form: Format) -> tuple[float, float]:
        share = self._options["percentile"] / 100
        low, high = self.values.quantile(1 - share), self.values.quantile(share)
        return (low, high) if min(low, 0.0) < max(high, 0.0) else self.extent


class Entropy(Observer):
    """The smallest divergence; see :mod:`graphprune.quantization.clipping`."""

    name = "entropy"

    def _range(self, form: Format) -> tuple[float, float]:
        return clipping.least_divergence(self.values, form)


class SquaredError(Observer):
    """The smallest expected squared error; see :mod:`graphprune.quantization.clipping`."""

    name = "mse"

    def _range(self, form: Format) -> tuple[float, float]:
        return clipping.least_squared_error(self.values, form)


_KINDS: dict[str, type[Observer]] = {
    kind.name: kind for kind in (MinMax, MovingAverage, Percentile, Entropy, SquaredError)
}
NAMES: tuple[str, ...] = tuple(_KINDS)
"""What :func:`observer` knows."""

# Option → the values it may have, ends excluded and included.
_LIMITS = {"averaging": (0.0, 1.0), "percentile": (50.0, 100.0)}


def observer(name: str, **options: Any) -> Observer:
    """A new observer.

    Args:
        name: one of :data:`NAMES`.
        options: ``averaging`` (0 to 1, the weight of a new batch) for ``moving-average``; ``percentile``
            (50 to 100) for ``percentile``.

    Raises:
        InputError: the name or an option is unknown, or a value out of range.
    """
    if name not in _KINDS:
        raise InputError(f"unknown observer {name!r}{suggestion(name, NAMES)}; known: {', '.join(NAMES)}")
    kind = _KINDS[name]
    for option, value in options.items():
        if option not in kind.options:
            takes = f"{suggestion(option, kind.options)}; it takes: {', '.join(kind.options) or 'none'}"
            raise InputError(f"observer {name!r} has no option {option!r}{takes}")
        above, most = _LIMITS[option]
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not above < value <= most:
            raise InputError(
                f"option {option!r} of observer {name!r} must be above {above:g} and at most {most:g}, "
                f"got {value!r}"
            )
    return kind(**options)


def merged(observers: Sequence[Observer]) -> Observer:
    """One observer of all that several of one kind saw, for values that must share a scale.

    For ``moving-average`` the range that holds each of theirs.

    Raises:
        InputError: there are none, or they differ in kind or options.
    """
    if not observers:
        raise InputError("no observers to merge")
    first = observers[0]
    for other in observers[1:]:
        if type(other) is not type(first) or other._options != first._options:
            raise InputError(
                "observers of values that share a scale must be of one kind, "
                f"got {_text(first)} and {_text(other)}"
            )
    result = type(first)(**first._options)
    result._merge(observers)
    return result


def _text(which: Observer) -> str:
    options = " ".join(f"{name}={value:g}" for name, value in which._options.items())
    return f"{which.name}{{{options}}}" if options else which.name
