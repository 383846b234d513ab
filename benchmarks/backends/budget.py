"""Latency budgets: what the table of operators foretells, and what is measured.

    python -m benchmarks.backends.budget                        all networks, written to benchmarks/results
    python -m benchmarks.backends.budget resnet18/inductor      that one again; the other rows stay

For each network the table is filled ahead of time (`graphprune tune`), then the network is pruned to half its
latency, as `optimize(latency=0.5)` does it. The pruned and the unpruned artifact (twice, as the measure of
noise) are then measured afresh, opened several times, in turns. One thread, batch 1, fp32, l2 importance;
nothing is repaired, as sizes decide latency. Nothing is said about accuracy.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.record import RESULTS, conditions, table
from graphprune.frontend.capture import capture
from graphprune.graph import Graph
from graphprune.latency import solve
from graphprune.latency.tuning import tune
from graphprune.lowering import candidates as backends_for
from graphprune.measure import Ratio, ratio
from graphprune.pipeline import LOSSLESS, Context, Pipeline
from graphprune.plans.candidates import Candidates, Limits
from graphprune.sittings import in_sittings
from graphprune.target import get

THREADS = 1
BUDGET = 0.5
Case = tuple[nn.Module, tuple[torch.Tensor, ...], Mapping[str, torch.Tensor]]
HEAD = ("network", "runtime", "predicted", "corrected", "measured", "predicted / measured",
        "corrected / measured", "met", "noise", "unpruned, ms", "MACs left", "probes", "plan, s", "table, s",
        "operators")  # fmt: skip
ABOUT = f"""# Latency budgets: predicted and measured

Written by `python -m benchmarks.backends.budget`: the budget is {BUDGET:g} of the unpruned artifact's
latency; fp32, batch 1, one thread, l2 importance. All latencies are shares of the unpruned artifact's.
*Predicted* is what the table of single operators says of the chosen plan, with nothing measured of any
pruned network; *corrected* is what was expected of it just before it was measured first, after the
probes before it. *Measured* is a new measurement after the search, both artifacts opened anew four
times, in turns: median of the turns' ratios, with quartiles. *Met* is *yes* where that median is within
the budget, *within noise* where it is above by less than the unpruned artifact differs from itself
(*noise*). *Probes* are pruned networks that the search timed, *plan* the time it took with the table
filled, *table* the time that took, and *operators* how many were measured in it.
"""


@dataclass(frozen=True)
class Row:
    """One network on one runtime; latencies are shares of the unpruned artifact's."""

    network: str
    backend: str
    predicted: float
    corrected: float
    searched: float
    measured: Ratio
    noise: Ratio
    unpruned_ms: float
    macs: float
    probes: int
    plan_seconds: float
    table_seconds: float
    operators: int
    notes: list[str]
    conditions: dict[str, str] = field(default_factory=dict)

    @property
    def met(self) -> str:
        """``yes``, ``within noise`` or ``no``."""
        if self.measured.median <= BUDGET:
            return "yes"
        band = max(abs(self.noise.median - 1), self.noise.high - self.noise.median)
        return "within noise" if self.measured.median <= BUDGET * (1 + band) else "no"

    def cells(self) -> list[str]:
        """The columns of `HEAD`."""
        return [
            self.network, self.backend, f"{self.predicted:.3f}", f"{self.corrected:.3f}",
            _three(self.measured), f"{self.predicted / self.measured.median:.2f}",
            f"{self.corrected / self.measured.median:.2f}", self.met, _three(self.noise),
            f"{self.unpruned_ms:.1f}", f"{self.macs:.3f}", str(self.probes), f"{self.plan_seconds:.0f}",
            f"{self.table_seconds:.0f}", str(self.operators),
        ]  # fmt: skip


def _three(value: Ratio) -> str:
    return f"{value.median:.3f} ({value.low:.3f} to {value.high:.3f})"


def _torchvision(name: str) -> Case:
    from benchmarks.runtime.networks import _from_torchvision

    return _from_torchvision(name), (torch.randn(1, 3, 224, 224),), {}


def _shipped(name: str) -> Case:
    from benchmarks.pruning import real

    return real.define(name), (torch.randn(1, 3, 224, 224),), {}


def _vit() -> Case:
    from tests.zoo import torchvision_schemas

    torchvision_schemas.declare()
    import timm

    model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    return model, (torch.randn(1, 3, 224, 224),), {}


def _bert() -> Case:
    from benchmarks.runtime.networks import get as timed

    network = timed("bert")
    return network.build(), network.args(), network.kwargs()


