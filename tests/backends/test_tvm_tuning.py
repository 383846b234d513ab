"""Tuning: measured, kept at once, resumed after a kill, not stopped by a crash, loud when nothing runs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("tvm", reason="needs graphprune[tvm]")

from graphprune.backends import tvm_child
from graphprune.backends.exported import specifications
from graphprune.backends.tvm import Tvm
from graphprune.backends.tvm_database import Database, Measured, cache_file, workload
from graphprune.backends.tvm_import import imported
from graphprune.backends.tvm_machine import machine
from graphprune.backends.tvm_pipeline import fused, library, scheduled, tasks
from graphprune.backends.tvm_schedules import Knobs, default, space
from graphprune.backends.tvm_tuning import HOPELESS, Progress, tune

import graphprune
from graphprune.errors import ArtifactError, BackendError
from graphprune.target import Target, get, host_arch

CPU = get("cpu")
SHAPE = (1, 16, 12, 12)
MACHINE = machine(CPU)


class Net(nn.Module):
    """One product of each family."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.depth = nn.Conv2d(32, 32, 3, 2, 1, groups=32)
        self.linear = nn.Linear(32 * 36, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.relu(self.depth(torch.relu(self.conv(x)))).flatten(1))


def net() -> graphprune.Graph:
    torch.manual_seed(0)
    return graphprune.trace(Net().eval(), torch.randn(SHAPE))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path / "cache"))


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in cache_file().read_text().splitlines()]


def wrong(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(tvm_child, "MODULE", "tests.backends.tvm_trials")
    monkeypatch.setenv("TRIALS", how)


def same(graph: graphprune.Graph, files: Any, inputs: Any, outputs: Any) -> bool:
    runner = Tvm().open(files, inputs, outputs, CPU, 1)
    x = torch.randn(SHAPE)
    wanted = graph.run(x)[0]
    return float((runner(x)[0] - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_what_was_measured_is_used() -> None:
    graph, seen = net(), list[Progress]()
    tuned = tune(graph, CPU, seconds=4, threads=1, progress=seen.append)
    assert len(tuned.searches) == 3
    assert all(search.valid for search in tuned.searches)
    assert seen[-1].valid == sum(search.valid for search in tuned.searches)
    assert seen[-1].ms is not None
    assert [ms for _, ms in tuned.curve] == sorted((ms for _, ms in tuned.curve), reverse=True)
    made = Tvm().lower(graph, CPU)
    assert made.notes == ("TVM: 3 of 3 products have measured schedules, 0 default",)
    assert same(graph, made.files, made.inputs, made.outputs)


@pytest.mark.slow
def test_tuning_resumes_after_a_kill() -> None:
    """Killed while it measures, with half a line on the disk: nothing is measured twice, and nothing lost."""
    program = "import tests.backends.test_tvm_tuning as t\nt.tune(t.net(), t.CPU, seconds=120, threads=1)\n"
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    while not cache_file().exists() or len(cache_file().read_text().splitlines()) < 6:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with cache_file().open("ab") as lines:
        lines.write(b'{"machine": "cut sho')
    before = [line for line in cache_file().read_text().splitlines() if not line.endswith("sho")]
    seen = list[Progress]()
    tuned = tune(net(), CPU, seconds=3, threads=1, progress=seen.append)
    assert seen[0].tried >= len(
        {line.split('"knobs"')[0][-60:] + line.split('"knobs"')[1] for line in before}
    )
    assert all(search.valid for search in tuned.searches)
    kept = [line for line in cache_file().read_text().splitlines() if not line.startswith('{"machine": "cut')]
    assert kept[: len(before)] == before
    once = [(r["workload"], json.dumps(r["knobs"])) for r in map(json.loads, kept) if not r["sure"]]
    assert len(once) == len(set(once))


def test_a_crashing_candidate_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, "crash")
    graph = graphprune.trace(nn.Linear(32, 64).eval(), torch.randn(4, 32))
    tuned = tune(graph, CPU, seconds=15, threads=1)
    assert tuned.crashes >= 1
    (search,) = tuned.searches
    assert search.valid >= 1
    assert "killed by SIGSEGV" in search.reasons
    failed = [r for r in records() if r["ms"] is None]
    assert failed
    assert all(r["knobs"]["order"] == "rows" for r in failed)
    assert search.best is not None
    assert search.best[0].order == "channels"


def test_a_candidate_that_never_ends_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, "hang")
    graph = graphprune.trace(nn.Linear(32, 64).eval(), torch.randn(4, 32))
    (task,) = tasks(fused(imported(graph), MACHINE))
    assert task.work is not None
    good = default(task.work, MACHINE)
    bad = next(k for k in space(task.work, MACHINE) if k.order == "rows")
    with tvm_child.Child(MACHINE, 1, seconds=2.0) as child:
        name = child.keep("f", task.function)
        assert child.times(name, [good])[0][0] is not None
        assert child.times(name, [bad]) == ([None], ["took more than 2 s"])
        assert child.times(name, [good])[0][0] is not None
        assert child.crashes == 1


def test_no_candidate_that_runs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, "refuse")
    with pytest.raises(BackendError, match=r"no candidate that runs for 3 of 3 products .*no schedule today"):
        tune(net(), CPU, seconds=30, threads=1)
    assert all(r["ms"] is None for r in records())


