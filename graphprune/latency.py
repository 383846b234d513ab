"""Pruning to a latency: the plan that removes the least and whose artifact is measured to be fast enough.

Positions stand in one queue (:mod:`graphprune.budget`), and taking more of it gives a smaller network. For a
handful of points of the queue, the network is really pruned, rewritten by the lossless passes, lowered to the
target's runtime and timed in turns with the unpruned artifact; :mod:`graphprune.bracket` chooses the points.
Nothing is predicted, so the target must run on this host. Sizes decide and weights do not: a repair
afterwards keeps the latency.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from . import bracket
from .backend import Lowered, Runner
from .bracket import Goal, Probe, Samples
from .budget import PRICINGS
from .candidates import Candidates, Queue
from .errors import BackendError, InputError, TargetError
from .graph import Graph
from .lowering import candidates as backends_for
from .lowering import deploy
from .measure import interleaved
from .pipeline import LOSSLESS, Context, Pipeline
from .plan import Plan
from .target import Target, host_arch

TURN = 0.05  # seconds that a timed turn lasts at least: several slices of a processor that others use, too
CALLS = 5  # from which the length of a call is taken
PAUSE = 0.01  # seconds before a turn, for threads of the other session to stop spinning

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatencyRecord:
    """How a plan was found.

    Attributes:
        budget: as it was asked for.
        limit: the ratio to the unpruned network's latency that this came to.
        probes: everything that was measured, in order; the first is the unpruned network against itself.
        chosen: the confirmation of what was chosen.
        backend, threads: what ran it.
    """

    budget: str
    limit: float
    probes: tuple[Probe, ...]
    chosen: Probe
    backend: str
    threads: int | None

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for a report."""
        runs = f"{self.backend}, {'default' if self.threads is None else self.threads} threads"
        found, (noise, *others) = self.chosen, self.probes
        return (
            f"latency budget {self.budget}: measured {found.latency_ms:.3g} of {found.whole_ms:.3g} ms "
            f"({found.ratio.median:.3f}, at most {self.limit:.3f} asked) with {found.share:.3f} of the MACs, "
            f"on {runs}",
            f"noise: the unpruned artifact takes {noise.ratio.median:.3f} ({noise.ratio.low:.3f} to "
            f"{noise.ratio.high:.3f}) of itself, {noise.whole_ms:.3g} ms",
            *map(str, others),
        )


def solve(
    graph: Graph,
    budget: float | str,
    candidates: Candidates,
    target: Target,
    *,
    backend: str = "auto",
    threads: int | None = None,
    rounds: int = bracket.ROUNDS,
    probes: int = bracket.PROBES,
    tolerance: float = bracket.TOLERANCE,
    margin: float = bracket.MARGIN,
    measure: Callable[[Plan, int], Samples] | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Plan, LatencyRecord]:
    """The plan that takes the fewest steps of the queue and is measured to meet the budget.

    Args:
        graph: the network; it is measured on its example inputs.
        budget: a share of the unpruned artifact's latency (up to 1.0), or a time (``"5ms"``, ``"0.8s"``).
        candidates: what may go, in the target's alignment.
        target: what it is lowered for; must be this host.
        backend: a backend's name, or ``auto``.
        threads: of the runtime; ``None`` is its default.
        rounds, probes, tolerance, margin: see :func:`graphprune.bracket.search`.
        measure: (plan, rounds) → samples; by default lowers and times.
        progress: called with a line of text before each measurement.

    Raises:
        InputError: the budget is out of range, or cannot be reached; names the closest.
        TargetError: the target does not run on this host.
        BackendError: the runtime is missing, or cannot lower the network.
    """
    goal = Goal.parse(budget)
    used = backend
    if measure is None:
        bench = _Bench(graph, target, backend, threads)
        measure, used = bench, bench.backend.name
    queue = _queue(candidates, goal.share or 0.5)
    say = progress or log.debug

    def sample(count: int, rounds: int) -> Samples:
        share = queue.totals(count)["macs"] / max(1, queue.totals(0)["macs"])
        say(f"measure latency with {share:.3f} of the MACs, {rounds} rounds")
        return measure(queue.plan(count), rounds)

    found, history = bracket.search(
        sample, lambda count: queue.totals(count)["macs"], len(queue), goal,
        first=queue.forced, rounds=rounds, probes=probes, tolerance=tolerance, margin=margin,
    )  # fmt: skip
    limit = goal.share if goal.share is not None else (goal.ms or 0.0) / found.whole_ms
    return queue.plan(found.count), LatencyRecord(goal.text, limit, history, found, used, threads)


