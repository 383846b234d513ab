"""Filling the table of operator latencies: for a plan that is being made, or ahead of time.

What is missing is measured in an order that makes any amount of it useful: first every operator as it is,
then at about half its width, then at the widths around those that pruning comes by; the largest first. Each
time is kept at once. So a run can be stopped, killed or given a time, and the next one goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..axes.terms import Atom
from ..backend import Backend
from ..blocks import Sizes
from ..errors import ArtifactError, BackendError, InputError, TargetError
from ..graph import Graph
from ..lowering import candidates as backends_for
from ..original import Original
from ..pipeline import LOSSLESS, Context, Pipeline
from ..plans.candidates import Candidates, Limits
from ..target import Target, get, host_arch
from ..threads import checked
from .model import FINE, HALF, WHOLE, LatencyModel, Wanted
from .stopwatch import Stopwatch, nothing
from .table import Machine, Table

Progress = Callable[[float, float, str], None]
"""Called with what is done (operators measured, or seconds), how much there is, and what comes next."""

SHARES = (0.8, 0.65, 0.5, 0.4, 0.3, 0.2)  # of the MACs: where the table is filled ahead of time
STAGES = ((WHOLE, False), (HALF, True), (FINE, True))  # grid, and whether around smaller sizes as well


@dataclass(frozen=True)
class Filled:
    """What a filling came to.

    Attributes:
        measured: operators that were timed.
        missing: operators that are wanted still, as the time was out.
        refused: label of a block → why the runtime does not run it alone.
        seconds: how long it took.
    """

    measured: int
    missing: int
    refused: Mapping[str, str]
    seconds: float


@dataclass(frozen=True)
class Tuned:
    """What :func:`tune` did.

    Attributes:
        machine: whose table it is.
        path: its file.
        entries: how many it has now.
        filled: what was measured.
    """

    machine: Machine
    path: Path
    entries: int
    filled: Filled

    @property
    def lines(self) -> list[str]:
        """What a reader wants to know."""
        filled = self.filled
        late = f"; {filled.missing} are left, run it again to go on" if filled.missing else ""
        return [
            f"measured {filled.measured} operators in {filled.seconds:.0f} s{late}",
            *(f"not measured alone: {reason}" for reason in dict.fromkeys(filled.refused.values())),
            f"machine: {self.machine}",
            f"table: {self.path} with {self.entries} times",
        ]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "machine": asdict(self.machine), "table": str(self.path), "entries": self.entries,
            "measured": self.filled.measured, "missing": self.filled.missing,
            "refused": sorted(set(self.filled.refused.values())), "seconds": self.filled.seconds,
        }  # fmt: skip


class Outlook:
    """A network's latency model on a table, and the stopwatch that fills the gaps."""

    def __init__(self, graph: Graph, widths: Mapping[Atom, Sequence[int]], stopwatch: Stopwatch):
        self.stopwatch, self.table = stopwatch, stopwatch.table
        self._times: dict[str, float] = {}
        self._refused: dict[str, str] = {}
        self.model = LatencyModel(graph, widths, self._known, stopwatch.nothing)

    def fill(
        self, points: Iterable[Sizes], *, seconds: float | None = None, progress: Progress | None = None
    ) -> Filled:
        """Measure what predictions at these sizes want and the table lacks, as far as the time goes."""
        begun, done, measured = time.monotonic(), 0, 0
        points = [{}, *points]
        stages = [(points if smaller else points[:1], grid) for grid, smaller in STAGES]
        total = len({want.text for around, grid in stages for want in self._wanted(around, grid)})
        for around, grid in stages:
            for want in self._wanted(around, grid):
                if seconds is not None and time.monotonic() - begun >= seconds:
                    return Filled(measured, total - done, dict(self._refused), time.monotonic() - begun)
                if progress is not None:
                    progress(done, total, want.block.label)
                done += 1
                measured += self._measure(want)
        return Filled(measured, 0, dict(self._refused), time.monotonic() - begun)

    def _measure(self, want: Wanted) -> bool:
        try:
            self._times[want.text] = self.stopwatch.measure(want.block, want.sizes, want.text).ms
        except (ArtifactError, OSError):
            raise  # the table's own trouble
        except Exception as error:  # what a runtime cannot run alone is estimated, and the report names it
            first = next(iter(str(error).splitlines()), type(error).__name__)
            self._refused[want.text] = f"{want.block.label}: {first}"
            return False
        return True

    def _wanted(self, points: Iterable[Sizes], grid: Sequence[float]) -> list[Wanted]:
        found: dict[str, Wanted] = {}
        for sizes in points:
            for want in self.model.wanted(sizes, grid):
                if want.text not in self._refused:
                    found.setdefault(want.text, want)
        return sorted(found.values(), key=lambda want: -want.work)

    def _known(self, text: str) -> float | None:
        if text not in self._times:
            entry = self.table.get(text)
            if entry is None:
                return None
            self._times[text] = entry.ms
        return self._times[text]

    @property
    def used(self) -> int:
        """How many of the table's times predictions have looked at."""
        return len(self._times)