def test_a_child_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_child, "MODULE", "tests.no_such_module")
    with pytest.raises(BackendError, match=r"does not start .*no_such_module"):
        tune(net(), CPU, seconds=5, threads=1)


@pytest.fixture
def dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process that would time candidates is killed as it starts."""
    (tmp_path / "dead_trials.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(tvm_child, "MODULE", "dead_trials")


def linear() -> graphprune.Graph:
    torch.manual_seed(0)
    return graphprune.trace(nn.Linear(32, 64).eval(), torch.randn(4, 32))


@pytest.mark.usefixtures("dead")
def test_a_machine_on_which_nothing_ran_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        with pytest.raises(BackendError, match=r"no candidate that runs for 3 of 3 .*killed by SIGSEGV"):
            tune(net(), CPU, seconds=30, threads=1)
    assert not records()
    monkeypatch.setattr(tvm_child, "MODULE", "graphprune.backends.tvm_trial")
    assert all(search.valid for search in tune(net(), CPU, seconds=0.1, threads=1).searches)


@pytest.mark.usefixtures("dead")
def test_a_machine_on_which_nothing_runs_any_more_is_an_error() -> None:
    """What was found before does not make a run that found nothing a good one."""
    graph = graphprune.trace(nn.Conv2d(16, 32, 3).eval(), torch.randn(SHAPE))
    (task,) = [t for t in tasks(fused(imported(graph), MACHINE)) if t.work is not None]
    Database(MACHINE).add(task, workload(task.function), Measured(default(task.work, MACHINE), 1.0, 1))  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"crashed at each of \d+ \(killed by SIGSEGV\); what was found"):
        tune(graph, CPU, seconds=60, threads=1)
    assert len(records()) == 1


def test_a_crash_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed twelve times, in the run of an older version or in one where something ran."""
    (task,) = tasks(fused(imported(linear()), MACHINE))
    assert task.work is not None
    store, key = Database(MACHINE), workload(task.function)
    every = list(dict.fromkeys([default(task.work, MACHINE), *space(task.work, MACHINE)]))
    for knobs in every:
        store.add(task, key, Measured(knobs, None, 1, crashed=True, reason="killed by SIGKILL"))
    old = cache_file().read_text().replace(', "crashed": true, "reason": "killed by SIGKILL"', "")
    cache_file().write_text(old)
    (search,) = tune(linear(), CPU, seconds=0.1, threads=1).searches
    assert search.valid >= 1
    for knobs in every:
        store.add(task, key, Measured(knobs, None, 1, crashed=True, reason="killed by SIGKILL"))
    (search,) = tune(linear(), CPU, seconds=0.1, threads=1).searches
    assert len(search.tried) == len(every), "those that crashed twice are left alone"
    assert search.valid >= 1, "what has a time keeps it"


def test_failures_of_earlier_runs_do_not_end_a_search() -> None:
    graph = graphprune.trace(nn.Conv2d(16, 32, 3).eval(), torch.randn(SHAPE))
    (task,) = [t for t in tasks(fused(imported(graph), MACHINE)) if t.work is not None]
    assert task.work is not None
    every = list(dict.fromkeys([default(task.work, MACHINE), *space(task.work, MACHINE)]))
    assert len(every) > HOPELESS + 1
    store, key = Database(MACHINE), workload(task.function)
    for knobs in every[: HOPELESS + 1]:
        store.add(task, key, Measured(knobs, None, 1, reason="ValueError: no"))
    (search,) = tune(graph, CPU, seconds=0.1, threads=1).searches
    assert search.valid >= 1
    assert len(search.tried) >= HOPELESS + 2


