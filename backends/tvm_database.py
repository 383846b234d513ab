"""Schedules that were measured: JSON lines in the user's cache directory, one a measurement.

A line is appended as soon as its candidate was measured, so that tuning which is killed loses at most one.
Lines that are no records (one that a kill cut short, or damage) are skipped and counted. What is looked up is
the processor, TVM's version and the function's structure: two networks that share a layer share its
schedule.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from graphprune.atomic import write_file
from graphprune.cache import directory
from graphprune.errors import ArtifactError

from .tvm_machine import Machine
from .tvm_package import cores
from .tvm_pipeline import Task
from .tvm_schedules import TEMPLATES, Knobs, default, space


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
        crashed: whether the process that timed it ended or ran out of time: the candidate's fault, or the
            machine's.
        reason: why there is no time.
    """

    knobs: Knobs
    ms: float | None
    threads: int
    sure: bool = False
    crashed: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Contents:
    """What a file has.

    Attributes:
        measured: workload → what was measured for it, in that order.
        skipped: how many lines are no records.
        trouble: why nothing can be read; empty where it can, or where there is no file.
    """

    measured: dict[str, list[Measured]] = field(default_factory=dict)
    skipped: int = 0
    trouble: str = ""

    def warnings(self, path: Path) -> tuple[str, ...]:
        """Lines for a report on what could not be read of ``path``."""
        if self.trouble:
            return (f"TVM: the measured schedules in {path} cannot be read: {self.trouble}",)
        if not self.skipped:
            return ()
        return (
            f"TVM: {self.skipped} lines of {path} hold no measurement and were skipped; "
            "graphprune tune --backend tvm --rebuild removes them",
        )


@dataclass
class Database:
    """The measurements for one processor.

    Attributes:
        machine: what they hold for.
        path: the file; it need not be there.
    """

    machine: Machine
    path: Path = field(default_factory=cache_file)

    def read(self) -> Contents:
        """What there is for this processor and this TVM; what cannot be read is said, and no error."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return Contents()
        except OSError as error:
            return Contents(trouble=error.strerror or str(error))
        found: dict[str, list[Measured]] = {}
        skipped = 0
        for line in content.splitlines():
            record = _record(line)
            if record is None:
                skipped += bool(line.strip())
            elif self._holds(record):
                found.setdefault(record["workload"], []).append(_measured(record))
        return Contents(found, skipped)

    def measured(self) -> dict[str, list[Measured]]:
        """Workload → what was measured for it, in that order."""
        return self.read().measured

    def _holds(self, record: dict[str, Any]) -> bool:
        holds = (record["machine"], record["tvm"], record["templates"])
        return holds == (self.machine.identity, tvm.__version__, TEMPLATES)

    def prepare(self) -> None:
        """Make the file, before the time is spent that its content takes.

        Raises:
            ArtifactError: it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as lines:
                lines.seek(0)
                lines.read(1)
        except OSError as error:
            raise self._unwritable(error) from error

    def forget(self, keys: Collection[str], threads: int) -> None:
        """Remove what was measured for the workloads ``keys`` on this processor with so many threads, by
        whatever TVM, and every line that is no record.

        Raises:
            ArtifactError: the file cannot be written.
        """
        try:
            kept = []
            for line in self.path.read_bytes().splitlines():
                record = _record(line)
                if record is None:
                    continue
                asked = (record["machine"], record["threads"]) == (self.machine.identity, threads)
                if not (asked and record["workload"] in keys):
                    kept.append(line + b"\n")
            write_file(self.path, b"".join(kept))
        except OSError as error:
            raise self._unwritable(error) from error

    def add(self, task: Task, key: str, value: Measured) -> None:
        """Append one measurement; it is on the disk when this returns.

        Raises:
            ArtifactError: the file cannot be written.
        """
        record = {
            "machine": self.machine.identity, "tvm": tvm.__version__, "templates": TEMPLATES,
            "workload": key, "task": task.name, "threads": value.threads, "knobs": value.knobs.to_json(),
            "ms": value.ms, "sure": value.sure,
        }  # fmt: skip
        if value.ms is None:
            record |= {"crashed": value.crashed, "reason": value.reason}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as lines:
                start = b""
                if lines.tell():
                    lines.seek(-1, os.SEEK_END)
                    start = b"" if lines.read(1) == b"\n" else b"\n"
                lines.write(start + json.dumps(record).encode() + b"\n")
                lines.flush()
                os.fsync(lines.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> ArtifactError:
        return ArtifactError(
            f"measured schedules cannot be kept in {self.path}: {error.strerror or error}; "
            "make room there, or name another directory in $GRAPHPRUNE_CACHE"
        )

    def chooser(self, threads: int | None = None) -> Chooser:
        """The fastest knobs by function; those measured with ``threads`` (default: all cores) come first."""
        return Chooser(self, threads or cores())


class Chooser:
    """Gives a task the knobs that were fastest, and counts for how many it had some."""

    def __init__(self, database: Database, threads: int):
        contents = database.read()
        self._machine, self._warnings = database.machine, contents.warnings(database.path)
        self._times = {
            key: sorted(
                (m for m in values if m.ms is not None),
                key=lambda m: (m.threads != threads, not m.sure, m.ms),
            )
            for key, values in contents.measured.items()
        }
        self.tuned = self.asked = self.strange = 0

    def __call__(self, task: Task) -> Knobs | None:
        self.asked += 1
        timed = self._times.get(workload(task.function), ())
        if not timed:
            return None
        assert task.work is not None
        meant = {default(task.work, self._machine), *space(task.work, self._machine)}
        best = next((m.knobs for m in timed if m.knobs in meant), None)
        self.strange += any(m.knobs not in meant for m in timed)
        self.tuned += best is not None
        return best

    def notes(self) -> tuple[str, ...]:
        """Lines for a report."""
        if not self.asked:
            return self._warnings
        rest = self.asked - self.tuned
        advice = "; graphprune tune --backend tvm measures them" if rest else ""
        counts = f"TVM: {self.tuned} of {self.asked} products have measured schedules, {rest} default{advice}"
        strange = (
            f"TVM: measured schedules that their templates do not have, for {self.strange} products, were "
            "not used"
        )
        return (counts, *((strange,) if self.strange else ()), *self._warnings)


_WORDS = ("machine", "tvm", "workload")
_KNOBS = {one.name: str if one.type == "str" else int for one in fields(Knobs)}


def _record(line: bytes) -> dict[str, Any] | None:
    """A line's record, ``None`` where it is none. Knobs of other templates may be any."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):  # cut short by a kill, or damaged
        return None
    if not isinstance(record, dict) or not all(isinstance(record.get(word), str) for word in _WORDS):
        return None
    ms, knobs = record.get("ms"), record.get("knobs")
    right = (
        type(record.get("templates")) is int
        and type(record.get("threads")) is int
        and isinstance(knobs, dict)
        and (record["templates"] != TEMPLATES or {k: type(v) for k, v in knobs.items()} == _KNOBS)
        and (ms is None or (type(ms) in (int, float) and math.isfinite(ms) and ms >= 0))
    )
    return record if right else None


def _measured(record: dict[str, Any]) -> Measured:
    # What failed before it was kept why may have crashed.
    return Measured(
        Knobs(**record["knobs"]), record["ms"], record["threads"], bool(record.get("sure")),
        record["ms"] is None and bool(record.get("crashed", True)), str(record.get("reason", "")),
    )  # fmt: skip