def widths(candidates: Candidates) -> dict[Atom, list[int]]:
    """Axis → the widths that its steps leave."""
    axes = candidates.graph.axes
    return {
        axes[name].atom: [axes[name].size - step.gone for step in steps]
        for name, steps in candidates.steps.items()
    }


def tune(
    model: Any,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    target: str | Target = "cpu",
    backend: str = "auto",
    threads: int | None = None,
    seconds: float | None = None,
    rebuild: bool = False,
    progress: Progress | None = None,
) -> Any:
    """Measure a model's operators ahead of time, at the widths that pruning comes by.

    A backend with a ``tune`` of its own (a compiler that searches schedules) does that instead.

    Args:
        model: a module, an exported program or a :class:`~graphprune.graph.Graph`.
        example_inputs, example_kwargs: as of :func:`graphprune.optimize`.
        target: what it is lowered for; must be this host.
        backend: a backend's name, or ``auto`` for the target's default.
        threads: of the runtime; ``None`` is its default.
        seconds: how long at most; ``None`` measures all there is to measure.
        rebuild: throw away the table that is there; of a backend's own ``tune``, what it has for this model.
        progress: called before each measurement.

    Returns:
        A :class:`Tuned`, or what the backend's own ``tune`` gives.

    Raises:
        InputError: the time is none, or the weights have no values.
        TargetError: the target does not run on this host.
        BackendError: the runtime is missing.
        ArtifactError: the table is damaged, another machine's, or cannot be written.
    """
    if seconds is not None and not seconds > 0:
        raise InputError(f"seconds must be more than 0, got {seconds}")
    goal, threads = get(target), checked(threads)
    if not goal.runs_here:
        raise TargetError(
            f"latency is measured, and target {goal.name!r} is {goal.arch} while this host is {host_arch()}"
        )
    chosen: Backend = backends_for(backend, goal)[0]
    reason = chosen.unrunnable(goal)
    if reason:
        raise BackendError(f"latency is measured, and {chosen.name!r} does not run here: {reason}")
    graph = model
    if not isinstance(model, Graph):
        graph = Original.of(model, example_inputs, example_kwargs, False).graph
    if graph.is_meta:
        raise InputError("latency is measured, and the weights are on the meta device")
    own = getattr(chosen, "tune", None)
    if own is not None:
        graph = Pipeline.parse(LOSSLESS).run(graph, Context(goal)).graph
        return own(graph, goal, seconds=seconds, threads=threads, rebuild=rebuild, progress=progress)
    versions = chosen.lower(nothing(), goal).versions
    machine = Machine.here(chosen.name, versions, threads, goal)
    limits = Limits(channel_alignment=goal.channel_alignment, linear_alignment=goal.linear_alignment)
    candidates = Candidates.of(graph, limits=limits)
    queue = candidates.queue({}, {"macs": 1.0})
    with Table.open(machine, rebuild=rebuild) as table:
        outlook = Outlook(graph, widths(candidates), Stopwatch(table, chosen, goal, threads))
        whole = queue.totals(0)["macs"]
        counts = [queue.first(lambda n, s=share: queue.totals(n)["macs"] <= s * whole) for share in SHARES]  # type: ignore[misc]
        outlook.stopwatch.nothing()
        filled = outlook.fill(map(queue.sizes, counts), seconds=seconds, progress=progress)
        return Tuned(machine, table.path, len(table), filled)