def test_all_that_failed_before_is_named() -> None:
    (task,) = tasks(fused(imported(linear()), MACHINE))
    assert task.work is not None
    store, key = Database(MACHINE), workload(task.function)
    for knobs in dict.fromkeys([default(task.work, MACHINE), *space(task.work, MACHINE)]):
        store.add(task, key, Measured(knobs, None, 1, reason="ValueError: no"))
    with pytest.raises(BackendError, match=r"1 of 1 products \(.*: ValueError: no, in an earlier run\)"):
        tune(linear(), CPU, seconds=0.1, threads=1)


def test_rebuilding_measures_these_products_anew() -> None:
    (task,) = tasks(fused(imported(linear()), MACHINE))
    knobs = default(task.work, MACHINE)  # type: ignore[arg-type]
    store, key = Database(MACHINE), workload(task.function)
    store.add(task, key, Measured(knobs, 1e-9, 1))
    store.add(task, key, Measured(knobs, 1e-9, 2))
    store.add(task, "another network's", Measured(knobs, 1e-9, 1))
    with cache_file().open("ab") as lines:
        lines.write(b"3\n")
    kept = cache_file().read_text().splitlines()[1:3]
    again = tune(linear(), CPU, seconds=0.1, threads=1)
    assert again.searches[0].best == (knobs, 1e-9)
    assert "1 lines of" in again.warnings[0]
    anew = tune(linear(), CPU, seconds=0.1, threads=1, rebuild=True)
    assert anew.searches[0].best is not None
    assert anew.searches[0].best[1] > 1e-9
    assert anew.warnings == ()
    assert cache_file().read_text().splitlines()[:2] == kept
    assert all(r["ms"] > 1e-9 for r in records()[2:])


DAMAGE = (b"3", b"\xff\xfe\x00", b'{"machine": "cut sho', b"[" * 100_000, b"null", b"\x80{}")


def test_damage_is_skipped_and_said() -> None:
    (task,) = tasks(fused(imported(linear()), MACHINE))
    knobs = default(task.work, MACHINE)  # type: ignore[arg-type]
    store, key = Database(MACHINE), workload(task.function)
    store.add(task, key, Measured(knobs, 2.0, 1))
    good = json.loads(cache_file().read_text())
    wrong: list[dict[str, Any]] = [
        good | {"ms": "fast"}, good | {"ms": float("nan")}, good | {"ms": True}, good | {"threads": "1"},
        good | {"knobs": [1, 2]}, good | {"knobs": good["knobs"] | {"rows": "1"}}, good | {"workload": 7},
        good | {"knobs": {"channels": 1}}, {k: v for k, v in good.items() if k != "threads"},
    ]  # fmt: skip
    lines = [*DAMAGE, *(json.dumps(one).encode() for one in wrong), cache_file().read_bytes().strip(), b""]
    cache_file().write_bytes(b"\n".join(lines))
    contents = store.read()
    assert contents.measured == {key: [Measured(knobs, 2.0, 1)]}
    assert contents.skipped == len(DAMAGE) + len(wrong)
    assert Tvm().lower(linear(), CPU).notes == (
        "TVM: 1 of 1 products have measured schedules, 0 default",
        f"TVM: {contents.skipped} lines of {cache_file()} hold no measurement and were skipped; "
        "graphprune tune --backend tvm --rebuild removes them",
    )


def test_a_schedule_that_no_template_has_is_not_used() -> None:
    (task,) = tasks(fused(imported(linear()), MACHINE))
    store, key = Database(MACHINE), workload(task.function)
    store.add(task, key, Measured(Knobs(3, 1, 14, 7, "banana", "nowhere", 9), 0.001, 1))
    made = Tvm().lower(linear(), CPU)
    assert made.notes[0].startswith("TVM: 0 of 1 products have measured schedules, 1 default; ")
    assert "that their templates do not have, for 1 products" in made.notes[1]


def test_an_unreadable_database_means_the_defaults() -> None:
    cache_file().mkdir(parents=True)
    made = Tvm().lower(linear(), CPU)
    assert made.notes[0].startswith("TVM: 0 of 1 products have measured schedules, 1 default; ")
    assert made.notes[1] == f"TVM: the measured schedules in {cache_file()} cannot be read: Is a directory"
    for rebuild in (False, True):
        with pytest.raises(ArtifactError, match=r"cannot be kept in .*tvm.jsonl: Is a directory; .*CACHE"):
            tune(linear(), CPU, seconds=1, threads=1, rebuild=rebuild)


