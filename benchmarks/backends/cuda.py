"""The same networks on a GPU: `torch.compile` and AOTInductor, in float16, pruned and with 2:4 weights.

    python -m benchmarks.backends.cuda                    all networks, written to benchmarks/results/cuda.md
    python -m benchmarks.backends.cuda vit_tiny --batches 8

Where there is no NVIDIA GPU it says "not run", writes nothing and exits with 0. Times are of whole calls with
inputs and outputs on the GPU's host, as deployment has them, each ended by a synchronisation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

import graphprune
from benchmarks.backends.networks import Setup
from benchmarks.record import RESULTS, conditions, page, table
from graphprune.measure import Timing, interleaved, ratio
from graphprune.pipeline import LOSSLESS

NETWORKS = ("resnet18", "resnet50", "vit_tiny", "bert-mini")
NOT_RUN = "not run: no NVIDIA GPU here"
HALF = "half-precision{dtype=float16}"
PRUNED = "prune-channels{macs=0.5}"
SPARSE = "prune-weights{pattern=2:4},strip-masks"
FORMS: Mapping[str, str] = {
    "float32": LOSSLESS,
    "float16": f"{LOSSLESS},{HALF}",
    "pruned, float16": f"{PRUNED},{LOSSLESS},{HALF}",
    "2:4, float16": f"{SPARSE},{LOSSLESS},{HALF}",
}
PLAIN = "eager, float32"
HEAD = (
    "network",
    "batch",
    "form",
    "compiled, ms",
    "to eager",
    "AOTInductor, ms",
    "to eager",
    "error",
    "notes",
)


def measure(name: str, batch: int, rounds: int) -> list[list[str]]:
    """Rows of `HEAD`: everything of one network in turns, in one process."""
    setup = Setup(name, batch)
    model, inputs = setup.model(), setup.inputs()
    there = setup.model().cuda()
    calls: dict[str, Callable[[], Any]] = {PLAIN: partial(_eager, there, inputs)}
    made = {}
    for form, passes in FORMS.items():
        result = graphprune.optimize(
            model, inputs, target="cuda", backend="inductor", pipeline=passes, measure=False
        )
        made[form] = result
        calls[f"compiled, {form}"] = partial(_called, result.compiled(), inputs)
        calls[f"AOTInductor, {form}"] = partial(_called, result, inputs)
    timings = interleaved(calls, rounds=rounds, warmup=5)
    plain = timings[PLAIN]
    rows = [[name, str(batch), PLAIN, "–", "–", "–", "–", "–", f"{plain.median_ms:.3f} ms"]]
    for form, result in made.items():
        errors = [c.max_relative for what, c in result.report.certificates.items() if "against graph" in what]
        sparse = sum("sparse product" in note for note in result.report.notes)
        said = f"{sparse} sparse products" if sparse else ""
        rows.append([
            name, str(batch), form, *_cells(timings, f"compiled, {form}"),
            *_cells(timings, f"AOTInductor, {form}"), f"{max(errors):.1e}", said,
        ])  # fmt: skip
    return rows


def _cells(timings: Mapping[str, Timing], name: str) -> tuple[str, str]:
    return f"{timings[name].median_ms:.3f}", str(ratio(timings[name], timings[PLAIN]))


def _eager(model: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        outputs = model(*(value.cuda() for value in inputs))
    (outputs if isinstance(outputs, torch.Tensor) else next(iter(outputs.values()))).cpu()


def _called(run: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> None:
    run(*inputs)  # gives its results on the host, so it has ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write, or say that there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backends.cuda", description=__doc__)
    parser.add_argument("networks", nargs="*", metavar="network", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 8))
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NOT_RUN)
        return 0
    rows = []
    for batch in options.batches:
        for name in options.networks or NETWORKS:
            rows += measure(name, batch, options.rounds)
            print(table(HEAD, rows), flush=True)
    facts = conditions(("torch",)) | {"GPU": torch.cuda.get_device_name()}
    page(RESULTS / "cuda.md", "backends.cuda", "On a GPU", table(HEAD, rows), rows, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
