"""Pruned, then quantized, in one `optimize` call: what is left of the score, and what was proved on the way.

Half of the multiply-accumulates go, the rest is repaired and becomes int8. The reports say of the removal
whether the smaller network is the original with masks (mask equivalence), and of the file whether it is the
graph that was quantized (runtime equivalence). How far the file is from the original is recorded, too.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import graphprune
from benchmarks.pruning.data import split
from benchmarks.quantization import measure
from benchmarks.quantization.cases import Case
from benchmarks.quantization.ours import content
from benchmarks.quantization.speed import job_of
from graphprune.errors import PassError
from graphprune.pipeline import LOSSLESS
from graphprune.report import Report
from graphprune.verify import Certificate

SHARE = 0.5  # of the multiply-accumulates that may be left
MASK, RUNTIME, ORIGINAL = "mask", "runtime", "end-to-end"  # kinds of certificates


@dataclass(frozen=True)
class Proof:
    """One certificate of a report.

    Attributes:
        title: of what.
        kind: :data:`MASK`, :data:`RUNTIME`, …
        exact: whether a tolerance had to hold; otherwise the error is only recorded.
        error: the largest, relative to the largest output.
    """

    title: str
    kind: str
    exact: bool
    passed: bool
    error: float


@dataclass(frozen=True)
class Pruned:
    """One network of one seed.

    Attributes:
        metric: what is scored, on inputs that no pass saw.
        plain, pruned, quantized: that score of the float export, of the file pruned to :data:`SHARE`, and of
            the file pruned and quantized in one call.
        left: multiply-accumulates of that network to the original's.
        integers: share of them that the runtime executes in int8; ``None`` if unknown.
        size: bytes of that file to those of the float export.
        proofs: the certificates in the report of that call.
        refusal: what `optimize` says to the same passes the other way round; empty where it takes them.
        seconds: that the one call took.
        failure: why there are no scores.
    """

    network: str
    seed: int
    metric: str = ""
    plain: float | None = None
    pruned: float | None = None
    quantized: float | None = None
    left: float | None = None
    integers: float | None = None
    size: float | None = None
    proofs: list[Proof] = field(default_factory=list)
    refusal: str = ""
    seconds: float = 0.0
    failure: str = ""

    def of(self, kind: str) -> list[Proof]:
        """Certificates of a kind."""
        return [proof for proof in self.proofs if proof.kind == kind]

    @property
    def proved(self) -> bool:
        """Whether there are certificates of the removal and of the file, and all of them hold."""
        return all(held(self.of(kind)) for kind in (MASK, RUNTIME))


def held(proofs: Sequence[Proof]) -> bool:
    """Whether there are any, all of them held to a tolerance, and within it."""
    return bool(proofs) and all(proof.exact and proof.passed for proof in proofs)


def compare(case: Case) -> Pruned:
    """The row of one network."""
    if case.metrics is None:
        raise ValueError(f"{case.name} has no weights that were trained, so there is no score to lose")
    row = Pruned(case.name, case.seed)
    with tempfile.TemporaryDirectory() as place:
        job, _ = job_of(case, Path(place))

        metric, plain = next(iter(case.metrics(measure.network(job.model)).items()))

        def scored(path: Path) -> float:
            assert case.metrics is not None
            return next(iter(case.metrics(measure.network(path)).values()))

        row = replace(row, metric=metric, plain=plain, refusal=refusal(case))
        try:
            small, large = Path(place, "pruned.onnx"), Path(place, "pruned-int8.onnx")
            small.write_bytes(content(_optimized(case, macs=SHARE)))
            started = time.perf_counter()
            result = _optimized(case, macs=SHARE, precision="int8")
            seconds = time.perf_counter() - started
            large.write_bytes(content(result))
            return replace(
                row, pruned=scored(small), quantized=scored(large),
                left=result.report.final.macs / result.report.original.macs,
                integers=measure.in_integers(measure.audit(large)),
                size=measure.size(large) / measure.size(job.model),
                proofs=proofs(result.report), seconds=seconds,
            )  # fmt: skip
        except Exception as error:  # a network that cannot be pruned and quantized is a row that says why
            return replace(row, failure=f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")


def _optimized(case: Case, **options: Any) -> graphprune.Result:
    """For any batch, which repair reads many inputs in; proved at batches of 1 and 7."""
    data = split(case.name)
    return graphprune.optimize(
        case.build(), data.example, target="cpu", dynamic_batch=True, calibration=data.calibration,
        measure=False, threads=1, **options,
    )  # fmt: skip


def refusal(case: Case) -> str:
    """What is said to quantizing first and pruning then."""
    try:
        _optimized(case, pipeline=f"{LOSSLESS},quantize,prune-channels{{macs={SHARE}}}")
    except PassError as error:
        return str(error)
    return ""


def proofs(report: Report) -> list[Proof]:
    """All certificates: of removals, of every pass that changed something, and of the whole."""
    found: list[tuple[str, Certificate | None]] = []
    for record in report.passes:
        found += [(f"{record.text} against masks", record.mask), (record.text, record.certificate)]
    found += report.certificates.items()
    return [Proof(title, c.kind, c.exact, c.passed, c.max_relative) for title, c in found if c is not None]
