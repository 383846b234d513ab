"""An exit half-way through a residual network: accuracy and mean latency over thresholds.

    python -m benchmarks.published.early_exit [--epochs 5]

The residual network of :mod:`benchmarks.pruning.networks`, trained on digits, gets an exit behind a block;
its head is fitted without labels, or both answers are trained with labels. Every held-out digit goes through
ONNX Runtime by itself, one thread; all artifacts take each digit in turn, and of several passes the
fastest time of a digit counts, so that what else runs on the machine weighs little. Their mean
is the latency.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from graphprune.passes.early_exit import ExitLoss, attach, branch, fit
from torch import Tensor
from torch.nn import functional as F

import graphprune
from benchmarks.pruning.data import digits, split, training_digits
from benchmarks.pruning.training import BATCH, RECIPES, moved, trained
from benchmarks.record import RESULTS, conditions, page, table
from graphprune.calibration import read
from graphprune.graph import Graph
from graphprune.lowering import opened
from graphprune.pipeline import LOSSLESS, Pipeline
from graphprune.registry import backends
from graphprune.target import get
from graphprune.train import finetune

NETWORK, CUT = "resnet20", "5"
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)


@dataclass(frozen=True)
class Row:
    """One artifact: shares 0 to 1, mean latency of a digit in ms; without a threshold there is no exit."""

    head: str
    threshold: float | None
    leaving: float
    accuracy: float
    latency: float


class Batches:
    """The training digits in a new order and moved about anew, each time they are read."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = training_digits()
        for batch in torch.randperm(len(images)).split(BATCH):
            yield moved(images[batch]), labels[batch]


def lossless(graph: Graph) -> Graph:
    """The graph as ``optimize`` lowers it."""
    return Pipeline.parse(LOSSLESS).run(graph).graph


def heads(seed: int, epochs: int) -> dict[str, Graph]:
    """The network with an exit, both answers, by how the head came about."""
    data, model = split(NETWORK), trained(NETWORK, seed)
    graph = graphprune.trace(model, data.example[0], dynamic_batch=True)
    fitted = fit(attach(graph, CUT), read(graph, data.calibration, 512).calls)
    both = fitted.copy()
    rate = RECIPES[NETWORK].rate / 10
    finetune(
        both.module, Batches(), ExitLoss(F.cross_entropy), epochs=epochs, seed=seed,
        optimizer=lambda p: torch.optim.SGD(p, rate, momentum=0.9, weight_decay=5e-4, nesterov=True),
    )  # fmt: skip
    return {"fitted without labels": fitted, "trained with labels": both}


def measure(graphs: Sequence[Graph], images: Tensor, passes: int) -> list[tuple[Tensor, float]]:
    """Of every graph the answers to all images, one at a time, and the mean latency in ms."""
    target, backend = get("cpu"), backends.load("onnxruntime")()
    runners = [opened(backend, backend.lower(lossless(g), target), target, 1) for g in graphs]
    best = torch.full((len(runners), len(images)), float("inf"))
    answers: list[list[Any]] = [[None] * len(images) for _ in runners]
    for _ in range(passes):
        for index, image in enumerate(images.split(1)):
            for which, runner in enumerate(runners):
                start = time.perf_counter()
                (answer,) = runner(image)
                best[which, index] = min(float(best[which, index]), 1e3 * (time.perf_counter() - start))
                answers[which][index] = answer
    return [(torch.cat(a), float(b.mean())) for a, b in zip(answers, best, strict=True)]


def rows(seed: int, epochs: int, passes: int) -> list[Row]:
    """Every head at every threshold, and the networks without an exit."""
    images, labels = (t[4000:] for t in digits())
    single = graphprune.trace(trained(NETWORK, seed), images[:1])
    cases: list[tuple[str, float | None, Graph, float]] = [("none", None, single, 0.0)]
    for name, both in heads(seed, epochs).items():
        sure = both.run(images)[0].softmax(1).amax(1)
        fixed = graphprune.trace(both.module, images[:1])
        for threshold in THRESHOLDS:
            leaving = float((sure >= threshold).float().mean())
            cases.append((name, threshold, branch(lossless(fixed), threshold), leaving))
    found = measure([graph for _, _, graph, _ in cases], images, passes)
    return [
        Row(name, threshold, leaving, float((answer.argmax(1) == labels).float().mean()), latency)
        for (name, threshold, _, leaving), (answer, latency) in zip(cases, found, strict=True)
    ]


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = rows(given.seed, given.epochs, given.passes)
    plain = found[0].latency
    lines = [
        [row.head, "" if row.threshold is None else f"{row.threshold:g}", f"{row.leaving:.1%}",
         f"{row.accuracy:.1%}", f"{row.latency:.3f}", f"{plain / row.latency:.2f}"]
        for row in found
    ]  # fmt: skip
    body = table(["exit", "threshold", "leave", "accuracy", "ms a digit", "times as fast"], lines)
    facts = conditions(("torch", "onnxruntime")) | {"threads": "1", "batch": "1", "epochs": str(given.epochs)}
    text = (
        "ResNet-20 for digits, exit behind its third block of nine; 1,000 held-out digits, one at a "
        f"time through ONNX Runtime; the fastest of {given.passes} passes for every digit, and their mean."
        f"\n\n{body}"
    )
    page(given.output / "early-exit.md", "published.early_exit", "Early exit", text, found, facts)
    print(text)


if __name__ == "__main__":
    main()
