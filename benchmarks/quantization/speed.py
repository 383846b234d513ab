"""Latency, size and precision of every method on one network."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quantization import measure
from benchmarks.quantization.cases import Case
from benchmarks.quantization.methods import OURS, Job, Made, Method, make
from graphprune.measure import Ratio, Timing, ratio

PLAIN, AGAIN = "onnxruntime fp32", "onnxruntime fp32, again"


@dataclass(frozen=True)
class Row:
    """One method on one network; the plain float export where the tool is empty.

    Attributes:
        threads: of the runtime.
        ms: of one run.
        to_float: latency to that of the plain float export, median and quartiles of rounds.
        to_ours: the same to our file of that kind, static or dynamic.
        size: bytes to those of the plain float export.
        integers: share of multiply-accumulates of convolutions and products in int8; ``None`` if unknown.
        unfused: quantizers and dequantizers that the runtime runs on their own.
        error: norm of the difference to float outputs over their norm, on held-out inputs.
        operators: that the runtime runs, and how many of each.
        reasons: why operators are not in int8, as the audit says.
        seconds: that quantization took.
        failure: why there are no figures.
    """

    network: str
    tool: str
    variant: str
    threads: int = 1
    ms: float | None = None
    to_float: Ratio | None = None
    to_ours: Ratio | None = None
    size: float | None = None
    integers: float | None = None
    unfused: int | None = None
    error: float | None = None
    operators: dict[str, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    seconds: float = 0.0
    failure: str = ""

    @property
    def dynamic(self) -> bool:
        """Whether ranges of activations are taken anew in every call."""
        return "dynamic" in self.variant


def job_of(case: Case, folder: Path) -> tuple[Job, Path]:
    """The files that methods are given, and held-out inputs."""
    samples, held_out = case.parts()
    model = folder / "float.onnx"
    measure.export(case.build(), samples[0], model)
    calibration = measure.arrays(samples, model, folder / "calibration.npz")
    return Job(case, folder, model, calibration), measure.arrays(held_out, model, folder / "held-out.npz")


def compare(
    case: Case, methods: Sequence[Method], rounds: int, threads: Sequence[int]
) -> tuple[list[Row], dict[str, str]]:
    """All rows of one network, and versions of the tools that made them."""
    with tempfile.TemporaryDirectory() as place:
        job, held_out = job_of(case, Path(place))
        wanted = measure.outputs(job.model, held_out)
        plain = Method("", PLAIN, lambda job, path: {})
        made = [Made(plain, job.model, 0.0), *(make(m, job) for m in methods if m.suits(case))]
        facts = {id(each): _facts(each, job, held_out, wanted) for each in made}
        runs = [each for each in made if each.path is not None and "failure" not in facts[id(each)]]
        files = {each.method.label: each.path for each in runs if each.path is not None}
        files[AGAIN] = job.model
        rows = []
        for count in threads:
            timings, repeat = measure.latencies(files, held_out, rounds, count)
            for each in made:
                rows.append(_row(case.name, each, count, facts[id(each)], timings, repeat))
            rows.append(Row(case.name, "", AGAIN, count, **_times(AGAIN, timings, repeat)))
    versions = {name: version for each in made for name, version in each.versions.items()}
    return rows, versions


def _facts(made: Made, job: Job, held_out: Path, wanted: list[Any]) -> dict[str, Any]:
    """What is known of a file without timing it; ``failure`` where the runtime does not run it."""
    if made.path is None:
        return {"failure": made.failure}
    try:
        found: dict[str, Any] = {
            "size": measure.size(made.path) / measure.size(job.model),
            "error": measure.relative_error(measure.outputs(made.path, held_out), wanted),
        }
        if made.path.suffix == ".onnx":
            audit = measure.audit(made.path)
            edges = ("QuantizeLinear", "DequantizeLinear")
            found |= {
                "integers": measure.in_integers(audit), "operators": audit.counts,
                "unfused": sum(audit.counts.get(kind, 0) for kind in edges),
                "reasons": sorted({f"{row.operator}: {row.reason}" for row in audit.rows if row.reason}),
            }  # fmt: skip
    except Exception as error:  # whatever the runtime says of another tool's file is that tool's result
        return {"failure": f"does not run: {type(error).__name__}: {str(error).splitlines()[0][:160]}"}
    return found


def _row(
    network: str, made: Made, threads: int, facts: dict[str, Any], timings: dict[str, Timing], repeat: int
) -> Row:
    label = made.method.label
    times = _times(label, timings, repeat) if label in timings else {}
    found = facts | times | {"seconds": made.seconds}
    return Row(network, made.method.tool, made.method.variant, threads, **found)


def _times(label: str, timings: dict[str, Timing], repeat: int) -> dict[str, Any]:
    ours = f"{OURS}, {'dynamic' if 'dynamic' in label else 'int8'}"
    found: dict[str, Any] = {
        "ms": timings[label].median_ms / repeat,
        "to_float": ratio(timings[label], timings[PLAIN]),
    }
    if ours in timings:
        found["to_ours"] = ratio(timings[label], timings[ours])
    return found
