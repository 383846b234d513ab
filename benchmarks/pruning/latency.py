"""Pruning to a latency budget, against as many MACs with widths as they come.

    python -m benchmarks.pruning.latency                     four networks, written to benchmarks/results
    python -m benchmarks.pruning.latency crepe-full          that one again; the other rows stay
    python -m benchmarks.pruning.latency --budgets 0.6 --rounds 40

Each network is pruned by `optimize(latency=…)`, and once more by the same importance to the MACs that
this left, with alignment 1. The unpruned artifact (twice, as the measure of noise) and the two pruned ones
are then timed afresh: each in a process of its own, in turns, in a balanced order. All are fp32 artifacts of
ONNX Runtime with the same lossless passes. Nothing is said about accuracy, and nothing is repaired: sizes
decide latency.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphprune
from benchmarks.record import RESULTS, conditions, table
from graphprune.measure import Ratio, Timing, isolated, ratio
from graphprune.pipeline import LOSSLESS

THREADS = 1
TURN = 0.1  # seconds that a timed turn lasts: several slices of a processor that others use, too
PAUSE = 0.02
BUDGETS = (0.7, 0.5)
HEAD = ("network", "budget", "MACs left", "latency, measured", "met", "unaligned, same MACs",
        "ours / unaligned", "noise", "unpruned, ms", "probes")  # fmt: skip
ABOUT = """# Pruned to a latency budget

Written by `python -m benchmarks.pruning.latency`: fp32, batch 1, ONNX Runtime with one thread, l2
importance. The budget is a share of the unpruned artifact's latency. *Latency, measured* is the pruned
artifact's share of it in a new measurement after the search, each artifact in a process of its own: medians
of per-round ratios, with quartiles. *Met* is *yes* where that median is within the budget, and *within
noise* where it is above by less than the unpruned artifact differs from itself. *Unaligned* is the same
importance down to the same MACs with widths as they come. *Noise* is the unpruned artifact against itself
in another process, *probes* are the measurements that the search took.
"""


@dataclass(frozen=True)
class Row:
    """One network and budget; ratios are to the unpruned artifact unless they say otherwise."""

    network: str
    budget: float
    macs: float
    unaligned_macs: float
    ours: Ratio
    unaligned: Ratio
    ours_to_unaligned: Ratio
    noise: Ratio
    unpruned_ms: float
    rounds: int
    search: list[str]
    conditions: dict[str, str] = field(default_factory=dict)

    @property
    def met(self) -> str:
        """``yes``, ``within noise`` or ``no``."""
        if self.ours.median <= self.budget:
            return "yes"
        band = max(abs(self.noise.median - 1), self.noise.high - self.noise.median)
        return "within noise" if self.ours.median <= self.budget * (1 + band) else "no"

    def cells(self) -> list[str]:
        """The columns of `HEAD`."""
        return [
            self.network, f"{self.budget:g}", f"{self.macs:.3f}", _three(self.ours), self.met,
            f"{_three(self.unaligned)} at {self.unaligned_macs:.3f}", _three(self.ours_to_unaligned),
            _three(self.noise), f"{self.unpruned_ms:.1f}", str(len(self.search) - 1),
        ]  # fmt: skip


def _three(value: Ratio) -> str:
    return f"{value.median:.3f} ({value.low:.3f} to {value.high:.3f})"


def _torchvision(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from benchmarks.runtime.networks import _from_torchvision

    return _from_torchvision(name), (torch.randn(1, 3, 224, 224),)


def _shipped(name: str, *shape: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from benchmarks.pruning import real

    return real.define(name), (torch.randn(1, *shape),)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]] = {
    "resnet18": partial(_torchvision, "resnet18"),
    "mobilenet_v2": partial(_torchvision, "mobilenet_v2"),
    "efficientnet-lite0": partial(_shipped, "efficientnet-lite0", 3, 224, 224),
    "crepe-full": partial(_shipped, "crepe-full", 1024),
}


def opened(directory: str, inputs: tuple[torch.Tensor, ...], repeat: int) -> Callable[[], Any]:
    """A saved artifact as a call without arguments; runs in the process that measures."""
    runner = graphprune.load(directory, threads=THREADS)

    def call() -> None:
        for _ in range(repeat):
            runner(*inputs)

    return call


def examine(name: str, budget: float, rounds: int) -> Row:
    """Prune to the budget, prune to the same MACs without alignment, measure both afresh."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()

    def build(**options: Any) -> graphprune.Result:
        return graphprune.optimize(model, inputs, target="cpu", measure=False, threads=THREADS, **options)

    whole = build()
    ours = build(latency=budget, importance="l2", repair=False)
    left = ours.report.final.macs
    odd = build(pipeline=f"prune-channels{{macs={left} importance=l2 align=1}},{LOSSLESS}")
    with tempfile.TemporaryDirectory() as folder:
        places = {}
        for label, result in (("whole", whole), ("ours", ours), ("unaligned", odd)):
            places[label] = str(result.save(Path(folder) / label))
        places["whole again"] = places["whole"]
        # Turns of one length: in a shorter one, fewer slices of the processor go to others.
        calls = {label: _calls(place, inputs) for label, place in places.items()}
        calls["whole again"] = calls["whole"]
        factories = {label: partial(opened, place, inputs, calls[label]) for label, place in places.items()}
        turns = isolated(factories, rounds=rounds, threads=THREADS, pause=PAUSE)
        timings = {label: _each(timing, calls[label]) for label, timing in turns.items()}
    before = whole.report.original.macs
    notes = [note.message for note in ours.report.passes[0].notes if note.where == "latency"]
    return Row(
        network=name, budget=budget, macs=left / before, unaligned_macs=odd.report.final.macs / before,
        ours=ratio(timings["ours"], timings["whole"]),
        unaligned=ratio(timings["unaligned"], timings["whole"]),
        ours_to_unaligned=ratio(timings["ours"], timings["unaligned"]),
        noise=ratio(timings["whole again"], timings["whole"]),
        unpruned_ms=timings["whole"].median_ms,
        rounds=rounds,
        search=notes,
        conditions=conditions(("torch", "onnxruntime")),
    )  # fmt: skip


