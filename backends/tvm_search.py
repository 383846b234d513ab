"""Which candidate to time next: of which function, and with which knobs.

Within a function, the default schedule comes first, then schedules that differ from the best ones in one
knob, and now and then any other. Among functions, the next candidate goes where a share of the network's
time may still be
won: calls × best time, divided by how long nothing better was found.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .tvm_database import Measured
from .tvm_machine import Machine
from .tvm_pipeline import Task
from .tvm_schedules import Knobs, default, space

ANYWHERE = 0.25  # share of candidates that are drawn from the whole space
NEAR = 4  # so many of the best have neighbours tried
CRASHES = 2  # runs in which a candidate crashes before it is left alone


@dataclass
class Search:
    """What is known of one function's schedules.

    Attributes:
        task, key: the function, and its name in the database.
        tried: knobs → milliseconds, ``None`` for what did not work.
        stale: candidates since the best was found.
        ran, failed: how many candidates worked in this run, and how many did not.
        reasons: why candidates did not work.
    """

    task: Task
    key: str
    machine: Machine
    random: random.Random
    tried: dict[Knobs, float | None] = field(default_factory=dict)
    stale: int = 0
    ran: int = 0
    failed: int = 0
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.task.work is not None
        self.default = default(self.task.work, self.machine)
        self.space = list(dict.fromkeys([self.default, *space(self.task.work, self.machine)]))

    @property
    def valid(self) -> int:
        """How many candidates have a time."""
        return sum(ms is not None for ms in self.tried.values())

    @property
    def best(self) -> tuple[Knobs, float] | None:
        """The fastest so far, and its time in ms."""
        timed = [(knobs, ms) for knobs, ms in self.tried.items() if ms is not None]
        return min(timed, key=lambda pair: pair[1]) if timed else None

    @property
    def open(self) -> bool:
        """Whether there is anything left to try."""
        return len(self.tried) < len(self.space)

    @property
    def promise(self) -> float:
        """How much time of the network may be won here, in arbitrary units."""
        if self.best is None:
            return float("inf")
        return self.task.calls * self.best[1] / (4 + self.stale)

    def next(self, hints: Sequence[Knobs] = ()) -> Knobs:
        """The next candidate; there must be one. ``hints`` are good elsewhere, and tried first."""
        for knobs in (self.default, *hints):
            if knobs not in self.tried and knobs in self.space:
                return knobs
        unseen = [knobs for knobs in self.space if knobs not in self.tried]
        if self.random.random() >= ANYWHERE:
            timed = [(ms, knobs) for knobs, ms in self.tried.items() if ms is not None]
            best = [knobs for _, knobs in sorted(timed, key=lambda pair: pair[0])[:NEAR]]
            near = [knobs for knobs in unseen if any(_steps(knobs, b) <= 1 for b in best)]
            unseen = near or unseen
        return self.random.choice(unseen)

    def learn(self, knobs: Knobs, ms: float | None, reason: str = "") -> None:
        """Take in a time."""
        better = ms is not None and (self.best is None or ms < self.best[1])
        if ms is not None or knobs not in self.tried:  # what ran once, and failed among finalists, did run
            self.tried[knobs] = ms
        self.stale = 0 if better else self.stale + 1
        self.ran += ms is not None
        self.failed += ms is None
        if reason:
            self.reasons.append(reason)

    def recall(self, values: Sequence[Measured], threads: int) -> None:
        """Take in what the database has, as far as it was measured with as many threads.

        What crashed is tried again until it has crashed in :data:`CRASHES` runs: it may have been the
        machine.
        """
        of_space = set(self.space)
        crashes: Counter[Knobs] = Counter()
        for value in values:
            if value.threads != threads or value.knobs not in of_space:
                continue
            before = self.tried.get(value.knobs)
            known = [ms for ms in (before, value.ms) if ms is not None]
            crashes[value.knobs] += value.crashed
            if known or not value.crashed or crashes[value.knobs] >= CRASHES:
                self.tried[value.knobs] = min(known, default=None)
            if value.reason:
                self.reasons.append(f"{value.reason}, in an earlier run")


def _steps(one: Knobs, other: Knobs) -> int:
    """In how many respects two schedules differ; the tile is one, and where the copy is made and how far
    another."""
    tile = (one.channels, one.rows, one.columns) != (other.channels, other.rows, other.columns)
    copy = (one.pad, one.chunk // one.rows) != (other.pad, other.chunk // other.rows)
    return tile + copy + (one.order != other.order) + (one.unroll != other.unroll)
