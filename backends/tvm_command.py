"""``graphprune tune --backend tvm``: the search for schedules with the command's own progress and answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graphprune.graph import Graph
from graphprune.target import Target

from .tvm_runtime import package

SECONDS = 1800.0  # where the caller gives no time


@dataclass(frozen=True)
class Answer:
    """What was found, in lines for a reader."""

    lines: tuple[str, ...]


def tune(
    graph: Graph,
    target: Target,
    *,
    seconds: float | None = None,
    threads: int | None = None,
    rebuild: bool = False,
    progress: Callable[[float, float, str], None] | None = None,
) -> Answer:
    """See :func:`graphprune.backends.tvm_tuning.tune`; ``progress`` is told seconds, of how many, and what.

    Raises:
        MissingExtraError: tvm is not installed.
        BackendError, ArtifactError: as the search does.
    """
    package()
    from .tvm_database import cache_file
    from .tvm_tuning import Progress, total_ms
    from .tvm_tuning import tune as search

    def told(now: Progress) -> None:
        if progress is not None:
            found = "" if now.ms is None else f"{now.ms:.3g} ms, "
            label = f"{found}{now.valid} of {now.tried} schedules run, {now.task}"
            progress(min(now.seconds, now.budget), now.budget, label)

    tuned = search(graph, target, seconds=seconds or SECONDS, threads=threads, rebuild=rebuild, progress=told)
    valid, tried = (sum(map(count, tuned.searches)) for count in (lambda s: s.valid, lambda s: len(s.tried)))
    best = total_ms(tuned.searches)
    lines = [f"{len(tuned.searches)} products, {valid} of {tried} schedules run"]
    if best is not None:
        lines.append(f"the products' best times add up to {best:.3g} ms")
    if tuned.crashes:
        lines.append(f"the child process was started again {tuned.crashes} times")
    return Answer((*lines, *tuned.warnings, f"kept in {cache_file()}"))
