"""Artifacts timed against each other, when a build depends on the answer.

Where a runtime's memory happens to lie makes one and the same artifact a few percent faster or slower, and
that stays until it is opened again; turns alone cannot tell it from a slower network. So the measurement is
split into sittings: in each, everything is opened anew, in another order, and takes turns as in
:mod:`graphprune.measure`. The samples are pooled, so that the spread holds what opening changes, too.

>>> slow, fast = lambda: (lambda: sum(range(40_000))), lambda: (lambda: sum(range(10_000)))
>>> from graphprune.measure import ratio
>>> timings = in_sittings({"slow": slow, "fast": fast}, rounds=8, sittings=2, turn=0.002)
>>> ratio(timings["slow"], timings["fast"]).median > 1
True
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .errors import InputError
from .measure import Timing, interleaved

SITTINGS = 4
TURN = 0.05  # seconds that a turn lasts at least: several slices of a processor that others use, too
CALLS = 5  # from which the length of a call is taken
PAUSE = 0.01  # seconds before a turn, for threads of another runtime to stop spinning

Factories = Mapping[str, Callable[[], Callable[[], Any]]]
"""Name → what opens a candidate and returns a call of it."""


def in_sittings(
    factories: Factories,
    *,
    rounds: int = 40,
    sittings: int = SITTINGS,
    turn: float = TURN,
    threads: int | None = None,
    pause: float = PAUSE,
) -> dict[str, Timing]:
    """Time candidates in turns within this process, opened anew in every sitting.

    Args:
        factories: name → opens a candidate and returns a call without arguments.
        rounds: turns of each, over all sittings.
        sittings: how often each is opened, at most once a round.
        turn: seconds that a turn lasts at least; the call is repeated until then.
        threads: torch's intra-operator threads meanwhile.
        pause: seconds of rest before a turn, where there is more than one thread.

    Returns:
        Milliseconds a call, a sample for each turn.

    Raises:
        InputError: there is no candidate, or a number makes no sense.
    """
    if sittings < 1 or not turn >= 0:
        raise InputError(f"cannot measure with sittings={sittings}, turn={turn}")
    count = min(sittings, max(rounds, 1))
    samples: dict[str, list[float]] = {name: [] for name in factories}
    used = threads or 0
    for sitting in range(count):
        share = rounds // count + (sitting < rounds % count)
        order = list(factories) if sitting % 2 == 0 else list(factories)[::-1]
        calls = {name: factories[name]() for name in order}
        repeats = {name: repeats_of(call, turn) for name, call in calls.items()}
        timings = interleaved(
            {name: partial(one_turn, calls[name], repeats[name]) for name in order},
            rounds=share,
            warmup=1,
            threads=threads,
            pause=0.0 if threads == 1 else pause,
        )
        for name, timing in timings.items():
            samples[name] += [ms / repeats[name] for ms in timing.samples]
            used = timing.threads
    return {name: pooled(values, used) for name, values in samples.items()}


def repeats_of(call: Callable[[], Any], turn: float) -> int:
    """How many calls a turn of so many seconds takes."""
    fastest = math.inf
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        fastest = min(fastest, max(time.perf_counter() - start, 1e-6))
    return max(1, round(turn / fastest))


def one_turn(call: Callable[[], Any], repeats: int) -> None:
    """What is timed: a call, so many times."""
    for _ in range(repeats):
        call()


def pooled(samples: Sequence[float], threads: int) -> Timing:
    """Samples in milliseconds as a :class:`~graphprune.measure.Timing`."""
    low, median, high = statistics.quantiles(
        [*samples] * 2 if len(samples) == 1 else samples, n=4, method="inclusive"
    )
    return Timing(median, low, high, len(samples), threads, tuple(samples))
