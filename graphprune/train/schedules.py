r"""How much is to be zero, or gone, after so many steps of training.

A schedule is a value: ``schedule(step)`` is the sparsity at a step, a share from 0 to 1, and
``schedule.due(step)`` says whether it is brought about there. With ``t = (step - begin) / (end - begin)``:

=========== =========================================================================================
Constant    ``s`` from ``begin`` on
Polynomial  ``final + (initial - final) (1 - t)^power``
Cubic       the same with power 3 (Zhu and Gupta, *To Prune, or Not to Prune*, 2017, eq. 1)
OneCycle    ``initial + (final - initial) (1 + e^(beta - alpha)) / (1 + e^(beta - alpha t))`` (Hubens et al.,
            *One-Cycle Pruning*, 2021)
Exponential what is left falls by the same factor each time: ``1 - (1 - initial) ((1 - final) / (1 -
            initial))^t``
=========== =========================================================================================

Begin, end and frequency mean what they mean in the TensorFlow Model Optimization Toolkit: a step is due when
it is ``begin``, ``begin + frequency``, …, and not behind ``end``. So the final sparsity is reached where
``end - begin`` is a multiple of the frequency, and :attr:`Schedule.reached` is what is reached in any case.
Before ``begin`` the sparsity is 0. A step is the number of optimizer steps done: 0 is before the first.

>>> schedule = Polynomial(initial=0.5, final=0.8, begin=0, end=100, frequency=50)
>>> [(step, round(schedule(step), 4)) for step in range(101) if schedule.due(step)]
[(0, 0.5), (50, 0.7625), (100, 0.8)]
>>> [round(OneCycle(final=0.8, end=100)(step), 3) for step in (0, 25, 50, 75, 100)]
[0.002, 0.061, 0.585, 0.791, 0.8]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from math import exp, isfinite

from ..errors import InputError
from ..plans.schedule import exponential, polynomial


class Schedule(ABC):
    """What every schedule can say.

    Attributes:
        begin: the first step at which it is due, at least 0.
        end: the last one; ``None`` where there is none.
        frequency: how many steps lie between two that are due.
    """

    begin: int
    end: int | None
    frequency: int

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The sparsity at a step, 0 to 1."""

    @property
    @abstractmethod
    def target(self) -> float:
        """The sparsity at the end."""

    def due(self, step: int) -> bool:
        """Whether the sparsity is brought about at a step."""
        if step < self.begin or (self.end is not None and step > self.end):
            return False
        return (step - self.begin) % self.frequency == 0

    @property
    def last(self) -> int:
        """The last step that is due; where there is no end, the first, from which nothing changes."""
        if self.end is None:
            return self.begin
        return self.end - (self.end - self.begin) % self.frequency

    @property
    def reached(self) -> float:
        """The sparsity at :attr:`last`, below :attr:`target` where the frequency does not meet the end."""
        return self(self.last)

    def _check(self) -> None:
        for name in ("begin", "end", "frequency"):
            value, least = getattr(self, name), 1 if name == "frequency" else 0
            if name == "end" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(
                    f"{type(self).__name__}: {name} is a number of steps, at least {least}, got {value!r}"
                )


@dataclass(frozen=True)
class Constant(Schedule):
    """The same sparsity from the first step on.

    Attributes:
        sparsity: share, 0 to 1.
    """

    sparsity: float
    begin: int = 0
    end: int | None = None
    frequency: int = 100

    def __post_init__(self) -> None:
        self._check()
        if self.end is not None and self.end < self.begin:
            raise InputError(f"Constant: end={self.end} is before begin={self.begin}")
        if not 0 <= self.sparsity <= 1:
            raise InputError(f"Constant: sparsity is a share, 0 to 1, got {self.sparsity}")

    def __call__(self, step: int) -> float:
        """See :class:`Schedule`."""
        return self.sparsity if step >= self.begin else 0.0

    @property
    def target(self) -> float:
        """See :class:`Schedule`."""
        return self.sparsity


@dataclass(frozen=True, kw_only=True)
class Rising(Schedule):
    """From one sparsity to another.

    Attributes:
        initial, final: shares, ``0 <= initial <= final <= 1``.
    """

    initial: float = 0.0
    final: float
    begin: int = 0
    end: int
    frequency: int = 100

    def __post_init__(self) -> None:
        self._check()
        kind = type(self).__name__
        if self.end <= self.begin:
            raise InputError(f"{kind}: end={self.end} is not after begin={self.begin}")
        if not 0 <= self.initial <= self.final <= 1:
            raise InputError(
                f"{kind}: sparsity rises from initial to final, two shares from 0 to 1 "
                f"(what went never comes back), got {self.initial} and {self.final}"
            )
        known = {field.name for field in fields(Rising)}
        for field in fields(self):
            if field.name not in known and not (isfinite(value := getattr(self, field.name)) and value > 0):
                raise InputError(f"{kind}: {field.name} is a finite number above 0, got {value}")

    def __call__(self, step: int) -> float:
        """See :class:`Schedule`."""
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return self.final
        return self.curve((step - self.begin) / (self.end - self.begin))

    @property
    def target(self) -> float:
        """See :class:`Schedule`."""
        return self.final

    @abstractmethod
    def curve(self, t: float) -> float:
        """The sparsity when a share ``t`` of the way from begin to end is done."""


@dataclass(frozen=True, kw_only=True)
class Polynomial(Rising):
    """Fast in the beginning, when there is much to take, and slow towards the end.

    Attributes:
        power: above 0; 1 is a straight line.
    """

    power: float = 3.0

    def curve(self, t: float) -> float:
        """See :class:`Rising`."""
        return polynomial(self.initial, self.final, t, self.power)


@dataclass(frozen=True, kw_only=True)
class Cubic(Rising):
    """:class:`Polynomial` with power 3."""

    def curve(self, t: float) -> float:
        """See :class:`Rising`."""
        return polynomial(self.initial, self.final, t)


@dataclass(frozen=True, kw_only=True)
class OneCycle(Rising):
    """An S: slow, fast and slow again, for one cycle of the learning rate.

    It starts a little above ``initial``: by ``(1 + e^(beta - alpha)) / (1 + e^beta)`` of the way, 0.25 %.

    Attributes:
        frequency: 1, other than elsewhere: the curve is followed step by step.
        alpha: how steep it is.
        beta: how late; half way lies near ``beta / alpha``.
    """

    frequency: int = 1
    alpha: float = 14.0
    beta: float = 6.0

    def curve(self, t: float) -> float:
        """See :class:`Rising`."""
        share = (1 + exp(self.beta - self.alpha)) / (1 + exp(self.beta - self.alpha * t))
        return self.initial + (self.final - self.initial) * share


@dataclass(frozen=True, kw_only=True)
class Exponential(Rising):
    """Each time the same share of what is left goes; ``final`` is below 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final == 1:
            raise InputError("Exponential: what is left never falls to 0; give a final sparsity below 1")

    def curve(self, t: float) -> float:
        """See :class:`Rising`."""
        return 1 - exponential(1 - self.initial, 1 - self.final, t)
