"""TVM tuned from nothing, killed half-way and resumed: the latency it has after every minute, against ONNX
Runtime.

    python -m benchmarks.backends.tvm_curve --seconds 600

For each network, a process tunes into a database that was empty. At half of the budget it is killed
(``SIGKILL``) and started again on the same database. The database is copied at each checkpoint; afterwards a
library is compiled from every copy, and all of them and ONNX Runtime's artifact of the same graph run in
turns, each in a process of its own. Written to ``benchmarks/results/tvm.*``, with what each product reaches
beside what oneDNN (eager torch) needs for it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import graphprune
from benchmarks.record import conditions
from benchmarks.runtime import networks
from graphprune.backend import Lowered
from graphprune.measure import Timing, isolated, ratio
from graphprune.pipeline import Pipeline
from graphprune.registry import backends
from graphprune.target import get

NETWORKS = ("resnet18", "mobilenet_v2")
CHECKPOINTS = (30, 60, 120, 240, 480, 960, 1800)  # seconds
RESULTS = Path(__file__).parents[1] / "results"
REFERENCE = "ONNX Runtime"
PASSES = "fold-batch-norm,clean-up,fold-constants"


@dataclass(frozen=True)
class Point:
    """A library compiled from what the database held after ``seconds``; 0 is before tuning.

    Attributes:
        products: sum of the products' best times then, ms; ``None`` before every product had one.
        ratio, low, high: of its latency to ONNX Runtime's, by number of threads: median and quartiles.
    """

    seconds: float
    products: float | None
    ms: dict[str, float]
    ratio: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]


@dataclass(frozen=True)
class Curve:
    """One network. ``products`` has a row for each product; ``steps`` are (seconds, sum of best times in
    ms)."""

    network: str
    budget: float
    killed: float
    lines_at_kill: int
    tried: int
    steps: list[tuple[float, float]]
    points: list[Point]
    reference_ms: dict[str, float]
    products: list[dict[str, Any]]


def network(name: str) -> networks.Timed:
    """A network of torchvision at 224 pixels, batch 1."""
    return networks._vision(name)


def graph_of(name: str) -> graphprune.Graph:
    """What both runtimes get: batch norms folded, nothing else."""
    timed = network(name)
    return Pipeline.parse(PASSES).run(graphprune.trace(timed.build(), timed.args())).graph


def tune_here(name: str, seconds: float, database: Path, threads: int) -> None:
    """Tune, and print a JSON line for every candidate (the child process of :func:`tuned`)."""
    from graphprune.backends.tvm_tuning import Progress, tune

    def say(at: Progress) -> None:
        print(json.dumps(asdict(at)), flush=True)

    tune(graph_of(name), get("cpu"), seconds=seconds, database=database, threads=threads, progress=say)


def tuned(name: str, seconds: float, folder: Path, threads: int) -> dict[str, Any]:
    """Two processes, one after the other, the first killed; copies of the database at the checkpoints."""
    database = folder / "tvm.jsonl"
    copies: dict[float, float | None] = {}
    steps: list[tuple[float, float]] = []
    spent, killed, lines, tried = 0.0, 0.0, 0, 0
    for share in (0.5, 1.0):
        command = [
            sys.executable, "-m", "benchmarks.backends.tvm_curve", "--tune", name,
            "--database", str(database), "--seconds", str(seconds - spent), "--threads", str(threads),
        ]  # fmt: skip
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        at = 0.0
        for line in child.stdout:
            progress = json.loads(line)
            at, tried = progress["seconds"], progress["tried"]
            now = spent + at
            if progress["ms"] is not None and (not steps or progress["ms"] < steps[-1][1]):
                steps.append((now, progress["ms"]))
            for checkpoint in CHECKPOINTS:
                if now >= checkpoint and checkpoint not in copies and checkpoint < seconds:
                    shutil.copy(database, folder / f"{checkpoint}.jsonl")
                    copies[checkpoint] = progress["ms"]
            if share < 1 and now >= share * seconds:
                child.send_signal(signal.SIGKILL)
                killed, lines = now, len(database.read_text().splitlines())
                break
        child.wait()
        spent += at
    shutil.copy(database, folder / f"{spent:.0f}.jsonl")
    copies[float(f"{spent:.0f}")] = steps[-1][1] if steps else None
    return {"copies": copies, "steps": steps, "killed": killed, "lines": lines, "tried": tried}


def keep(lowered: Lowered, folder: Path) -> None:
    """The files of an artifact, to be opened in another process."""
    folder.mkdir(parents=True)
    for name, content in lowered.files.items():
        (folder / name).write_bytes(content)
    torch.save((lowered.backend, lowered.inputs, lowered.outputs), folder / "about")


def opened(folder: Path, name: str, threads: int) -> Callable[[], Any]:
    """A call of an artifact that :func:`keep` wrote."""
    backend, inputs, outputs = torch.load(folder / "about", weights_only=False)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "about"}
    runner = backends.load(backend)().open(files, inputs, outputs, get("cpu"), threads)
    return partial(runner, *network(name).args())


def curve(name: str, seconds: float, rounds: int, threads: Sequence[int], folder: Path) -> Curve:
    """Tune a network on one thread, then time what came out at every checkpoint."""
    from graphprune.backends.tvm_lowering import lower

    found = tuned(name, seconds, folder, 1)
    graph, target = graph_of(name), get("cpu")
    copies = {0.0: None, **found["copies"]}
    places = {f"{at:g}": folder / f"library-{at:g}" for at in copies}
    for at in copies:
        keep(lower(graph, target, database=folder / f"{at:g}.jsonl"), places[f"{at:g}"])
    places[REFERENCE] = folder / "onnx"
    keep(backends.load("onnxruntime")().lower(graph, target), places[REFERENCE])
    timings: dict[str, dict[str, Timing]] = {}
    for count in threads:
        calls = {label: partial(opened, place, name, count) for label, place in places.items()}
        timings[str(count)] = isolated(calls, rounds=rounds, warmup=3, threads=count, pause=0.02)
    points = []
    for at, products in copies.items():
        ratios = {t: ratio(all_[f"{at:g}"], all_[REFERENCE]) for t, all_ in timings.items()}
        points.append(Point(
            at, products, {t: all_[f"{at:g}"].median_ms for t, all_ in timings.items()},
            {t: r.median for t, r in ratios.items()}, {t: r.low for t, r in ratios.items()},
            {t: r.high for t, r in ratios.items()},
        ))  # fmt: skip
    reference = {t: all_[REFERENCE].median_ms for t, all_ in timings.items()}
    return Curve(
        name, seconds, found["killed"], found["lines"], found["tried"], found["steps"], points, reference,
        products_of(graph, folder / "tvm.jsonl"),
    )  # fmt: skip


def products_of(graph: graphprune.Graph, database: Path) -> list[dict[str, Any]]:
    """Every product with its best time beside oneDNN's, both on one thread, by the processor time they
    take."""
    from graphprune.backends.tvm_database import Database, workload
    from graphprune.backends.tvm_import import imported
    from graphprune.backends.tvm_machine import machine
    from graphprune.backends.tvm_pipeline import fused, tasks

    made_for = machine(get("cpu"))
    known = Database(made_for, database).measured()
    rows = []
    for task in tasks(fused(imported(graph), made_for)):
        times = [m.ms for m in known.get(workload(task.function), ()) if m.ms is not None]
        if task.work is None or not times:
            continue
        buffers = [[int(s) for s in p.shape] for p in task.function.params[:2]]
        flops = 2e-6 * task.work.macs
        other = _onednn(task.work.kind, buffers[0], buffers[1], task.work.spatial)
        rows.append({
            "product": task.name, "kind": task.work.kind, "output": list(task.work.spatial),
            "sums": list(task.work.reduction), "calls": task.calls, "ms": min(times),
            "gflops": flops / min(times), "onednn_ms": other, "onednn_gflops": flops / other,
            "measured": len(times),
        })  # fmt: skip
    return rows


def _onednn(kind: str, source: list[int], weight: list[int], output: Sequence[int]) -> float:
    """Milliseconds of eager torch for the same product, channels last, nothing fused behind it."""
    if kind == "dense":
        linear = torch.nn.Linear(source[-1], output[-1]).eval()
        return _timed(partial(linear, torch.randn(source)))
    channels = source[1] * (source[4] if len(source) == 5 else 1)
    outputs = output[1] * output[4]
    high, wide = weight[1:3] if kind == "depthwise" else weight[2:4]
    stride = max(1, round(source[2] / output[2]))
    conv = torch.nn.Conv2d(
        channels, outputs, (high, wide), stride, (high // 2, wide // 2),
        groups=channels if kind == "depthwise" else 1,
    ).eval()  # fmt: skip
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    x = torch.randn(source[0], channels, source[2], source[3]).to(memory_format=torch.channels_last)
    return _timed(partial(conv, x))


def _timed(call: Callable[[], Any]) -> float:
    torch.set_num_threads(1)
    best = float("inf")
    with torch.no_grad():
        for turn in range(40):
            start = time.thread_time_ns()
            call()
            best = min(best, (time.thread_time_ns() - start) / 1e6) if turn else best
    return best


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, time, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backends.tvm_curve", description=__doc__)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--seconds", type=float, default=900.0, help="to tune each network")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--tune", help=argparse.SUPPRESS)
    parser.add_argument("--database", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.tune:
        tune_here(options.tune, options.seconds, options.database, options.threads[0])
        return 0
    from benchmarks.backends.tvm_table import write

    curves = []
    for name in options.networks:
        with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
            curves.append(curve(name, options.seconds, options.rounds, options.threads, Path(folder)))
        facts = conditions(("torch", "torchvision", "onnxruntime", "apache-tvm"))
        print(f"{name}: written to {write(curves, facts, RESULTS)}", flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