def _queue(candidates: Candidates, share: float) -> Queue:
    """The steps in order; scores that are costs are weighed against the MACs they save near that share."""
    wanted = {"macs": 1.0}  # only which budget it is matters here, not how much
    queue = candidates.queue({}, wanted)
    for _ in range(PRICINGS if candidates.priced else 0):
        count = queue.first(partial(_down_to, queue, share))
        queue = candidates.queue(queue.sizes(count), wanted)
    return queue


def _down_to(queue: Queue, share: float, count: int) -> bool:
    return queue.totals(count)["macs"] <= share * queue.totals(0)["macs"]


@dataclass
class _Bench:
    """Lowers plans and times them against the unpruned artifact, in turns within this process."""

    graph: Graph
    target: Target
    named: str
    threads: int | None
    lowered: dict[Any, Lowered] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.target.runs_here:
            raise TargetError(
                f"a latency budget is measured, and target {self.target.name!r} is {self.target.arch} while "
                f"this host is {host_arch()}; prune on such a host, or give a budget of macs"
            )
        if self.graph.is_meta:
            raise InputError("a latency budget is measured, and the weights are on the meta device")
        tried = backends_for(self.named, self.target)
        first = deploy(self._lossless(self.graph), self.target, tried[0], calls={}, verify=False)
        self.backend = first.backend
        reason = first.unrunnable or self.backend.unrunnable(self.target)
        if reason:
            raise BackendError(f"a latency budget is measured, and the artifact does not run here: {reason}")
        self.lowered[()] = first.lowered
        self.whole = self._open(first.lowered)

    def __call__(self, plan: Plan, rounds: int) -> Samples:
        key = tuple(sorted(plan.removed.items()))
        if key not in self.lowered:
            small = self._lossless(self.graph.apply(plan))
            self.lowered[key] = self.backend.lower(small, self.target)
        # A session of its own each time: where its memory lies makes a difference of some percent.
        pruned = self._open(self.lowered[key])
        # Turns of one length: in a shorter one, fewer slices of the processor go to others.
        ours, theirs = self._repeat(pruned), self._repeat(self.whole)
        timings = interleaved(
            {
                "pruned": partial(self._turn, pruned, ours),
                "whole": partial(self._turn, self.whole, theirs),
            },
            rounds=rounds,
            pause=0.0 if self.threads == 1 else PAUSE,
        )
        return (
            [ms / ours for ms in timings["pruned"].samples],
            [ms / theirs for ms in timings["whole"].samples],
        )

    def _lossless(self, graph: Graph) -> Graph:
        return Pipeline.parse(LOSSLESS).run(graph, Context(self.target)).graph

    def _open(self, lowered: Lowered) -> Runner:
        return self.backend.open(lowered.files, lowered.inputs, lowered.outputs, self.target, self.threads)

    def _turn(self, runner: Runner, repeat: int) -> None:
        for _ in range(repeat):
            runner(*self.graph.examples)

    def _repeat(self, runner: Runner) -> int:
        """How many calls a turn takes."""
        fastest = min(self._once(runner) for _ in range(CALLS))
        return max(1, round(TURN / fastest))

    def _once(self, runner: Runner) -> float:
        start = time.perf_counter()
        runner(*self.graph.examples)
        return max(time.perf_counter() - start, 1e-6)
