"""What quantization keeps of networks with trained weights: the same samples for every method."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.quantization import measure
from benchmarks.quantization.cases import Case
from benchmarks.quantization.methods import Made, Method, make
from benchmarks.quantization.speed import job_of

FLOAT = "float"


@dataclass(frozen=True)
class Score:
    """One method on one network of one seed; the float export where the tool is empty.

    Attributes:
        metrics: on inputs that no method saw; the first is the score. Empty where it failed.
        lost: of that score, float less quantized; 0.01 is a point.
        size: bytes to those of the float export.
        seconds: that quantization took.
        failure: why there are no metrics.
    """

    network: str
    seed: int
    tool: str
    variant: str
    metrics: dict[str, float] = field(default_factory=dict)
    lost: float | None = None
    size: float | None = None
    seconds: float = 0.0
    failure: str = ""

    @property
    def score(self) -> float | None:
        """The first of the metrics."""
        return next(iter(self.metrics.values()), None)


def compare(case: Case, methods: Sequence[Method]) -> Iterator[tuple[Score, dict[str, str]]]:
    """Scores as they come, each with the versions of what made it."""
    if case.metrics is None:
        raise ValueError(f"{case.name} has no weights that were trained, so there is no score to lose")
    with tempfile.TemporaryDirectory() as place:
        job, _ = job_of(case, Path(place))
        metrics = case.metrics(measure.network(job.model))
        start = next(iter(metrics.values()))
        yield Score(case.name, case.seed, "", FLOAT, metrics, 0.0, 1.0), {}
        whole = measure.size(job.model)
        for method in methods:
            if method.suits(case):
                made = make(method, job)
                yield _score(case, made, start, whole), dict(made.versions)


def _score(case: Case, made: Made, start: float, whole: int) -> Score:
    known = (case.name, case.seed, made.method.tool, made.method.variant)
    if made.path is None or case.metrics is None:
        return Score(*known, seconds=made.seconds, failure=made.failure)
    try:
        metrics = case.metrics(measure.network(made.path))
    except Exception as error:  # whatever the runtime says of another tool's file is that tool's result
        reason = f"does not run: {type(error).__name__}: {str(error).splitlines()[0][:160]}"
        return Score(*known, seconds=made.seconds, failure=reason)
    lost = start - next(iter(metrics.values()))
    return Score(*known, metrics, lost, measure.size(made.path) / whole, made.seconds)
