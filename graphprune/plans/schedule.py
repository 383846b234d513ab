"""How a budget is reached in several steps: what share of the cost is left after each.

With ``r`` the share that is to be left and ``t = i / steps``:

=============== =======================================================================================
``constant``    ``r`` from the first step on; later steps remove nothing and only train
``linear``      ``1 - (1 - r) t``
``polynomial``  ``r + (1 - r) (1 - t)^3`` (Zhu and Gupta, *To Prune, or Not to Prune*, 2017, eq. 1)
``exponential`` ``r^t``: every step leaves the same share of what the one before it left
=============== =======================================================================================

>>> [round(share, 3) for share in shares(0.5, 4, "polynomial")]
[0.711, 0.562, 0.508, 0.5]
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import InputError, suggestion


def polynomial(first: float, last: float, t: float, power: float = 3.0) -> float:
    """From ``first`` at ``t = 0`` to ``last`` at 1, the faster in the beginning the larger the power.

    >>> polynomial(0.0, 0.8, 0.5), polynomial(0.0, 0.8, 1.0)
    (0.7000000000000001, 0.8)
    """
    return last + (first - last) * (1 - t) ** power


def exponential(first: float, last: float, t: float) -> float:
    """From ``first`` at ``t = 0`` to ``last`` at 1, by the same factor over every stretch of equal length.

    >>> exponential(1.0, 0.25, 0.5)
    0.5
    """
    return first * (last / first) ** t


_CURVES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda r, t: r,
    "linear": lambda r, t: polynomial(1.0, r, t, 1.0),
    "polynomial": lambda r, t: polynomial(1.0, r, t),
    "exponential": lambda r, t: exponential(1.0, r, t),
}
SCHEDULES = tuple(_CURVES)


def shares(remaining: float, steps: int, schedule: str) -> list[float]:
    """What share of the original cost is left after each step.

    Args:
        remaining: the share after the last step, above 0 and at most 1.
        steps: how many, at least 1.
        schedule: one of :data:`SCHEDULES`.

    Raises:
        InputError: an argument is out of range.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(f"steps must be a whole number, at least 1, got {steps!r}")
    if schedule not in _CURVES:
        raise InputError(
            f"unknown schedule {schedule!r}{suggestion(str(schedule), SCHEDULES)}; "
            f"known: {', '.join(SCHEDULES)}"
        )
    if not 0 < remaining <= 1:
        raise InputError(f"the share that is to be left must be above 0 and at most 1, got {remaining}")
    curve = _CURVES[schedule]
    return [curve(remaining, i / steps) for i in range(1, steps)] + [remaining]
