"""Filling the table ahead of time: from Python, on the command line, after a kill, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune.cli import main
from graphprune.errors import BackendError, InputError, TargetError
from graphprune.latency.table import Table
from graphprune.latency.tuning import Tuned, tune
from graphprune.target import Target, host_arch

OTHER = "aarch64" if host_arch() == "x86_64" else "x86_64"
NET = """
import torch

def small():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(1152, 4)
    )
    return net, torch.randn(1, 3, 8, 8)
"""


def module() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 4)).eval()
    return net, torch.randn(1, 3, 8, 8)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of the test's own, and turns that are short."""
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("graphprune.latency.stopwatch.Stopwatch.turn", 0.001)
    monkeypatch.setattr("graphprune.latency.stopwatch.Stopwatch.rounds", 3)
    monkeypatch.setattr("graphprune.latency.stopwatch.EFFORT", 1)
    return tmp_path / "cache"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tuned_nets.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_table_is_filled_and_found_again(cache: Path) -> None:
    seen: list[tuple[float, float, str]] = []
    net, x = module()
    tuned = tune(net, x, threads=1, progress=lambda *step: seen.append(step))
    assert isinstance(tuned, Tuned)
    assert tuned.path.parent == cache / "latency"
    assert tuned.filled.missing == 0
    assert tuned.entries == tuned.filled.measured + 1, "and a call that does nothing"
    assert len(seen) == tuned.filled.measured
    assert [done for done, _, _ in seen] == [*range(tuned.filled.measured)]
    assert {total for _, total, _ in seen} == {tuned.filled.measured}
    with Table.open(tuned.machine) as table:
        (text,) = [t for t in _texts(table) if "conv2d" in t and "f32[32, 3, 3, 3]" in t]
        entry = table[text]
        assert 0 < entry.low <= entry.ms <= entry.high
        assert entry.label == "convolution, relu"
    again = tune(graphprune.trace(net, x), threads=1)
    assert again.filled.measured == 0
    other = tune(net, x, threads=2, seconds=0.001)
    assert other.path != tuned.path, "another number of threads is another table"


def _texts(table: Table) -> list[str]:
    return [row[0] for row in table._connection.execute("SELECT text FROM entries")]


def test_a_budget_reads_what_was_tuned(cache: Path) -> None:
    net, x = module()
    tuned = tune(net, x, threads=1)
    result = graphprune.optimize(
        net, x, latency=1.0, threads=1, backend="onnxruntime", repair=False, measure=False
    )
    said = [note.message for note in result.report.passes[0].notes if note.where == "latency"]
    (line,) = [line for line in said if line.startswith("latency table: ")]
    assert " 0 of them measured now" in line
    assert line.endswith(f"kept in {tuned.path}")


