"""``graphprune tune --backend tvm``: the search for schedules with the command's own progress and answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graphprune.graph import Graph
from graphprune.target import Target

from .tvm_package import cores, package

SECONDS = 1800.0  # where the caller gives no time


@dataclass(frozen=True)
class Product:
    """One function of the network.

    Attributes:
        name: in the library.
        calls: how often the network calls it.
        tried, valid: schedules measured now or before, and how many of them ran.
        best_ms: the fastest one's time.
    """

    name: str
    calls: int
    tried: int
    valid: int
    best_ms: float


@dataclass(frozen=True)
class Answer:
    """What was found.

    Attributes:
        products: what was measured of each.
        restarts: how often the process that times candidates crashed or hung.
        warnings: what could not be read of the database.
        path: the database.
        machine: the processor that the results hold for, in LLVM's words.
        threads: that candidates ran with.
        seconds: how long it took.
    """

    products: tuple[Product, ...]
    restarts: int
    warnings: tuple[str, ...]
    path: Path
    machine: str
    threads: int
    seconds: float

    @property
    def tried(self) -> int:
        """Schedules measured now or before."""
        return sum(product.tried for product in self.products)

    @property
    def valid(self) -> int:
        """How many of them ran."""
        return sum(product.valid for product in self.products)

    @property
    def best_ms(self) -> float:
        """The products' best times, each as often as it is called."""
        return sum(product.calls * product.best_ms for product in self.products)

    @property
    def lines(self) -> tuple[str, ...]:
        """What a reader wants to know."""
        again = (f"the child process was started again {self.restarts} times",) if self.restarts else ()
        return (
            f"{len(self.products)} products, {self.valid} of {self.tried} schedules run",
            f"the products' best times add up to {self.best_ms:.3g} ms",
            *again, *self.warnings, f"kept in {self.path}",
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "machine": {"processor": self.machine, "threads": self.threads}, "database": str(self.path),
            "products": [asdict(product) for product in self.products], "tried": self.tried,
            "valid": self.valid, "best_ms": self.best_ms, "restarts": self.restarts,
            "warnings": list(self.warnings), "seconds": self.seconds,
        }  # fmt: skip


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
    from .tvm_machine import machine
    from .tvm_tuning import Progress
    from .tvm_tuning import tune as search

    begun = time.monotonic()

    def told(now: Progress) -> None:
        if progress is not None:
            found = "" if now.ms is None else f"{now.ms:.3g} ms, "
            label = f"{found}{now.valid} of {now.tried} schedules run, {now.task}"
            progress(min(now.seconds, now.budget), now.budget, label)

    tuned = search(graph, target, seconds=seconds or SECONDS, threads=threads, rebuild=rebuild, progress=told)
    products = []
    for one in tuned.searches:
        assert one.best is not None  # else the search would have failed
        products.append(Product(one.task.name, one.task.calls, len(one.tried), one.valid, one.best[1]))
    return Answer(
        tuple(products), tuned.crashes, tuned.warnings, cache_file(), machine(target).identity,
        threads or cores(), time.monotonic() - begun,
    )  # fmt: skip
