"""Measured latencies of single operators, kept from run to run, one table for each machine and runtime.

A table is an SQLite file in the cache directory. It belongs to one :class:`Machine`: a processor with its
instructions, a runtime with its versions, a number of threads. An entry's key is the text of a block
(:meth:`graphprune.blocks.Block.text`): operators, arguments, shapes, dtypes. Every entry is committed on its
own, so a run that is killed loses the one that it was measuring, and the next goes on from there.

>>> here = Machine("some processor", 2, "x86_64", "", "onnxruntime", (("onnxruntime", "1.32.0"),), 1)
>>> with Table.open(here, Path(":memory:")) as table:
...     table.put(Entry("relu(x0)", "relu", 0.5, 0.4, 0.7, 9))
...     table["relu(x0)"].ms, len(table)
(0.5, 1)
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .. import cache
from ..errors import ArtifactError
from ..target import Target

FORMAT = 1
_KIND = 0x6770_6C74  # SQLite's application id of such a file
IN_MEMORY = Path(":memory:")
_SCHEMA = (
    f"PRAGMA application_id = {_KIND}",
    f"PRAGMA user_version = {FORMAT}",
    "CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT)",
    "CREATE TABLE IF NOT EXISTS entries (text TEXT PRIMARY KEY, label TEXT, ms REAL, low REAL, high REAL, "
    "rounds INTEGER)",
)


@dataclass(frozen=True)
class Machine:
    """What a measured latency belongs to.

    Attributes:
        processor: model name, of the GPU where that runs it.
        cores: how many the system has.
        architecture: as :func:`platform.machine` says.
        instructions: the processor's flags.
        backend: registry name of the runtime.
        versions: package and version, of what the runtime depends on.
        threads: of the runtime; its default is the number of cores.
    """

    processor: str
    cores: int
    architecture: str
    instructions: str
    backend: str
    versions: tuple[tuple[str, str], ...]
    threads: int

    @staticmethod
    def here(backend: str, versions: Mapping[str, str], threads: int | None, target: Target) -> Machine:
        """This machine with a runtime."""
        cores = os.cpu_count() or 1
        name, flags = _processor()
        if target.arch == "cuda" and torch.cuda.is_available():
            name = torch.cuda.get_device_name()
        return Machine(
            name, cores, platform.machine(), flags, backend, tuple(sorted(versions.items())), threads or cores
        )

    @property
    def digest(self) -> str:
        """Sixteen characters that tell this from other machines and runtimes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """All of it as text."""
        return json.dumps(asdict(self), sort_keys=True)

    def __str__(self) -> str:
        runtime = dict(self.versions).get(self.backend, "")
        return f"{self.processor}, {self.cores} cores, {self.backend} {runtime}".rstrip() + (
            f", {self.threads} threads"
        )