def test_a_cache_that_cannot_be_written_is_said_and_nothing_ends(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where the directory should be")
    net, x = module()
    result = graphprune.optimize(
        net, x, latency=1.0, threads=1, backend="onnxruntime", repair=False, measure=False
    )
    said = [note.message for note in result.report.passes[0].notes if note.where == "latency"]
    assert any("kept in memory only, as the cache cannot be used" in line for line in said)


def test_the_command_prints_what_it_did(cache: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "tuned_nets:small", "--threads", "1", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["missing"] == 0
    assert found["measured"] > 0
    assert found["machine"]["threads"] == 1
    assert Path(found["table"]).is_file()
    assert f"0 of {found['measured']}" in printed.err
    assert main(["tune", "tuned_nets:small", "--threads", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("measured 0 operators in ")
    assert f"table: {found['table']} with {found['entries']} times" in printed.out


def test_progress_is_a_bar_on_a_terminal_and_lines_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from graphprune.cli.tune import _bar

    steps = [(float(done), 40.0, f"operator [{done}]") for done in range(40)]
    with _bar() as progress:
        for step in steps:
            progress(*step)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "0 of 40: operator [0]"
    assert len(lines) == 10
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with _bar() as progress:
        for step in steps:
            progress(*step)
    shown = capsys.readouterr().err
    assert "39 of 40" in shown
    assert "operator [39]" in shown


def test_a_damaged_table_is_one_line_and_rebuilt_on_demand(
    cache: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "tuned_nets:small", "--threads", "1", "--json"]) == 0
    path = Path(json.loads(capsys.readouterr().out)["table"])
    path.write_bytes(b"no table" * 1000)
    for command in (
        ["tune", "tuned_nets:small", "--threads", "1"],
        ["optimize", "tuned_nets:small", "--threads", "1", "--backend", "onnxruntime", "--latency", "0.9"],
    ):
        assert main(command) == 8
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith(f"error: the latency table {path} is damaged")
        assert "graphprune tune --rebuild" in last
    assert main(["tune", "tuned_nets:small", "--threads", "1", "--rebuild"]) == 0
    assert "measured 0 " not in capsys.readouterr().out


def test_a_run_that_is_killed_goes_on_where_it_was(cache: Path, here: Path) -> None:
    """Killed in the middle of a measurement: what was measured before is there, and is not measured again."""
    code = "from graphprune.cli import main; main(['tune', 'tuned_nets:small', '--threads', '1'])"
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline, entries = time.monotonic() + 240, 0
    try:
        while entries < 2 and time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.2)
            entries = sum(_count(path) for path in (cache / "latency").glob("*.sqlite"))
        os.kill(run.pid, signal.SIGKILL)
    finally:
        _, errors = run.communicate()
    assert entries >= 2, errors.decode()
    (path,) = (cache / "latency").glob("*.sqlite")
    kept = _count(path)
    net, x = module()
    tuned = tune(net, x, threads=1)
    assert tuned.path == path
    assert kept + tuned.filled.measured >= tuned.entries - 1
    assert tuned.filled.measured < tuned.entries


def _count(path: Path) -> int:
    import sqlite3

    try:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            (count,) = connection.execute("SELECT count(*) FROM entries").fetchone()
        finally:
            connection.close()
    except sqlite3.OperationalError:
        return 0
    return int(count)


def test_a_backend_with_a_tuner_of_its_own_runs_that(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def own(graph: graphprune.Graph, target: Target, **options: Any) -> SimpleNamespace:
        asked.update(options, nodes=len(graph.nodes), target=target.name)
        return SimpleNamespace(lines=["tuned"])

    backend = SimpleNamespace(name="fake", unrunnable=lambda target: None, tune=own)
    monkeypatch.setattr("graphprune.latency.tuning.backends_for", lambda name, target: [backend])
    net, x = module()
    assert tune(net, x, backend="fake", seconds=3, threads=2, rebuild=True).lines == ["tuned"]
    nodes = asked.pop("nodes")
    assert nodes
    assert asked == {"seconds": 3, "threads": 2, "rebuild": True, "progress": None, "target": "cpu"}


def test_tvm_searches_schedules(
    cache: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The search itself is stood in for; what the command hands over and prints is not."""
    pytest.importorskip("tvm", reason="the module of the search imports it")
    from graphprune.backends import tvm_tuning

    rebuilt: list[bool] = []

    class Found:
        valid, tried, best = 3, {"a": 1.0, "b": 2.0, "c": None, "d": 4.0}, ("a", 1.5)
        task = SimpleNamespace(name="conv", calls=2)

    def search(graph: graphprune.Graph, target: Target, **options: Any) -> tvm_tuning.Tuned:
        assert options["seconds"] == 7
        assert options["threads"] == 1
        rebuilt.append(options["rebuild"])
        options["progress"](tvm_tuning.Progress(2.0, 7.0, 4, 3, 3.0, "conv", 0))
        return tvm_tuning.Tuned((Found(),), (), 1, ("w",))  # type: ignore[arg-type]

    monkeypatch.setattr(tvm_tuning, "tune", search)
    seen: list[tuple[float, float, str]] = []
    net, x = module()
    answer = tune(net, x, backend="tvm", seconds=7, threads=1, progress=lambda *step: seen.append(step))
    assert seen == [(2.0, 7.0, "3 ms, 3 of 4 schedules run, conv")]
    assert answer.lines[:3] == (
        "1 products, 3 of 4 schedules run", "the products' best times add up to 3 ms",
        "the child process was started again 1 times",
    )  # fmt: skip
    command = ["tune", "tuned_nets:small", "--backend", "tvm", "--threads", "1", "--seconds", "7"]
    assert main([*command, "--rebuild", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert rebuilt == [False, True]
    assert found.pop("seconds") >= 0
    assert found.pop("machine")["threads"] == 1
    assert found == {
        "database": str(cache / "tvm.jsonl"), "tried": 4, "valid": 3, "best_ms": 3.0, "restarts": 1,
        "products": [{"name": "conv", "calls": 2, "tried": 4, "valid": 3, "best_ms": 1.5}], "warnings": ["w"],
    }  # fmt: skip


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = module()
    with pytest.raises(TargetError, match=f"'elsewhere' is {OTHER} while this host is {host_arch()}"):
        tune(net, x, target=Target("elsewhere", OTHER))
    with pytest.raises(InputError, match="seconds must be more than 0"):
        tune(net, x, seconds=0)
    with torch.device("meta"):
        shapes = nn.Linear(2, 2)
    with pytest.raises(InputError, match="meta device"):
        tune(graphprune.trace(shapes, torch.ones(1, 2, device="meta")))
    missing = SimpleNamespace(name="gone", unrunnable=lambda target: "it is not installed")
    monkeypatch.setattr("graphprune.latency.tuning.backends_for", lambda name, target: [missing])
    with pytest.raises(BackendError, match="'gone' does not run here: it is not installed"):
        tune(net, x, backend="gone")