def _calls(directory: str, inputs: tuple[torch.Tensor, ...]) -> int:
    """How many calls of an artifact fill a turn."""
    once = opened(directory, inputs, 1)
    lasted = []
    for _ in range(10):
        start = time.perf_counter()
        once()
        lasted.append(time.perf_counter() - start)
    return max(1, round(TURN / min(lasted)))


def _each(turn: Timing, calls: int) -> Timing:
    """The timing of one call, from that of a turn of several."""
    return replace(
        turn,
        median_ms=turn.median_ms / calls,
        low_ms=turn.low_ms / calls,
        high_ms=turn.high_ms / calls,
        samples=tuple(ms / calls for ms in turn.samples),
    )


def write(rows: list[Row]) -> Path:
    """`latency.md` and `latency.json`: these rows, and the files' rows of other networks or budgets."""
    path = RESULTS / "latency.json"
    known = [_row(each) for each in json.loads(path.read_text())["rows"]] if path.exists() else []
    found = {(row.network, row.budget): row for row in (*known, *rows)}
    order = list(NETWORKS)
    rows = sorted(found.values(), key=lambda row: (order.index(row.network), -row.budget))
    path.write_text(json.dumps({"rows": [asdict(row) | {"met": row.met} for row in rows]}, indent=1) + "\n")
    loads = "\n".join(
        f"- {row.network} to {row.budget:g}: {row.rounds} rounds, "
        + ", ".join(f"{key} {value}" for key, value in row.conditions.items())
        for row in rows
    )
    searches = "\n".join(
        f"\n{row.network} to {row.budget:g}\n\n" + "\n".join(f"- {line}" for line in row.search)
        for row in rows
    )
    body = f"{ABOUT}\n{table(HEAD, [row.cells() for row in rows])}\n"
    text = f"{body}\n## Conditions\n\n{loads}\n\n## What the searches measured\n{searches}\n"
    path.with_suffix(".md").write_text(text)
    return path.with_suffix(".md")


def _row(document: dict[str, Any]) -> Row:
    ratios = ("ours", "unaligned", "ours_to_unaligned", "noise")
    values: dict[str, Any] = {
        key: Ratio(**value) if key in ratios else value for key, value in document.items()
    }
    del values["met"]
    return Row(**values)


def main() -> int:
    """Measure, print and write row by row; 1 if a budget was missed by more than the noise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning.latency", description=__doc__)
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}; default: all")
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--rounds", type=int, default=32, help="a multiple of four balances the order")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    torch.set_num_threads(THREADS)
    print(" | ".join(HEAD), flush=True)
    missed = False
    for name in options.networks or NETWORKS:
        for budget in options.budgets:
            row = examine(name, budget, options.rounds)
            missed = missed or row.met == "no"
            print(" | ".join(row.cells()), flush=True)
            path = write([row])
    print(f"written to {path}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
