"""Tuning: the schedules of a network's products measured on this machine, and kept.

    from graphprune.backends.tvm_tuning import tune
    tuned = tune(graph, target, seconds=600)

``graphprune tune --backend tvm MODEL`` does that to the graph which ``optimize`` lowers.

What is searched is the small space of each template (:mod:`graphprune.backends.tvm_schedules`), not the
open one of MetaSchedule: a template's worst candidate is faster than what MetaSchedule found for a
convolution in as long as a whole network takes here. Candidates are compiled and timed in a child process
(:mod:`graphprune.backends.tvm_child`), each result is on the disk before the next is begun
(:mod:`graphprune.backends.tvm_database`), and what the database has is not measured again: tuning that was
killed goes on where it stood. A candidate that crashes is tried once more in a later run, and a run in which
nothing runs keeps no crashes: what is wrong then is the machine. ``lower`` finds the results by itself.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from graphprune.errors import BackendError
from graphprune.graph import Graph
from graphprune.target import Target, host_arch

from .tvm_child import Child
from .tvm_database import Database, Measured, cache_file, workload
from .tvm_import import imported
from .tvm_machine import machine
from .tvm_package import cores
from .tvm_pipeline import fused, tasks
from .tvm_schedules import Knobs
from .tvm_search import Search

HOPELESS = 12  # candidates of a function that all fail in a run before it is given up
FINALISTS, FINAL_ROUNDS = 4, 30
SLOW = 1.6  # a candidate this much slower than the best is timed once


@dataclass(frozen=True)
class Progress:
    """Where tuning stands.

    Attributes:
        seconds, budget: since it began, and how many there are.
        tried, valid: candidates timed now or before, and how many of them ran.
        ms: sum of the best times of the products, each as often as it is called; ``None`` until all have one.
        task: the function whose candidate was timed.
        crashes: how often the child process had to be started again.
    """

    seconds: float
    budget: float
    tried: int
    valid: int
    ms: float | None
    task: str
    crashes: int


@dataclass(frozen=True)
class Tuned:
    """What came out.

    Attributes:
        searches: what is known of every product.
        curve: (seconds, sum of best times in ms), whenever the sum fell.
        crashes: of the child process.
        warnings: what could not be read of the database.
    """

    searches: tuple[Search, ...]
    curve: tuple[tuple[float, float], ...]
    crashes: int
    warnings: tuple[str, ...] = ()


def tune(
    graph: Graph,
    target: Target,
    *,
    seconds: float,
    database: Path | None = None,
    threads: int | None = None,
    rebuild: bool = False,
    progress: Callable[[Progress], None] | None = None,
    seed: int = 0,
) -> Tuned:
    """Measure schedules for the products of ``graph`` until the time is up or all are measured.

    Args:
        graph: as it will be lowered: a batch norm that is folded later makes other functions.
        target: of this host's architecture.
        seconds: the budget. The default schedule of every product is measured even beyond it.
        database: file to keep results in; ``None`` is the one that ``lower`` reads.
        threads: of each candidate; ``None`` is one per core.
        rebuild: first remove what was measured for this graph's products on this machine with as many
            threads, so that they are measured anew; what other networks and machines have stays.
        progress: told after every candidate.
        seed: of the order of candidates.

    Raises:
        BackendError: the target is not this host, the graph has nothing to tune, or no candidate of some
            product ran, or none at all did now; says which and why. What was found for the others is kept.
        ArtifactError: the database cannot be written.
    """
    if target.arch != host_arch():
        raise BackendError(
            f"schedules are measured on the machine they are for: target {target.name!r} is {target.arch}, "
            f"this host is {host_arch()}; tune there, and copy {database or cache_file()}"
        )
    made_for = machine(target)
    count = threads or cores()
    store = Database(made_for, database or cache_file())
    searches = [
        Search(task, workload(task.function), made_for, random.Random(seed))
        for task in tasks(fused(imported(graph), made_for))
        if task.work is not None
    ]
    if not searches:
        raise BackendError("the graph has no convolution or linear with constant weights, so nothing to tune")
    store.prepare()
    if rebuild:
        store.forget({search.key for search in searches}, count)
    known = store.read()
    for search in searches:
        search.recall(known.measured.get(search.key, ()), count)
    with Child(made_for, count) as child:
        run = _Run(searches, store, child, count, seconds, progress or (lambda _: None))
        run.search()
        run.final()
    _fail_if_none(searches)
    if len(run.crashed) >= HOPELESS:
        raise BackendError(
            f"the process that times candidates crashed at each of {len(run.crashed)} "
            f"({run.crashed[-1][1].reason}); what was found before is kept"
        )
    return Tuned(tuple(searches), tuple(run.curve), child.crashes, known.warnings(store.path))


class _Run:
    """The loop over candidates."""

    def __init__(
        self, searches: list[Search], store: Database, child: Child, threads: int, budget: float,
        progress: Callable[[Progress], None],
    ):  # fmt: skip
        self.searches, self.store, self.child, self.threads = searches, store, child, threads
        self.budget, self.progress = budget, progress
        self.start = time.monotonic()
        self.curve: list[tuple[float, float]] = []
        self._ran = False
        self.crashed: list[tuple[Search, Measured]] = []  # until something runs, then kept

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def search(self) -> None:
        """Candidate after candidate, where most may be won."""
        while True:
            left = [s for s in self.searches if s.open and (s.ran or s.failed < HOPELESS)]
            first = [s for s in left if not s.valid]
            if sum(s.failed for s in first) >= HOPELESS and not any(s.valid for s in self.searches):
                return  # nothing runs, whatever the function: it is not the candidates
            if not left or (self.seconds >= 0.9 * self.budget and not first):
                return
            chosen = max(first or left, key=lambda s: s.promise)
            knobs = chosen.next([s.best[0] for s in self.searches if s.best and _alike(s, chosen)])
            best = chosen.best
            self._time(chosen, [knobs], SLOW * best[1] if best else None)

    def final(self) -> None:
        """The best few of each product once more, in turns: the fastest of many is partly the luckiest."""
        for search in sorted(self.searches, key=lambda s: -s.promise if s.valid else 0.0):
            timed = sorted((ms, i, k) for i, (k, ms) in enumerate(search.tried.items()) if ms is not None)
            if len(timed) < 2 or self.seconds >= self.budget:
                continue
            finalists = [knobs for _, _, knobs in timed[:FINALISTS]]
            self._time(search, finalists, None, FINAL_ROUNDS)

    def _time(
        self, search: Search, knobs: list[Knobs], worst: float | None, rounds: int | None = None
    ) -> None:
        function, before = self.child.keep(search.key, search.task.function), self.child.crashes
        times, reasons = self.child.times(function, knobs, worst, rounds)
        crashed, sure = self.child.crashes > before, rounds is not None
        for one, ms, reason in zip(knobs, times, reasons, strict=True):
            self._keep(search, Measured(one, ms, self.threads, sure, crashed, reason))

    def _keep(self, search: Search, value: Measured) -> None:
        self._ran = self._ran or value.ms is not None
        if value.crashed:
            self.crashed.append((search, value))
        else:
            self.store.add(search.task, search.key, value)
        if self._ran:
            for of, crash in self.crashed:
                self.store.add(of.task, of.key, crash)
            self.crashed.clear()
        search.learn(value.knobs, value.ms, value.reason)
        total = total_ms(self.searches)
        if total is not None and (not self.curve or total < self.curve[-1][1]):
            self.curve.append((self.seconds, total))
        tried = sum(len(s.tried) for s in self.searches)
        valid = sum(s.valid for s in self.searches)
        self.progress(
            Progress(self.seconds, self.budget, tried, valid, total, search.task.name, self.child.crashes)
        )


def total_ms(searches: list[Search] | tuple[Search, ...]) -> float | None:
    """The products' best times, each as often as it is called; ``None`` while one has none."""
    best = [(s.task.calls, s.best) for s in searches]
    return None if any(b is None for _, b in best) else sum(calls * b[1] for calls, b in best if b)


def _alike(one: Search, other: Search) -> bool:
    """Whether two functions differ only in what was fused behind them."""
    return one is not other and one.task.work == other.task.work


def _fail_if_none(searches: list[Search]) -> None:
    barren = [s for s in searches if not s.valid]
    if barren:
        reasons = "; ".join(
            f"{s.task.name}: {s.reasons[-1] if s.reasons else 'none tried'}" for s in barren[:3]
        )
        raise BackendError(
            f"tuning found no candidate that runs for {len(barren)} of {len(searches)} products ({reasons}); "
            "what was found for the others is kept"
        )
