"""The fastest of several artifacts, by measuring them in turns on this host.

What is timed is what was built, on the caller's example inputs and number of threads; everything is opened
anew in every sitting (:mod:`graphprune.sittings`). The first candidate is the target's default, and stays
where another one's advantage is small and within the spread, or not certain: a build should not change its
runtime with the weather. Who is certainly behind after a sitting is measured no more, and is compared on the
turns that it took; where the host is so noisy that two sittings do not tell candidates apart, there are more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .lowering import Deployment, opened
from .measure import Ratio, Timing, ratio
from .sittings import in_sittings, pooled

SITTINGS = 2
MOST = 3  # times as many where noise hides which is faster
TURN = 0.06  # seconds, several runs: the first finds its weights driven out of the caches
# Seconds before a turn, for threads of other runtimes to stop spinning. With 0.01, OpenVINO on both cores of
# a host of two took 8.4 ms a run beside ONNX Runtime and ExecuTorch in one process; with this, and alone, 6.
PAUSE = 0.1
SMALL = 1.05  # what two openings of one artifact differ by
FEW = 4  # turns, below which their spread says nothing


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
        rounds: turns of each, over two sittings; half of them for one that is far behind in the first, up to
            :data:`MOST` times as many where that does not tell them apart.
        measure: as :func:`graphprune.sittings.in_sittings`.

    Raises:
        InputError: there is no candidate, or no round.
    """
    samples: dict[str, list[float]] = {name: [] for name in openers}
    close, share = list(openers), math.ceil(rounds / SITTINGS)
    for sitting in range(1, SITTINGS * MOST + 1):
        again = {name: openers[name] for name in (close if sitting % 2 else close[::-1])}
        measured = measure(again, rounds=share, sittings=1, turn=TURN, threads=threads, pause=PAUSE)
        for name, timing in measured.items():
            samples[name] += timing.samples
        used = next(iter(measured.values())).threads
        timings = {name: pooled(values, used) for name, values in samples.items()}
        # Of those that took every turn: the host may have been faster when another one was timed last.
        best = min(close, key=lambda name: timings[name].median_ms)
        behind = {name: _to(timings[name], timings[best]) for name in openers}
        uncertain = {name: _uncertainty(behind[name], timings[name].rounds) for name in openers}
        close = [name for name in close if behind[name].median - uncertain[name] <= SMALL]
        certain = all(uncertain[name] <= SMALL - 1 for name in close)
        if len(close) <= 1 or (certain and sitting >= SITTINGS):
            break
    chosen = next(name for name in openers if _stays(behind[name], uncertain[name]))
    return tuple(
        Contestant(name, timings[name], _to(timings[name], timings[chosen]), name == chosen)
        for name in sorted(openers, key=lambda name: behind[name].median)
    )


def _stays(behind: Ratio, uncertain: float) -> bool:
    small = behind.low <= 1 and behind.median <= SMALL
    return small or behind.median - uncertain <= 1


def _uncertainty(found: Ratio, turns: int) -> float:
    """How far the true median may be from the one found, by the rule of notched box plots.

    Source: McGill, Tukey and Larsen, *Variations of Box Plots*, The American Statistician 32 (1978).
    """
    return 1.57 * (found.high - found.low) / math.sqrt(turns) if turns >= FEW else math.inf


def _to(one: Timing, other: Timing) -> Ratio:
    """The ratio of the turns that both took."""
    both = min(one.rounds, other.rounds)
    return ratio(pooled(one.samples[:both], one.threads), pooled(other.samples[:both], other.threads))


def opener(
    one: Deployment, flat: Sequence[torch.Tensor], threads: int | None
) -> Callable[[], Callable[[], Any]]:
    """What :func:`fastest` opens of a deployment; ``flat`` are the inputs of a call."""

    def call() -> Callable[[], Any]:
        return partial(opened(one.backend, one.lowered, one.target, threads), *flat)

    return call