def _processor() -> tuple[str, str]:
    """Model name and instruction flags, as the system gives them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        known = torch.cpu.get_capabilities()
        return platform.processor() or platform.machine(), " ".join(sorted(k for k, v in known.items() if v))
    found = {
        key.strip(): value.strip()
        for key, value in re.findall(r"^([^:\n]+):(.*)$", text.split("\n\n")[0], re.MULTILINE)
    }
    name = found.get("model name") or found.get("CPU part") or platform.machine()
    flags = found.get("flags") or found.get("Features") or ""
    return name, " ".join(sorted(flags.split()))


@dataclass(frozen=True)
class Entry:
    """How long one operator takes.

    Attributes:
        text: the block's.
        label: its kinds, for readers.
        ms: median, milliseconds a call, as the machine was when the table was begun: relative to an operator
            that is timed in turns with it.
        low, high: quartiles.
        rounds: how many turns.
    """

    text: str
    label: str
    ms: float
    low: float
    high: float
    rounds: int


class Table:
    """Entries by the text of their block. Open it with :meth:`open`, in a ``with`` statement."""

    def __init__(self, path: Path, machine: Machine, connection: sqlite3.Connection):
        self.path, self.machine, self._connection = path, machine, connection

    @staticmethod
    def open(machine: Machine, path: Path | None = None, *, rebuild: bool = False) -> Table:
        """The machine's table, begun where there is none.

        Args:
            path: of the file; by default :func:`place`. ``:memory:`` is kept nowhere.
            rebuild: throw away what is there.

        Raises:
            ArtifactError: the file is damaged, no table, of a newer format or of another machine.
            OSError: it cannot be written.
        """
        path = place(machine) if path is None else path
        if path != IN_MEMORY:
            path.parent.mkdir(parents=True, exist_ok=True)
            if rebuild:
                for suffix in ("", "-journal"):
                    path.with_name(path.name + suffix).unlink(missing_ok=True)
        try:
            connection = sqlite3.connect(path, timeout=30, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise OSError(0, f"cannot open the latency table: {error}", str(path)) from error
        try:
            _check(connection, path, machine)
        except sqlite3.OperationalError as error:
            connection.close()
            raise OSError(0, f"cannot write the latency table: {error}", str(path)) from error
        except sqlite3.DatabaseError as error:
            connection.close()
            raise ArtifactError(_broken(path, str(error))) from error
        except BaseException:
            connection.close()
            raise
        return Table(path, machine, connection)

    def __enter__(self) -> Table:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __len__(self) -> int:
        (count,) = self._read("SELECT count(*) FROM entries").fetchone()
        return int(count)

    def __contains__(self, text: str) -> bool:
        return self.get(text) is not None

    def __getitem__(self, text: str) -> Entry:
        found = self.get(text)
        if found is None:
            raise KeyError(text)
        return found

    def get(self, text: str) -> Entry | None:
        """The entry of a block, if it was measured.

        Raises:
            ArtifactError: what stands there is no latency.
        """
        row = self._read(
            "SELECT text, label, ms, low, high, rounds FROM entries WHERE text = ?", text
        ).fetchone()
        if row is None:
            return None
        entry = Entry(*row)
        if not all(isinstance(v, float) and 0 <= v < float("inf") for v in (entry.ms, entry.low, entry.high)):
            raise ArtifactError(_broken(self.path, f"an entry of {entry.label!r} is no latency"))
        return entry

    def put(self, entry: Entry) -> None:
        """Keep an entry, in place of one of the same text; it is on disk when this returns."""
        values = tuple(asdict(entry).values())
        self._read("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?)", *values)

    @property
    def reference_ms(self) -> float | None:
        """What the operator that others are timed against took when the table was begun, or ``None``."""
        row = self._read("SELECT value FROM facts WHERE name = 'reference_ms'").fetchone()
        return None if row is None else float(row[0])

    def begin(self, reference_ms: float) -> float:
        """Keep the reference's time unless there is one; returns the one that counts."""
        self._read("INSERT OR IGNORE INTO facts VALUES ('reference_ms', ?)", repr(reference_ms))
        return self.reference_ms or reference_ms

    def _read(self, statement: str, *values: Any) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise OSError(0, f"cannot use the latency table: {error}", str(self.path)) from error
        except sqlite3.DatabaseError as error:
            raise ArtifactError(_broken(self.path, str(error))) from error


def place(machine: Machine) -> Path:
    """The file of a machine's table in the cache directory."""
    return cache.directory("latency") / f"{machine.backend}-{machine.digest}.sqlite"


def _check(connection: sqlite3.Connection, path: Path, machine: Machine) -> None:
    """Begin an empty file; refuse one that is not this machine's table."""
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (kind,) = connection.execute("PRAGMA application_id").fetchone()
    if not tables and not kind:
        connection.execute("BEGIN IMMEDIATE")  # another process may be at the same
        for statement in _SCHEMA:
            connection.execute(statement)
        connection.execute("INSERT OR IGNORE INTO facts VALUES ('machine', ?)", (machine.to_json(),))
        connection.execute("COMMIT")
        return
    if kind != _KIND:
        raise ArtifactError(_broken(path, "it is no latency table"))
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > FORMAT:
        raise ArtifactError(
            f"the latency table {path} has format {version}, this version reads up to {FORMAT}; update "
            "graphprune, or measure it anew with `graphprune tune --rebuild`"
        )
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise ArtifactError(_broken(path, str(verdict)))
    row = connection.execute("SELECT value FROM facts WHERE name = 'machine'").fetchone()
    if row is None or row[0] != machine.to_json():
        raise ArtifactError(
            f"the latency table {path} was measured on another machine or runtime ({_named(row)}; this is "
            f"{machine}); remove it, or measure it anew with `graphprune tune --rebuild`"
        )


def _named(row: tuple[str] | None) -> str:
    try:
        values = json.loads(row[0]) if row else {}
        return f"{values['processor']}, {values['backend']}, {values['threads']} threads"
    except (ValueError, KeyError, TypeError):
        return "unknown"


def _broken(path: Path, reason: str) -> str:
    return (
        f"the latency table {path} is damaged ({' '.join(reason.split())}); measure it anew with "
        "`graphprune tune --rebuild`, or remove the file"
    )
