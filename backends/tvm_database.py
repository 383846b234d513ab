"""Schedules that were measured: JSON lines in the user's cache directory, one a measurement.

A line is appended as soon as its candidate was measured, so that tuning which is killed loses at most one;
a last line that is cut short is skipped. What is looked up is the processor, TVM's version and the
function's structure: two networks that share a layer share its schedule.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from graphprune.cache import directory

from .tvm_machine import Machine
from .tvm_pipeline import Task
from .tvm_runtime import cores
from .tvm_schedules import TEMPLATES, Knobs


def cache_file() -> Path:
    """Where measurements are kept: ``tvm.jsonl`` in the cache directory (:mod:`graphprune.cache`)."""
    return directory("tvm.jsonl")


def workload(function: Any) -> str:
    """A name for a function by what it computes: the same in every process and every network."""
    bare = function.without_attr("global_symbol").without_attr("tirx.noalias")
    return f"{tvm_ffi.structural_hash(bare) & 0xFFFFFFFFFFFFFFFF:016x}"


@dataclass(frozen=True)
class Measured:
    """One candidate's time.

    Attributes:
        ms: ``None`` where it did not compile, crashed or ran out of time.
        threads: it was measured with.
        sure: whether it was measured in turns with others that were close.
    """

    knobs: Knobs
    ms: float | None
    threads: int
    sure: bool = False


@dataclass
class Database:
    """The measurements for one processor.

    Attributes:
        machine: what they hold for.
        path: the file; it need not be there.
    """

    machine: Machine
    path: Path = field(default_factory=cache_file)

    def records(self) -> Iterator[dict[str, Any]]:
        """Every whole line for this processor and this TVM."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # the line that a kill cut short
                holds = (record.get("machine"), record.get("tvm"), record.get("templates"))
                if holds == (self.machine.identity, tvm.__version__, TEMPLATES):
                    yield record

    def measured(self) -> dict[str, list[Measured]]:
        """Workload → what was measured for it, in that order."""
        found: dict[str, list[Measured]] = {}
        for record in self.records():
            value = Measured(
                Knobs(**record["knobs"]), record["ms"], record["threads"], bool(record.get("sure"))
            )
            found.setdefault(record["workload"], []).append(value)
        return found

    def add(self, task: Task, key: str, value: Measured) -> None:
        """Append one measurement; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "machine": self.machine.identity, "tvm": tvm.__version__, "templates": TEMPLATES,
            "workload": key, "task": task.name, "threads": value.threads, "knobs": value.knobs.to_json(),
            "ms": value.ms, "sure": value.sure,
        }  # fmt: skip
        with self.path.open("a+b") as lines:
            start = b""
            if lines.tell():
                lines.seek(-1, os.SEEK_END)
                start = b"" if lines.read(1) == b"\n" else b"\n"
            lines.write(start + json.dumps(record).encode() + b"\n")
            lines.flush()
            os.fsync(lines.fileno())

    def chooser(self, threads: int | None = None) -> Chooser:
        """The fastest knobs by function; those measured with ``threads`` (default: all cores) come first."""
        return Chooser(self, threads or cores())


class Chooser:
    """Gives a task the knobs that were fastest, and counts for how many it had some."""

    def __init__(self, database: Database, threads: int):
        self._best: dict[str, Measured] = {}
        for key, values in database.measured().items():
            whole = [m for m in values if m.ms is not None]
            if whole:
                self._best[key] = min(whole, key=lambda m: (m.threads != threads, not m.sure, m.ms))
        self.tuned = self.asked = 0

    def __call__(self, task: Task) -> Knobs | None:
        self.asked += 1
        best = self._best.get(workload(task.function))
        if best is None:
            return None
        self.tuned += 1
        return best.knobs

    def notes(self) -> tuple[str, ...]:
        """One line for a report."""
        if not self.asked:
            return ()
        rest = self.asked - self.tuned
        advice = "; graphprune tune --backend tvm measures them" if rest else ""
        return (
            f"TVM: {self.tuned} of {self.asked} products have measured schedules, {rest} default{advice}",
        )