def test_the_backend_tunes_itself() -> None:
    """What ``graphprune tune`` calls, and shows."""
    seen: list[tuple[float, float, str]] = []
    graph = graphprune.trace(nn.Linear(32, 64).eval(), torch.randn(4, 32))
    tuned = Tvm().tune(graph, CPU, seconds=0.1, threads=1, progress=lambda *at: seen.append(at))
    assert seen
    assert all(0 <= done <= total == 0.1 for done, total, _ in seen)
    assert "1 of 1 schedules run" in seen[0][2]
    assert tuned.lines[-1] == f"kept in {cache_file()}"


def test_nothing_to_tune() -> None:
    graph = graphprune.trace(nn.Softmax(-1), torch.randn(2, 3))
    with pytest.raises(BackendError, match="nothing to tune"):
        tune(graph, CPU, seconds=1)


def test_another_machine_is_refused() -> None:
    other = Target("board", "aarch64" if host_arch() == "x86_64" else "x86_64")
    with pytest.raises(BackendError, match="tune there, and copy"):
        tune(net(), other, seconds=1)


def test_results_hold_for_one_machine_and_version() -> None:
    task = next(t for t in tasks(fused(imported(net()), MACHINE)) if t.work is not None)
    assert task.work is not None
    knobs = space(task.work, MACHINE)
    store, key = Database(MACHINE), workload(task.function)
    for ms, threads, sure in (
        (3.0, 1, False),
        (2.0, 2, False),
        (5.0, 1, True),
        (1.0, 1, False),
        (None, 1, False),
    ):
        store.add(task, key, Measured(knobs[len(store.measured().get(key, ()))], ms, threads, sure))
    assert store.chooser(threads=1)(task) == knobs[2]  # measured in turns, which counts for more than once
    assert store.chooser(threads=2)(task) == knobs[1]
    text = cache_file().read_text()
    cache_file().write_text(text.replace("znver", "z80-").replace(MACHINE.identity, "another machine"))
    assert Database(MACHINE).chooser()(task) is None
    cache_file().write_text(text.replace('"tvm": "', '"tvm": "1'))
    assert Database(MACHINE).chooser()(task) is None


def test_a_function_has_one_name_in_every_process() -> None:
    program = (
        "import tests.backends.test_tvm_tuning as t\n"
        "for task in t.tasks(t.fused(t.imported(t.net()), t.MACHINE)):\n"
        "    print(t.workload(task.function))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    here = [workload(task.function) for task in tasks(fused(imported(net()), MACHINE))]
    assert done.stdout.split() == here
    assert len(set(here)) == len(here)


class Awkward(nn.Module):
    """Products with padding, strides, odd sizes and residuals, for every schedule to get right."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 40, 3, 2, 1)
        self.second = nn.Conv2d(40, 40, 3, padding=1)
        self.depth = nn.Conv2d(40, 40, 5, 1, 2, groups=40)
        self.linear = nn.Linear(36, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = self.depth(torch.relu(self.second(x) + x))
        return nn.functional.gelu(self.linear(x.flatten(2)))


@pytest.mark.parametrize("seed", range(4))
def test_every_schedule_computes_the_same(seed: int) -> None:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    graph = graphprune.trace(Awkward().eval(), torch.randn(SHAPE))
    module = fused(imported(graph), MACHINE)
    drawn = {t.name: draw.choice(space(t.work, MACHINE)) for t in tasks(module) if t.work is not None}
    assert len(drawn) == 4
    inputs, outputs = specifications(graph)
    content = library(scheduled(module, MACHINE, lambda task: drawn[task.name]), MACHINE, None)
    facts = json.loads(Tvm().lower(graph, CPU).files["tvm.json"]) | {"bytes": len(content)}
    files = {"model.so": content, "tvm.json": json.dumps(facts).encode()}
    assert same(graph, files, inputs, outputs), drawn


def test_knobs_are_kept_whole() -> None:
    knobs = Knobs(2, 1, 14, 7, "rows", "chunk", 1)
    assert Knobs(**json.loads(json.dumps(knobs.to_json()))) == knobs
