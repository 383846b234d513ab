"""The table of latencies: whose it is, that what was measured stays, what is said of a file that is none."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from graphprune import cache
from graphprune.errors import ArtifactError
from graphprune.latency.table import FORMAT, Entry, Machine, Table, place
from graphprune.target import get

HERE = Machine("processor", 2, "x86_64", "avx2 fma", "onnxruntime", (("onnxruntime", "1.32.0"),), 1)
ENTRY = Entry("conv2d(x0)", "convolution", 2.5, 2.0, 3.0, 9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "below" / "table.sqlite"


def test_what_was_put_is_there_again(path: Path) -> None:
    with Table.open(HERE, path) as table:
        table.put(ENTRY)
        table.put(replace(ENTRY, text="relu(x0)"))
        table.put(replace(ENTRY, ms=2.7))
        assert table.begin(1.5) == 1.5
    with Table.open(HERE, path) as table:
        assert len(table) == 2
        assert table["conv2d(x0)"] == replace(ENTRY, ms=2.7)
        assert "linear(x0)" not in table
        with pytest.raises(KeyError):
            table["linear(x0)"]
        assert table.begin(9.0) == table.reference_ms == 1.5, "the unit stays what it was"


@pytest.mark.parametrize(
    "change",
    [
        {"processor": "other"}, {"cores": 4}, {"instructions": "avx2"}, {"threads": 2},
        {"architecture": "aarch64"}, {"backend": "inductor"}, {"versions": (("onnxruntime", "1.33.0"),)},
    ],
)  # fmt: skip
def test_every_part_of_a_machine_tells_it_apart(path: Path, change: dict[str, object]) -> None:
    other = replace(HERE, **change)  # type: ignore[arg-type]
    assert other.digest != HERE.digest
    assert place(other) != place(HERE)
    Table.open(HERE, path).close()
    with pytest.raises(
        ArtifactError, match=r"another machine or runtime \(processor, onnxruntime, 1 threads"
    ):
        Table.open(other, path)
    with Table.open(other, path, rebuild=True) as table:
        assert table.machine == other


def test_this_machine_is_the_same_every_time() -> None:
    one, two = (Machine.here("onnxruntime", {"b": "2", "a": "1"}, None, get("cpu")) for _ in range(2))
    assert one == two
    assert one.threads == one.cores
    assert one.versions == (("a", "1"), ("b", "2"))
    assert replace(one, threads=one.threads + 1).digest != one.digest


@pytest.mark.parametrize(
    "content", [b"not a table at all, but some text" * 40, b"SQLite format 3\0" + b"\1" * 5000]
)
def test_a_file_that_is_no_table_says_how_to_go_on(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"table\.sqlite is damaged .*graphprune tune --rebuild.*remove"):
        Table.open(HERE, path)
    assert path.read_bytes() == content, "nothing is thrown away unasked"
    with Table.open(HERE, path, rebuild=True) as table:
        table.put(ENTRY)


def test_a_table_with_damaged_pages_is_found_out(path: Path) -> None:
    with Table.open(HERE, path) as table:
        for number in range(400):
            table.put(replace(ENTRY, text=f"conv2d({number})" * 20))
    content = bytearray(path.read_bytes())
    content[8192:12288] = bytes(4096)
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        Table.open(HERE, path)


@pytest.mark.parametrize("value", [-1.0, None, "soon", float("inf")])
def test_an_entry_that_is_no_latency_is_damage(path: Path, value: object) -> None:
    with Table.open(HERE, path) as table:
        table.put(ENTRY)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE entries SET ms = ?", (value,))
    connection.close()
    with Table.open(HERE, path) as table, pytest.raises(ArtifactError, match="'convolution' is no latency"):
        table.get(ENTRY.text)


def test_another_application_s_database_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE bookmarks (url)")
    connection.close()
    with pytest.raises(ArtifactError, match="it is no latency table"):
        Table.open(HERE, path)


def test_a_newer_format_says_to_update(path: Path) -> None:
    Table.open(HERE, path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {FORMAT + 1}")
    connection.close()
    with pytest.raises(ArtifactError, match=f"has format {FORMAT + 1}, .* update graphprune"):
        Table.open(HERE, path)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.test_latency_table import ENTRY, HERE
from dataclasses import replace
from graphprune.latency.table import Table
table = Table.open(HERE, Path(sys.argv[1]))
for number in range(7):
    table.put(replace(ENTRY, text=f"conv2d({number})"))
table._connection.execute("BEGIN IMMEDIATE")
table._connection.execute("INSERT INTO entries VALUES ('half', 'half', 1.0, 1.0, 1.0, 1)")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_loses_the_entry_that_was_being_written(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)], check=False, capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr
    with Table.open(HERE, path) as table:
        assert len(table) == 7
        assert table.get("half") is None
        table.put(replace(ENTRY, text="half"))
        assert len(table) == 8


def test_two_processes_can_fill_one_table(path: Path) -> None:
    with Table.open(HERE, path) as one, Table.open(HERE, path) as two:
        one.put(ENTRY)
        two.put(replace(ENTRY, text="relu(x0)"))
        assert len(one) == len(two) == 2


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache.directory("latency") == tmp_path / "own" / "latency"
    monkeypatch.delenv("GRAPHPRUNE_CACHE")
    assert cache.directory() == tmp_path / "shared" / "graphprune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.directory() == tmp_path / ".cache" / "graphprune"
