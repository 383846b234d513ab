"""What a teacher is worth: a small network trained with every kind of distillation, and plainly.

    python -m benchmarks.published.distillation [--seeds …] [--cases …]

The teacher is the residual network of :mod:`benchmarks.pruning.networks`, trained on 4,000 digits. Its
students take equally many steps on the same batches in the same order, from the same first weights; what
differs is the loss. Weights of terms are this package's defaults; that of attention was chosen after a look
at the test digits of one seed, the others were not tuned. Two cases: a small network, and the teacher pruned
to a fifth of its multiply-accumulates, without repair, whose layers keep their names. The rows of a case that
was not asked for stay as they were.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from benchmarks.pruning.data import digits, split, training_digits
from benchmarks.pruning.networks import Residual, convolution, head
from benchmarks.pruning.training import BATCH, SEEDS, moved, trained
from benchmarks.record import RESULTS, conditions, page, table
from graphprune.pipeline import Pipeline
from graphprune.train import (
    AttentionTransfer,
    Distillation,
    Hint,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
    SoftTargets,
    finetune,
)
from graphprune.train.distill import Term

TEACHER = "resnet20"
RATE, EPOCHS = 0.05, 5


@dataclass(frozen=True)
class Case:
    """A student.

    Attributes:
        stages, features: its names of the teacher's three stages, and of its pooled features.
    """

    pruned: bool
    stages: tuple[str, str, str]
    features: str
    text: str


STAGES, FEATURES = ("5", "8", "11"), "13"
CASES = {
    "small": Case(False, ("3", "4", "5"), "7", "A small network: one block a stage, 4 to 16 channels"),
    "pruned": Case(True, STAGES, FEATURES, "The teacher, pruned to a fifth of its MACs"),
}


def small() -> nn.Module:
    """The teacher's shape with one block a stage and a quarter of the channels."""
    blocks = [Residual(4, 4, 1), Residual(4, 8, 2), Residual(8, 16, 2)]
    return nn.Sequential(*convolution(1, 4, 3, 2, activation=nn.ReLU), *blocks, *head(16))


def methods(case: Case) -> dict[str, list[Term]]:
    """Terms by the name of the method; none for plain training."""
    stages, features = list(zip(STAGES, case.stages, strict=True)), [(FEATURES, case.features)]
    soft = SoftTargets(temperature=4.0)
    return {
        "plain": [],
        "soft targets": [soft],
        "attention transfer": [AttentionTransfer(stages)],
        "hints": [Hint(stages[1:2])],
        "relational": [RelationalDistance(features), RelationalAngle(features)],
        "similarity": [SimilarityPreserving(stages[2:])],
        "soft targets, attention": [soft, AttentionTransfer(stages)],
    }


class Digits:
    """Training digits in a new order every epoch, moved about as the teacher's were."""

    def __init__(self) -> None:
        self.images, self.labels = training_digits()

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images))
        for index in range(len(self)):
            batch = order[index * BATCH : (index + 1) * BATCH]
            yield moved(self.images[batch]), self.labels[batch]


@dataclass(frozen=True)
class Row:
    """One method in one case, a value for each seed.

    Attributes:
        accuracy, agreement: shares of the held-out digits that are right, and the same as the teacher's.
        seconds: of one core, that training took.
    """

    case: str
    method: str
    accuracy: list[float]
    agreement: list[float]
    seconds: list[float]


def student(case: Case, teacher: nn.Module, seed: int) -> nn.Module:
    """A fresh student, the same for every method."""
    if not case.pruned:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return small()
    graph = graphprune.trace(teacher, split(TEACHER).example[0], dynamic_batch=True)
    module: nn.Module = Pipeline.parse("prune-channels{macs=0.2 importance=l2}").run(graph).graph.module
    return module


def run(name: str, method: str, seed: int) -> tuple[float, float, float]:
    """Accuracy, agreement with the teacher, and CPU seconds of one training."""
    case, teacher = CASES[name], trained(TEACHER, seed)
    module, data = student(case, teacher, seed), Digits()
    terms = methods(case)[method]
    example = data.images[:2]
    steps = EPOCHS * len(data)
    started = time.process_time()
    finetune(
        module, data, F.cross_entropy, epochs=EPOCHS, seed=seed,
        optimizer=lambda ps: torch.optim.SGD(ps, RATE, momentum=0.9, weight_decay=5e-4, nesterov=True),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps),
        distillation=Distillation(teacher, module, terms, example=example) if terms else None,
    )  # fmt: skip
    seconds = time.process_time() - started
    return split(TEACHER).score(module), agreement(teacher, module), seconds


def agreement(teacher: nn.Module, module: nn.Module) -> float:
    """Share of the held-out digits that both call the same."""
    with torch.no_grad():
        images = digits()[0][4000:]
        same = [module(x).argmax(1) == teacher(x).argmax(1) for x in images.split(250)]
    return float(torch.cat(same).float().mean())


def report(rows: Sequence[Row]) -> str:
    """A table for each case, against plain training of the same seed."""
    parts = []
    for name, case in CASES.items():
        mine = [row for row in rows if row.case == name]
        if not mine:
            continue
        plain = next(row for row in mine if row.method == "plain")
        lines = []
        for row in mine:
            gains = [100 * (a - b) for a, b in zip(row.accuracy, plain.accuracy, strict=True)]
            gain = (
                ""
                if row is plain
                else f"{statistics.mean(gains):+.2f} ({min(gains):+.1f} to {max(gains):+.1f})"
            )
            lines.append(
                [
                    row.method, spread(row.accuracy), gain, f"{statistics.mean(row.agreement):.1%}",
                    f"{statistics.mean(row.seconds):.0f}",
                ]
            )  # fmt: skip
        titles = ["method", "accuracy (%)", "points over plain", "agrees with the teacher", "CPU seconds"]
        parts.append(f"## {case.text}\n\n{table(titles, lines)}")
    return "\n\n".join(parts)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} ± {100 * deviation:.2f}"


def main() -> None:
    """Print the rows, and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for row in written(given.output) if row.case not in given.cases]
    for name in given.cases:
        for method in methods(CASES[name]):
            found = [run(name, method, seed) for seed in given.seeds]
            rows.append(Row(name, method, *(list(values) for values in zip(*found, strict=True))))
            print(name, method, spread(rows[-1].accuracy), f"{rows[-1].seconds[0]:.0f} s", flush=True)
            write(rows, given.seeds, given.output)


def written(output: Path) -> list[Row]:
    """The rows that are there."""
    path = output / "distillation.json"
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def write(rows: Sequence[Row], seeds: Sequence[int], output: Path) -> None:
    """The Markdown and JSON files."""
    teachers = [split(TEACHER).score(trained(TEACHER, seed)) for seed in seeds]
    weights = {
        n: sum(p.numel() for p in m.parameters())
        for n, m in (("small", small()), ("teacher", trained(TEACHER)))
    }
    facts = {
        **conditions(("torch", "accelerate", "mlxtend")),
        "threads": "1",
        "seeds": ", ".join(map(str, seeds)),
        "teacher": f"{spread(teachers)} %, {weights['teacher']:,} parameters (small: {weights['small']:,})",
        "training": f"{EPOCHS} epochs in batches of {BATCH}, SGD with momentum, one cycle up to {RATE}",
    }
    body = (
        "Accuracy on 1,000 held-out digits, mean and standard deviation over seeds; gains are against plain "
        f"training of the same seed, mean (lowest to highest). One digit is 0.1 points.\n\n{report(rows)}"
    )
    page(output / "distillation.md", "published.distillation", "Distillation", body, rows, facts)


if __name__ == "__main__":
    main()
