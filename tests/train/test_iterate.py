"""Rounds against the same steps by hand, and runs that were stopped against one that was not, bit by bit."""

from __future__ import annotations

import errno
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.cost import cost
from graphprune.errors import GraphpruneError, InputError
from graphprune.pipeline import Context, Pipeline

pytest.importorskip("accelerate", reason="the rounds train with it")

from graphprune.train import AttentionTransfer, SoftTargets, finetune
from graphprune.train.iterate import iterate
from graphprune.train.rounds import Iterated, Round
from graphprune.train.saved import Saved

from . import iterating
from .iterating import network, run, stopping

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole() -> Iterated:
    """The run that nobody stopped; its progress lines are what a stop can come between."""
    return run(None)


def lines(result: Iterated) -> int:
    return sum(1 + len(r.losses) for r in result.rounds)


def same(left: Iterated, right: Iterated) -> bool:
    """Equal rounds, names and bits."""
    mine, theirs = left.module.state_dict(), right.module.state_dict()
    return (
        left.rounds == right.rounds
        and list(mine) == list(theirs)
        and all(torch.equal(mine[name], theirs[name]) for name in mine)
    )


def test_three_rounds_end_in_the_budget_and_the_model_is_untouched(whole: Iterated) -> None:
    graph = graphprune.trace(network(), torch.zeros(2, 1, 6, 6))
    start, left = cost(graph).parameters, [r.parameters for r in whole.rounds]
    assert whole.before[:2] == (cost(graph).macs, start)
    assert len(left) == 3
    assert left[0] <= 0.78 * start
    assert left[-1] <= 0.5 * start
    assert left == sorted(left, reverse=True)
    assert cost(whole.graph).parameters == left[-1]
    assert sum(p.numel() for p in whole.module.parameters()) == left[-1]
    assert all(len(r.losses) == len(r.scores) == 2 and r.pruned is not None for r in whole.rounds)
    assert whole.rounds[-1].scores[-1] == iterating.correct(whole.module)
    assert len(str(whole).splitlines()) == 2 + 1 + 3
    assert f"{left[-1]:,} ({left[-1] / start:.1%})" in str(whole)


def test_a_round_is_prune_repair_and_finetune() -> None:
    model, data = network(), [(torch.randn(8, 1, 6, 6), torch.randint(3, (8,))) for _ in range(4)]
    inputs = [x for x, _ in data]
    result = iterate(
        model, torch.zeros(2, 1, 6, 6), data, F.cross_entropy, params=0.6, per_round=0.5, epochs=2, lr=1e-2,
        calibration=inputs, seed=2,
    )  # fmt: skip
    graph = graphprune.trace(model, torch.zeros(2, 1, 6, 6), dynamic_batch=True)
    budget = int(0.6 * cost(graph).parameters)
    seed = 2 * 1_000_003 + 1
    small = Pipeline.parse(f"prune-channels{{params={budget}}},repair").run(
        graph, Context(calibration=inputs, seed=seed)
    )
    training = finetune(small.graph.module, data, F.cross_entropy, epochs=2, lr=1e-2, seed=seed)
    assert result.rounds[0].losses == pytest.approx(training.losses, rel=1e-5)
    for name, value in small.graph.module.state_dict().items():
        torch.testing.assert_close(result.module.state_dict()[name], value, rtol=1e-4, atol=1e-5)


class Stopped(Exception):
    """Stands for whatever ends a run."""


@pytest.mark.slow
@pytest.mark.parametrize("count", range(1, 10))
def test_a_run_that_stops_anywhere_goes_on_to_the_same_bits(
    whole: Iterated, tmp_path: Path, count: int
) -> None:
    def stop() -> None:
        raise Stopped

    assert lines(whole) == 9
    with pytest.raises(Stopped):
        run(tmp_path, stopping(count, stop))
    torch.manual_seed(count)  # what the process did meanwhile must not matter
    again = run(tmp_path)
    assert same(again, whole)
    assert count < 3 or any("went on" in note for note in again.notes)


def start(directory: Path, count: int) -> subprocess.Popen[bytes]:
    code = [sys.executable, "-m", "tests.train.iterating", str(directory), str(count)]
    place = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(code, cwd=ROOT, env=place, stdout=subprocess.DEVNULL)