NETWORKS: dict[str, Callable[[], Case]] = {
    "resnet18": partial(_torchvision, "resnet18"),
    "mobilenet_v2": partial(_torchvision, "mobilenet_v2"),
    "efficientnet-lite0": partial(_shipped, "efficientnet-lite0"),
    "vit_tiny": _vit,
    "bert-mini": _bert,
}
CASES = [f"{name}/onnxruntime" for name in NETWORKS] + ["resnet18/inductor", "bert-mini/inductor"]


def examine(case: str, rounds: int, seconds: float | None) -> Row:
    """Fill the table, prune to the budget, measure what came out once more."""
    name, backend = case.split("/")
    torch.manual_seed(0)
    model, args, kwargs = NETWORKS[name]()
    graph, target = capture(model, args, dict(kwargs) or None), get("cpu")
    tuned = tune(graph, target=target, backend=backend, threads=THREADS, seconds=seconds, progress=_say)
    begun = time.perf_counter()
    limits = Limits(channel_alignment=target.channel_alignment, linear_alignment=target.linear_alignment)
    plan, record = solve(
        graph, BUDGET, Candidates.of(graph, limits=limits), target, backend=backend, threads=THREADS,
        progress=partial(print, "  ", flush=True),
    )  # fmt: skip
    lasted = time.perf_counter() - begun
    whole, small = (_opener(g, backend) for g in (graph, graph.apply(plan)))
    timings = in_sittings(
        {"whole": whole, "pruned": small, "again": whole},
        rounds=rounds,
        sittings=4,
        turn=0.1,
        threads=THREADS,
    )
    notes = [line.partition("; kept in ")[0] for line in record.notes]  # where is this host's affair
    assert record.chosen.predicted is not None
    assert record.chosen.expected is not None
    return Row(
        name, backend, record.chosen.predicted, record.chosen.expected, record.chosen.ratio.median,
        ratio(timings["pruned"], timings["whole"]), ratio(timings["again"], timings["whole"]),
        timings["whole"].median_ms, record.chosen.share, sum(not p.fresh for p in record.probes[1:]), lasted,
        tuned.filled.seconds, tuned.filled.measured, notes,
        conditions(("torch", "onnxruntime")),
    )  # fmt: skip


def _opener(graph: Graph, backend: str) -> Callable[[], Callable[[], Any]]:
    target = get("cpu")
    (chosen,) = backends_for(backend, target)
    graph = Pipeline.parse(LOSSLESS).run(graph, Context(target)).graph
    lowered = chosen.lower(graph, target)

    def opened() -> Callable[[], Any]:
        runner = chosen.open(lowered.files, lowered.inputs, lowered.outputs, target, THREADS)
        return partial(runner, *graph.examples)

    return opened


def _say(done: float, total: float, label: str) -> None:
    if done % 10 == 0:
        print(f"   operator {done:.0f} of {total:.0f}: {label}", flush=True)


def write(rows: list[Row]) -> None:
    """`budget.md` and `budget.json`: these rows, and the files' rows of other cases."""
    path = RESULTS / "budget.json"
    known = [_row(each) for each in json.loads(path.read_text())["rows"]] if path.exists() else []
    found = {f"{row.network}/{row.backend}": row for row in (*known, *rows)}
    rows = [found[case] for case in CASES if case in found]
    path.write_text(json.dumps({"rows": [asdict(row) | {"met": row.met} for row in rows]}, indent=1) + "\n")
    loads = "\n".join(
        f"- {row.network} on {row.backend}: "
        + ", ".join(f"{key} {value}" for key, value in row.conditions.items())
        for row in rows
    )
    searches = "\n".join(
        f"\n{row.network} on {row.backend}\n\n" + "\n".join(f"- {line}" for line in row.notes) for row in rows
    )
    body = f"{ABOUT}\n{table(HEAD, [row.cells() for row in rows])}\n"
    text = f"{body}\n## Conditions\n\n{loads}\n\n## What the searches measured\n{searches}\n"
    path.with_suffix(".md").write_text(text)


def _row(document: dict[str, Any]) -> Row:
    values = {key: value for key, value in document.items() if key != "met"}
    for key in ("measured", "noise"):
        values[key] = Ratio(**values[key])
    return Row(**values)


def main() -> int:
    """Measure, print and write row by row; 1 if a budget was missed by more than the noise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backends.budget", description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--rounds", type=int, default=32)
    parser.add_argument("--seconds", type=float, help="of filling the table for each at most")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    torch.set_num_threads(THREADS)
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("GRAPHPRUNE_CACHE", folder)  # begun anew: how long that takes is a result
        for case in options.cases or CASES:
            print(case, flush=True)
            row = examine(case, options.rounds, options.seconds)
            missed = missed or row.met == "no"
            print(" | ".join(row.cells()), flush=True)
            write([row])
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
