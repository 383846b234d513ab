"""Weights of few bits, rounded to the nearest, rounded with care, and trained with the rounding in the loop.

The network's own training loop of :mod:`benchmarks.pruning.training` goes on for a few epochs on what
`prepare` gives; `convert` then gives the graph in integers. What is scored are files on the runtime.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.pruning.training import Recipe, fit
from benchmarks.quantization import measure, ours
from benchmarks.quantization.cases import Case
from benchmarks.quantization.speed import job_of
from graphprune.graph import Graph

# Network → bits of its weights: where rounding alone costs something, and one where it costs little.
BITS = {"resnet20": (4, 3, 2), "mobilenetv2": (4, 3)}
# Adam with the highest rate of fine-tuning, as scales are trained along.
RECIPE = Recipe(epochs=4, rate=3e-4, optimizer="adamw", decay=0.0)


@dataclass(frozen=True)
class Trained:
    """One network of one seed with weights of so many bits, activations of eight.

    Attributes:
        metric: what is scored, on inputs that nothing saw.
        plain: that score of the float export.
        nearest, rounded, trained: of files in integers: each weight rounded to the nearest, rounded so that
            what a layer computes changes least, and after training.
        integers: share of multiply-accumulates of the trained file that the runtime executes in integers.
        epochs: of training, over 4,000 digits.
        seconds: of ``prepare``, training and ``convert`` together, one thread.
        failure: why there are no scores.
    """

    network: str
    seed: int
    bits: int
    metric: str = ""
    plain: float | None = None
    nearest: float | None = None
    rounded: float | None = None
    trained: float | None = None
    integers: float | None = None
    epochs: int = 0
    seconds: float = 0.0
    failure: str = ""

    @property
    def lost(self) -> float | None:
        """Of the float score, after training."""
        return None if self.plain is None or self.trained is None else self.plain - self.trained


def compare(case: Case, bits: int, recipe: Recipe = RECIPE) -> Trained:
    """The row of one network; training draws from a generator of the seed."""
    if case.metrics is None:
        raise ValueError(f"{case.name} has no weights that were trained, so there is no score to lose")
    row = Trained(case.name, case.seed, bits, epochs=recipe.epochs)
    samples, _ = case.parts()
    with tempfile.TemporaryDirectory() as place:
        job, _ = job_of(case, Path(place))

        metric, plain = next(iter(case.metrics(measure.network(job.model)).items()))
        row = replace(row, metric=metric, plain=plain)

        def scored(name: str, file: bytes) -> float:
            assert case.metrics is not None
            path = Path(place, f"{name}.onnx")
            path.write_bytes(file)
            return next(iter(case.metrics(measure.network(path)).values()))

        try:
            for name, method in (("nearest", "nearest"), ("rounded", "auto")):
                step = f"quantize{{bits={bits} rounding={method}}}"
                score = scored(name, ours.by_pass(case.build(), samples, step))
                row = replace(row, **{name: score})  # type: ignore[arg-type]
            started = time.perf_counter()
            graph = trained(case, bits, recipe)
            seconds = time.perf_counter() - started
            score = scored("trained", ours.unquantized(graph.module, samples))
            integers = measure.in_integers(measure.audit(Path(place, "trained.onnx")))
            return replace(row, trained=score, integers=integers, seconds=seconds)
        except Exception as error:  # a network that cannot be trained with rounding is a row that says why
            return replace(row, failure=f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")


def trained(case: Case, bits: int, recipe: Recipe = RECIPE) -> Graph:
    """As anyone would: prepare, the loop, convert."""
    from graphprune.passes.quantize.training import convert, prepare

    samples, _ = case.parts()
    batch = tuple(torch.cat(parts) for parts in zip(*samples, strict=True))
    aware = prepare(case.build(), tuple(t[:2] for t in batch), calibration=[batch], bits=bits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        fit(aware.module, recipe)
    return convert(aware)