def test_a_killed_process_goes_on_to_the_same_bits(whole: Iterated, tmp_path: Path) -> None:
    process = start(tmp_path, 6)
    assert process.wait(300) == -signal.SIGKILL
    saved = Saved.read(tmp_path)
    assert saved is not None
    assert (len(saved.done), saved.current is not None) == (1, True)
    assert same(run(tmp_path), whole)
    said: list[str] = []
    assert same(run(tmp_path, said.append), whole), "a finished run is read"
    assert said == []
    assert (tmp_path / "rounds.md").read_text().strip() == str(whole)


def under_way(directory: Path) -> subprocess.Popen[bytes]:
    """A process whose run has begun; it is not stopped."""
    (directory / "lock").unlink(missing_ok=True)
    process = start(directory, 10**6)
    while not (directory / "lock").exists() and process.poll() is None:
        time.sleep(0.02)
    return process


@pytest.mark.slow
def test_a_run_killed_at_random_moments_again_and_again(whole: Iterated, tmp_path: Path) -> None:
    undisturbed = under_way(tmp_path / "undisturbed")
    began = time.monotonic()
    assert undisturbed.wait(300) == 0
    length = time.monotonic() - began
    draw, kills, directory = random.Random(0), 0, tmp_path / "killed"
    for _ in range(6):
        process = under_way(directory)
        try:
            process.wait(draw.uniform(0, length / 2))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        process.wait()
    assert kills > 1
    assert same(run(directory), whole)
    assert not list(directory.glob(".*"))


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        run(tmp_path, stopping(2, stop))
    with pytest.raises(InputError, match="seed=5, and this run has 6"):
        run(tmp_path, seed=6)
    with pytest.raises(InputError, match="another network"):
        iterate(nn.Linear(4, 2), torch.zeros(2, 4), teach(), F.mse_loss, params=0.5, directory=tmp_path)


def begun(directory: Path, through: int = 2, **options: Any) -> bytes:
    """The state of a run that was stopped."""

    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        quick(directory, progress=stopping(through, stop), **options)
    return (directory / "state.pt").read_bytes()


def quick(directory: Path | None = None, **options: Any) -> Iterated:
    """Two rounds of an epoch, in a fraction of a second."""
    return iterate(**{**SMALL, "directory": directory, **options})


def teach() -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [(x := torch.randn(8, 4, generator=draw), x[:, :2]) for _ in range(3)]


def perceptron() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)).eval()


SMALL: dict[str, Any] = {
    "model": perceptron(), "example_inputs": torch.zeros(2, 4), "data": teach(), "loss": F.mse_loss,
    "params": 0.6, "per_round": 0.25, "epochs": 1, "lr": 1e-3,
}  # fmt: skip


def other_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(outputs, targets)


def sgd(parameters: list[nn.Parameter], lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"data": teach()[:2]}, "data=3 in all, .* and this run has 2 in all, "),
        ({}, {"data": [(x, y + 1) for x, y in teach()]}, r"data=3 in all, the first float32\[8, 4\], "),
        ({}, {"loss": other_loss}, "loss=functional.mse_loss, and this run has test_iterate.other_loss"),
        ({}, {"calibration": [x for x, _ in teach()]}, "calibration=None, and this run has 3 in all"),
        ({}, {"evaluate": lambda m: 0.0}, "evaluate=None, and this run has test_iterate.<lambda>"),
        ({}, {"optimizer": sgd}, r"optimizer=adamw.AdamW\(lr=0.001\), and this run has sgd.SGD\(lr=0.01\)"),
        ({}, {"lr": 0.01}, r"optimizer=adamw.AdamW\(lr=0.001\), and this run has adamw.AdamW\(lr=0.01\)"),
        ({}, {"clip": 1.0}, "clip=None, and this run has 1.0"),
        ({"optimizer": sgd}, {"optimizer": torch.optim.SGD}, r"sgd.SGD\(lr=0.01\), .* sgd.SGD\(lr=0.001\)"),
        (
            {"optimizer": sgd},
            {"optimizer": torch.optim.Adam},
            r"=sgd.SGD\(lr=0.01\), .* adam.Adam\(lr=0.001\)",
        ),
        ({"optimizer": sgd}, {"optimizer": partial(sgd, lr=0.1)}, r"SGD\(lr=0.01\), .* sgd.SGD\(lr=0.1\)"),
        ({}, {"names": {"[iterate] data": "a:b"}}, r"\[iterate\] data=None, and this run has 'a:b'"),
    ],
)
def test_what_differs_from_the_run_before_is_named(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], message: str
) -> None:
    begun(tmp_path, **before)
    with pytest.raises(InputError, match=f"{message}.*; give another directory, or remove it"):
        quick(tmp_path, **after)
    assert any("went on" in note for note in quick(tmp_path, **before).notes)


