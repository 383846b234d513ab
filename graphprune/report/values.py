"""The values a report is made of. Plain and frozen: rendering them is :mod:`.sections`' and others' work."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from ..backend import Audit, TensorSpec, integer_share
from ..choice import Contestant
from ..cost import Cost
from ..instruments import PassRecord
from ..measure import Ratio, Timing
from ..target import Target
from ..verify import Certificate


@dataclass(frozen=True)
class Latency:
    """Original (eager PyTorch) and artifact called in turn on this host, or why they were not.

    Attributes:
        original, artifact: ms a call at the example inputs; ``None`` where nothing was measured.
        speedup: how many times faster the artifact is, round by round.
        unrounded: the artifact's graph without its integers, on the same backend; ``None`` for a float one.
        gain: how many times faster the artifact is than that.
        threads: what both were asked to use; ``None`` is each runtime's own default.
        host: what it was measured on.
        reason: why there is no number, else empty.
    """

    original: Timing | None = None
    artifact: Timing | None = None
    speedup: Ratio | None = None
    unrounded: Timing | None = None
    gain: Ratio | None = None
    threads: int | None = None
    host: str = ""
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values; the samples of every round stay out."""
        values = asdict(self)
        for timing in (values["original"], values["artifact"], values["unrounded"]):
            if timing is not None:
                del timing["samples"]
        return values


@dataclass(frozen=True)
class AuditSummary:
    """What the runtime executes: operators by kind and precision, and those that are not as asked.

    Attributes:
        operators: (kind, precision, count, MACs), most frequent first.
        fallbacks: (operator name, kind, precision, reason).
        integers: share of the multiply-accumulates in integers, 0 to 1.
    """

    operators: tuple[tuple[str, str, int, int], ...]
    fallbacks: tuple[tuple[str, str, str, str], ...]
    integers: float = 0.0

    @staticmethod
    def of(audit: Audit) -> AuditSummary:
        """The summary of an audit's rows."""
        counts: dict[tuple[str, str], list[int]] = {}
        for row in audit.rows:
            entry = counts.setdefault((row.operator, row.precision), [0, 0])
            entry[0], entry[1] = entry[0] + 1, entry[1] + row.macs
        operators = [(*key, count, macs) for key, (count, macs) in sorted(counts.items())]
        return AuditSummary(
            tuple(sorted(operators, key=lambda row: -row[2])),
            tuple((r.name, r.operator, r.precision, r.reason) for r in audit.rows if r.reason),
            integer_share(audit.macs),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, a mapping for each row."""
        operators = ("operator", "precision", "count", "macs")
        fallbacks = ("name", "operator", "precision", "reason")
        return {
            "operators": [dict(zip(operators, row, strict=True)) for row in self.operators],
            "fallbacks": [dict(zip(fallbacks, row, strict=True)) for row in self.fallbacks],
            "integers": self.integers,
        }


@dataclass(frozen=True)
class Report:
    """Everything there is to say about one optimisation.

    Attributes:
        model: the class name of the original.
        target, backend: what was built for, and with.
        pipeline: its textual form.
        inputs, outputs: of the artifact; an output that is not a tensor stands as its value.
        example_source: where the example inputs come from.
        original, final: cost of the captured and of the lowered graph.
        passes: one record for each pass, in order.
        certificates: title → certificate, from capture to the artifact.
        audit: what the runtime executes; ``None`` where this host could not ask it.
        files: the artifact's files and their bytes.
        latency: measured, or why not.
        contestants: the backends that were measured against each other, the fastest first.
        versions: package → version.
        notes: what capture, lowering and this host want the reader to know.
    """

    model: str
    target: Target
    backend: str
    pipeline: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[Any, ...]
    example_source: str
    original: Cost
    final: Cost
    passes: tuple[PassRecord, ...]
    certificates: Mapping[str, Certificate] = field(default_factory=dict)
    audit: AuditSummary | None = None
    files: Mapping[str, int] = field(default_factory=dict)
    latency: Latency = field(default_factory=Latency)
    contestants: tuple[Contestant, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys; numbers that are not finite are ``None``."""
        return {**self.metrics(), **self.measurements()}

    def measurements(self) -> dict[str, Any]:
        """The part of :meth:`to_json` that differs from run to run."""
        return _finite({
            "latency": self.latency.to_json(),
            "contestants": [_contestant_json(one) for one in self.contestants],
            "seconds": [record.seconds for record in self.passes],
        })  # fmt: skip

    def metrics(self) -> dict[str, Any]:
        """The part of :meth:`to_json` that follows from the model and the options."""
        values = {
            "model": self.model,
            "target": self.target.to_json(),
            "backend": self.backend,
            "pipeline": self.pipeline,
            "inputs": [asdict(spec) for spec in self.inputs],
            "outputs": [asdict(o) if isinstance(o, TensorSpec) else repr(o) for o in self.outputs],
            "example_source": self.example_source,
            "original": asdict(self.original),
            "final": asdict(self.final),
            "passes": [_pass_json(record) for record in self.passes],
            "certificates": {title: c.to_json() for title, c in self.certificates.items()},
            "audit": None if self.audit is None else self.audit.to_json(),
            "files": dict(self.files),
            "versions": dict(self.versions),
            "notes": list(self.notes),
        }
        return _finite(values)

    @property
    def json(self) -> str:
        """:meth:`to_json` as text."""
        return json.dumps(self.to_json(), indent=2)

    @property
    def html(self) -> str:
        """One self-contained page."""
        from .html import render

        return render(self)

    def print(self, file: TextIO | None = None) -> None:
        """Write the tables to ``file`` (default: standard output), in colour where it is a terminal."""
        from .text import show

        show(self, file)

    def __str__(self) -> str:
        from .text import plain

        return plain(self)


def _pass_json(record: PassRecord) -> dict[str, Any]:
    return {
        "pass": record.text,
        "changed": record.changed,
        "before": asdict(record.before),
        "after": asdict(record.after),
        "certificate": None if record.certificate is None else record.certificate.to_json(),
        "mask_certificate": None if record.mask is None else record.mask.to_json(),
        "notes": [asdict(note) for note in record.notes],
        "rankings": [asdict(ranking) for ranking in record.rankings],
    }


def _contestant_json(one: Contestant) -> dict[str, Any]:
    values = asdict(one)
    del values["timing"]["samples"]
    return values


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
