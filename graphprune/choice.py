"""The fastest of several artifacts, by measuring them in turns on this host.

What is timed is what was built, on the caller's example inputs and number of threads; everything is opened
anew in every sitting (:mod:`graphprune.sittings`). The first candidate is the target's default, and stays
where another one's advantage is small and within the spread: a build should not change its runtime with the
weather.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .lowering import Deployment, opened
from .measure import Ratio, Timing, ratio
from .sittings import in_sittings

SITTINGS = 2
TURN = 0.02  # seconds
SMALL = 1.05  # what two openings of one artifact differ by


@dataclass(frozen=True)
class Contestant:
    """One candidate as it was measured.

    Attributes:
        backend: its name.
        timing: ms a call.
        to_chosen: how many times as long as the chosen one it takes, turn by turn.
        chosen: whether it was taken.
    """

    backend: str
    timing: Timing
    to_chosen: Ratio
    chosen: bool


def fastest(
    openers: Mapping[str, Callable[[], Callable[[], Any]]],
    *,
    threads: int | None = None,
    rounds: int = 20,
    measure: Callable[..., Mapping[str, Timing]] = in_sittings,
) -> tuple[Contestant, ...]:
    """All candidates as measured, the fastest first; one of them is chosen.

    Args:
        openers: name → opens the artifact and returns a call of it; the preferred one first.
        threads: torch's intra-operator threads meanwhile; runtimes are opened with their own.
        measure: as :func:`graphprune.sittings.in_sittings`.

    Raises:
        InputError: there is no candidate.
    """
    timings = measure(openers, rounds=rounds, sittings=SITTINGS, turn=TURN, threads=threads)
    names = sorted(openers, key=lambda name: timings[name].median_ms)
    behind = {name: ratio(timings[name], timings[names[0]]) for name in openers}
    chosen = next(name for name in openers if behind[name].low <= 1 and behind[name].median <= SMALL)
    return tuple(
        Contestant(name, timings[name], ratio(timings[name], timings[chosen]), name == chosen)
        for name in names
    )


def opener(
    one: Deployment, flat: Sequence[torch.Tensor], threads: int | None
) -> Callable[[], Callable[[], Any]]:
    """What :func:`fastest` opens of a deployment; ``flat`` are the inputs of a call."""

    def call() -> Callable[[], Any]:
        return partial(opened(one.backend, one.lowered, one.target, threads), *flat)

    return call
