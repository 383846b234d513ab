"""One measurement of the matrix as a value and as a file, and what follows from it.

A contestant is *slower* than another where the median of the ratios of their turns and its lower quartile are
above 1 by more than the plain export differs from itself in another process.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.backends.making import PRECISIONS, SAME
from benchmarks.backends.timing import AGAIN, COMPILED, EAGER, ORT, OV, OV_FLOAT, OV_INT8, OV_INT8_FLOAT
from graphprune.measure import Ratio

FLOAT_PEERS = (EAGER, COMPILED, ORT, OV_FLOAT)
INT8_PEERS = (*FLOAT_PEERS, OV_INT8_FLOAT)
ALL_PEERS = (*INT8_PEERS, OV, OV_INT8)
RIVALS = {"fp32": FLOAT_PEERS, "pruned": FLOAT_PEERS, "int8": INT8_PEERS}  # the others have all
TIE = 0.05  # below this nothing is claimed: where a process puts its memory makes as much of a difference


@dataclass(frozen=True)
class Measured:
    """A network at a batch size with a number of threads.

    Attributes:
        samples: contestant → ms of a run in every turn, all of the same rounds.
        auto: precision → backend that ``auto`` took, in a measurement of its own.
        facts: artifact → its certificate's error, share of integers, bytes; or why there is none.
        conditions: date, host, load, versions.
    """

    network: str
    batch: int
    threads: int
    samples: Mapping[str, Sequence[float]]
    auto: Mapping[str, str]
    facts: Mapping[str, Mapping[str, Any]]
    conditions: Mapping[str, str]

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.network}, batch {self.batch}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    def ms(self, label: str) -> float:
        """Median of one run."""
        return statistics.median(self.samples[label])

    def ratio(self, label: str, to: str = ORT) -> Ratio:
        """Median and quartiles of the ratios of turns."""
        values = [a / b for a, b in zip(self.samples[label], self.samples[to], strict=True)]
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Ratio(median, low, high)

    @property
    def noise(self) -> float:
        """How far above 1 a ratio may be without a meaning."""
        again = self.ratio(AGAIN)
        return max(1 + TIE, again.high, 1 / again.low)

    def slower(self, label: str, than: str) -> bool:
        """Whether a contestant is slower than another by more than the noise."""
        found = self.ratio(label, than)
        return found.median > self.noise and found.low > 1

    def best(self, labels: Sequence[str]) -> str:
        """The fastest of those that were timed, by its median."""
        return min((label for label in labels if label in self.samples), key=self.ms)

    def automatic(self, precision: str) -> str | None:
        """The contestant that ``auto`` gives."""
        taken = self.auto.get(precision)
        if taken is None:
            return None
        own = f"{taken}, {precision}"
        return own if own in self.samples else f"{taken}, {SAME.get(precision, precision)}"

    def verdict(self, precision: str) -> tuple[str, Ratio, bool] | None:
        """The best peer of that kind, ``auto`` against it, and whether ``auto`` is slower."""
        ours = self.automatic(precision)
        if ours is None or ours not in self.samples:
            return None
        peer = self.best(RIVALS.get(precision, ALL_PEERS))
        return peer, self.ratio(ours, peer), self.slower(ours, peer)


def write(measured: Measured, folder: Path) -> Path:
    """A file of its own for each measurement, replaced by a later one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{measured.network}-b{measured.batch}-t{measured.threads}.json"
    path.write_text(json.dumps(asdict(measured)) + "\n")
    return path


def read(folder: Path) -> list[Measured]:
    """All measurements in a folder."""
    return [Measured(**json.loads(path.read_text())) for path in sorted(folder.glob("*-b*-t*.json"))]


def precisions(measured: Measured) -> list[str]:
    """Those that ``auto`` chose in."""
    return [precision for precision in PRECISIONS if precision in measured.auto]
