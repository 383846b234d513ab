"""The fastest of several artifacts, by measuring them in turns on this host.

What is timed is what was built, on the caller's example inputs and number of threads; everything is opened
anew in every sitting (:mod:`graphprune.sittings`). The first candidate is the target's default, and stays
where another one's advantage is within the spread: a build should not change its runtime with the weather.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .lowering import Deployment
from .measure import Ratio, Timing, ratio
from .sittings import in_sittings

SITTINGS = 2
TURN = 0.02  # seconds


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
    deployments: Sequence[Deployment],
    flat: Sequence[torch.Tensor],
    *,
    threads: int | None = None,
    rounds: int = 20,
    measure: Callable[..., Mapping[str, Timing]] = in_sittings,
) -> tuple[int, tuple[Contestant, ...]]:
    """Which deployment to keep.

    Args:
        deployments: of different backends, all runnable here; the preferred one first.
        flat: the inputs of a call.
        measure: as :func:`graphprune.sittings.in_sittings`.

    Returns:
        Its index, and all of them as measured, the fastest first.
    """
    if len(deployments) == 1:
        return 0, ()
    factories = {one.backend.name: partial(_opened, one, flat, threads) for one in deployments}
    timings = measure(factories, rounds=rounds, sittings=SITTINGS, turn=TURN, threads=threads)
    names = list(factories)
    quickest = min(names, key=lambda name: timings[name].median_ms)
    level = [name for name in names if ratio(timings[name], timings[quickest]).low <= 1]
    chosen = level[0]
    found = [
        Contestant(name, timings[name], ratio(timings[name], timings[chosen]), name == chosen)
        for name in sorted(names, key=lambda name: timings[name].median_ms)
    ]
    return names.index(chosen), tuple(found)


def _opened(one: Deployment, flat: Sequence[torch.Tensor], threads: int | None) -> Callable[[], Any]:
    lowered = one.lowered
    runner = one.backend.open(lowered.files, lowered.inputs, lowered.outputs, one.target, threads)
    return partial(runner, *flat)