def test_the_same_run_goes_on_with_objects_made_anew(tmp_path: Path) -> None:
    """Lambdas, partials, objects and shuffled data have another address each time."""

    class Count:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return F.mse_loss(outputs, targets)

    def options(loss: Count) -> dict[str, Any]:
        pairs = torch.utils.data.TensorDataset(*(torch.cat(each) for each in zip(*teach(), strict=True)))
        return {
            "loss": loss,
            "data": torch.utils.data.DataLoader(
                pairs, batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(loss.calls)
            ),
            "optimizer": partial(torch.optim.SGD, lr=1e-2),
            "evaluate": partial(lambda factor, module: factor * float(module.training), 2.0),
            "calibration": (x for x, _ in teach()),
        }

    loss = Count()
    begun(tmp_path, 3, **options(loss))
    assert loss.calls
    torch.manual_seed(loss.calls)
    assert same(quick(tmp_path, **options(loss)), quick(**options(Count())))


def test_looking_at_the_data_leaves_generators_as_they_were() -> None:
    data = iterating.Shuffled()
    state, own = torch.get_rng_state(), data.generator.get_state()
    quick(
        data=data, model=network(), example_inputs=torch.zeros(2, 1, 6, 6), loss=F.cross_entropy, params=1.0
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(data.generator.get_state(), own)


def test_a_damaged_state_is_refused_by_name(tmp_path: Path) -> None:
    state, path = begun(tmp_path), tmp_path / "state.pt"
    for content in (b"", b"nothing", state[: len(state) // 2], state[:-1], state + b"\n", state[:40]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"state\.pt, .* is damaged: .* remove it to start again"):
            quick(tmp_path)
    draw = random.Random(0)
    for place in (0, 60, *(draw.randrange(len(state)) for _ in range(30))):
        flipped = state[place] ^ (1 << draw.randrange(8))
        path.write_bytes(state[:place] + bytes([flipped]) + state[place + 1 :])
        with pytest.raises(InputError, match=r"state\.pt, .* is damaged"):
            quick(tmp_path)
    path.write_bytes(state)
    assert same(quick(tmp_path), quick())


def test_a_state_that_something_else_wrote_is_refused_by_name(tmp_path: Path) -> None:
    saved = Saved({}, (1, 1, None), (Round(1, "{}", 1, 1),))
    saved.write(tmp_path)
    with pytest.raises(InputError, match=r"state\.pt is not .* \(this is not a plan: KeyError\('format'\)\)"):
        Saved.read(tmp_path)
    (tmp_path / "state.pt").unlink()
    (tmp_path / "state.pt").mkdir()
    with pytest.raises(InputError, match=r"cannot read the state of the run, .*state\.pt: Is a directory"):
        Saved.read(tmp_path)


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\['lr'\] is a float64.*plain ones"):
        quick(tmp_path, optimizer=lambda p: torch.optim.SGD(p, numpy.float64(1e-3)))
    quick(tmp_path, optimizer=lambda p: torch.optim.SGD(p, float(numpy.float64(1e-3))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give a budget"),
        ({"params": 0.5, "per_round": 1.0}, "per_round"),
        ({"params": 0.5, "per_round": "0.1"}, "per_round"),
        ({"params": 0.5, "epochs": -1}, "epochs"),
        ({"params": 0.5, "optimizer": torch.optim.SGD([torch.zeros(1)], 0.1)}, "pass a function"),
        ({"params": 0.5, "optimizer": lambda p: None}, "optimizer made a NoneType"),
        ({"params": 0.5, "optimizer": 1e-3}, "optimizer must be a function, not 0.001"),
        ({"params": 0.5, "loss": None}, "loss must be a function, not None"),
        *(({"params": 0.5, "lr": lr}, "lr must be a number above 0") for lr in (0, -1e-3, math.nan, "1e-3")),
        ({"params": 0.5, "clip": 0.0}, "clip must be a number above 0"),
        ({"params": 0.5, "seed": 0.5}, "seed must be a whole number"),
        ({"params": 0.5, "alpha": 0.5}, "alpha=0.5 is a share of soft targets, and there are none"),
        ({"params": 0.5, "distil": [SoftTargets()], "alpha": 1.5}, "alpha must be from 0 to 1"),
        ({"params": 0.5, "distil": SoftTargets()}, "distil must be a list of terms"),
        ({"params": 0.5, "distil": [AttentionTransfer("conv9")]}, "neither a module nor a node 'conv9'"),
        ({"params": 0.5, "pruning": {"alignn": 1}}, "did you mean 'align'"),
        ({"params": 0.5, "pruning": {"macs": 0.5}}, "pruning holds the budget macs"),
        ({"params": 0.5, "pruning": {"importance": "l1"}, "importance": "l2"}, "importance is given twice"),
        ({"params": 0.5, "data": []}, r"data holds no \(inputs, targets\) batches"),
        ({"params": 0.5, "data": iter([])}, "data can be read once only"),
        ({"params": 0.5, "data": None}, r"data must be an iterable of \(inputs, targets\) batches, not None"),
        ({"params": 0.5, "data": [torch.zeros(2, 4)]}, "batch 0 of the training data is no"),
        ({"params": 0.5, "calibration": []}, "calibration holds no inputs"),
        ({"params": 0.5, "calibration": torch.zeros(2, 4)}, "calibration is a single Tensor"),
        ({"params": 0.5, "directory": __file__}, "cannot be kept in .*: File exists; give a directory"),
        ({"params": 0.5, "directory": f"{__file__}/x"}, "cannot be kept in .*: Not a directory; give"),
        ({"params": 0.5, "directory": "/proc/x"}, "cannot be kept in .*; give a directory"),
    ],
)
def test_what_cannot_be_is_said(options: dict[str, Any], message: str) -> None:
    """Before anything is pruned or trained."""
    said: list[str] = []
    with pytest.raises(InputError, match=message):
        iterate(**{**SMALL, "params": None, "progress": said.append, **options})
    assert said == []


def test_a_full_disk_leaves_the_state_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, written = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    words = "cannot write .*: No space left on device; the state that was written last stands: make room"
    with pytest.raises(GraphpruneError, match=words):
        quick(tmp_path)
    state = (tmp_path / "state.pt").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "rounds.md", "state.pt"]
    with pytest.raises(GraphpruneError, match=words):
        quick(tmp_path)
    assert (tmp_path / "state.pt").read_bytes() == state
    monkeypatch.undo()
    again = quick(tmp_path)
    assert same(again, quick())
    assert any("went on after round 1" in note for note in again.notes)


def test_what_a_killed_run_left_is_put_right(tmp_path: Path) -> None:
    done = quick(tmp_path)
    (tmp_path / "rounds.md").write_text("of a round before")
    (tmp_path / f".state.pt.partial-{0:032x}").write_bytes(b"half")
    (tmp_path / f".build.partial-{0:032x}").mkdir()
    assert same(quick(tmp_path), done)
    assert (tmp_path / "rounds.md").read_text().strip() == str(done)
    assert sorted(path.name for path in tmp_path.glob(".*")) == [f".build.partial-{0:032x}"], "another's"


HOLDING = """
import os, sys, time
from pathlib import Path
from graphprune.train.saved import held

with held(Path(sys.argv[1])):
    child = os.fork()  # as a DataLoader does; it outlives a parent that is killed for some seconds
    if child:
        print(child, flush=True)
    time.sleep(100)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        with pytest.raises(InputError, match=r"another process runs in .*; wait for it"):
            quick(tmp_path)
        process.kill()
        process.wait()
        assert len(quick(tmp_path).rounds) == 2
    finally:
        process.kill()
        process.stdout.close()
        os.kill(child, signal.SIGKILL)


def test_workers_that_stay_are_noted(tmp_path: Path) -> None:
    class Loader(list[Any]):
        persistent_workers = True

    begun(tmp_path, 3, data=Loader(teach()))
    assert any("persistent_workers" in note for note in quick(tmp_path, data=Loader(teach())).notes)


def test_data_that_nobody_reads_may_be_empty() -> None:
    result = quick(data=[], epochs=0, calibration=[x for x, _ in teach()])
    assert [r.losses for r in result.rounds] == [(), ()]


def test_gradients_are_clipped_where_asked_for() -> None:
    """What the error about a loss that is no number advises."""
    with pytest.raises(GraphpruneError, match="give clip="):
        quick(loss=lambda outputs, targets: outputs.sum() * math.nan)
    free, held = quick(optimizer=sgd), quick(optimizer=sgd, clip=1e-6)
    assert held.rounds[-1].losses[-1] > free.rounds[-1].losses[-1]


def test_an_importance_among_the_options_of_pruning_is_the_one() -> None:
    by_weight = quick(importance="l1")
    assert same(quick(pruning={"importance": "l1"}), by_weight)
    assert not same(quick(), by_weight)


def test_one_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        iterate(nn.Linear(4, 2), torch.zeros(2, 4), [], F.mse_loss, params=0.5)


NETS = """
import torch
from torch import nn
from tests.train.iterating import Shuffled, network as small, correct

def network():
    return small(), torch.zeros(1, 1, 6, 6)

def batches():
    return Shuffled()

def inputs():
    for x, _ in Shuffled():
        yield x

loss = nn.functional.cross_entropy

def optimizer(parameters):
    return torch.optim.SGD(parameters, 0.05, momentum=0.9)
"""
RECIPE = """
source = "iterate_nets:network"
evaluate = "iterate_nets:correct"
out = "build"
seed = 5
measure = false

[iterate]
data = "iterate_nets:batches"
loss = "iterate_nets:loss"
optimizer = "iterate_nets:optimizer"
temperature = 2.0
params = 0.5
per-round = 0.22
epochs = 2
directory = "state"

[iterate.pruning]
align = 1
"""


def test_a_recipe_does_the_same_and_builds_what_comes_out(whole: Iterated, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from graphprune.cli import app

    (tmp_path / "iterate_nets.py").write_text(NETS)
    (tmp_path / "graphprune.toml").write_text(RECIPE)
    done = CliRunner().invoke(app, ["optimize", "--recipe", str(tmp_path / "graphprune.toml"), "--json"])
    assert done.exit_code == 0, done.output
    assert "pruned and trained in 3 rounds" in done.stdout
    saved = Saved.read(tmp_path / "state")
    assert saved is not None
    assert saved.done == whole.rounds
    artifact = graphprune.load(tmp_path / "build")
    x = torch.randn(1, 1, 6, 6)
    torch.testing.assert_close(artifact(x), whole.module(x).detach(), atol=1e-4, rtol=1e-3)
    text = RECIPE.replace('loss = "iterate_nets:loss"', 'loss = "iterate_nets:nn.functional.cross_entropy"')
    (tmp_path / "graphprune.toml").write_text(text)
    again = CliRunner().invoke(
        app, ["optimize", "--recipe", str(tmp_path / "graphprune.toml"), "--overwrite"]
    )
    assert again.exit_code == 3
    assert "[iterate] loss='iterate_nets:loss', and this run has" in " ".join(again.stderr.split())


def test_calibration_inputs_that_come_once_serve_rounds_and_build(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from graphprune.cli import app

    (tmp_path / "iterate_nets.py").write_text(NETS)
    again = "prune-channels{params=0.9 importance=reconstruction align=1}"
    text = RECIPE.replace("epochs = 2", "epochs = 0").replace("per-round = 0.22", "per-round = 0.4")
    (tmp_path / "graphprune.toml").write_text(
        f'calibration = "iterate_nets:inputs"\npipeline = "{again}"\n{text}'
    )
    done = CliRunner().invoke(
        app, ["optimize", "--recipe", str(tmp_path / "graphprune.toml"), "--backend", "onnxruntime", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert "pruned and trained in 2 rounds" in done.stdout
