"""Plans, really applied: pruned, rewritten by the lossless passes, lowered, opened and timed.

Each is timed in turns with the unpruned artifact, in this process, as the caller's target, backend and number
of threads have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..axes.terms import Atom
from ..backend import Lowered, Runner
from ..errors import BackendError, InputError, TargetError
from ..graph import Graph
from ..lowering import candidates as backends_for
from ..lowering import deploy, opened
from ..measure import interleaved
from ..pipeline import LOSSLESS, Context, Pipeline
from ..plans.plan import Plan
from ..sittings import PAUSE, TURN, one_turn, repeats_of
from ..target import Target, host_arch
from .goal import Samples
from .stopwatch import Stopwatch
from .table import IN_MEMORY, Machine, Table
from .tuning import Outlook


@dataclass
class Bench:
    """Lowers plans and times them against the unpruned artifact, in turns within this process.

    Raises:
        TargetError: the target does not run on this host.
        InputError: the weights have no values.
        BackendError: the runtime is missing, or cannot lower the network.
    """

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
        """Milliseconds of the plan's network and of the unpruned one, a pair for each round."""
        key = tuple(sorted(plan.removed.items()))
        if key not in self.lowered:
            small = self._lossless(self.graph.apply(plan))
            self.lowered[key] = self.backend.lower(small, self.target)
        # A session of its own each time: where its memory lies makes a difference of some percent.
        pruned = partial(self._open(self.lowered[key]), *self.graph.examples)
        whole = partial(self.whole, *self.graph.examples)
        # Turns of one length: in a shorter one, fewer slices of the processor go to others.
        ours, theirs = repeats_of(pruned, TURN), repeats_of(whole, TURN)
        timings = interleaved(
            {"pruned": partial(one_turn, pruned, ours), "whole": partial(one_turn, whole, theirs)},
            rounds=rounds,
            pause=0.0 if self.threads == 1 else PAUSE,
        )
        return (
            [ms / ours for ms in timings["pruned"].samples],
            [ms / theirs for ms in timings["whole"].samples],
        )

    def outlook(self, widths: Mapping[Atom, Sequence[int]]) -> tuple[Outlook, str]:
        """The network's latency model on this machine's table, and what is to be said of the table.

        Args:
            widths: as :class:`~graphprune.latency.model.LatencyModel` takes them.

        Raises:
            ArtifactError: the table is damaged or another machine's.
        """
        versions = self.lowered[()].versions
        machine = Machine.here(self.backend.name, versions, self.threads, self.target)
        try:
            table = Table.open(machine)
            where = str(table.path)
        except OSError as error:
            table = Table.open(machine, IN_MEMORY)
            where = f"memory only, as the cache cannot be used ({error.strerror or error})"
        watch = Stopwatch(table, self.backend, self.target, self.threads)
        return Outlook(self.graph, widths, watch), where

    def _lossless(self, graph: Graph) -> Graph:
        return Pipeline.parse(LOSSLESS).run(graph, Context(self.target)).graph

    def _open(self, lowered: Lowered) -> Runner:
        return opened(self.backend, lowered, self.target, self.threads)
