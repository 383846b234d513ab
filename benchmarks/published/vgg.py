"""A VGG-16 that loses 30 % of its channels three times: trained between, distilled besides, or only repaired.

    python -m benchmarks.published.vgg [--seeds …] [--epochs 4]

Thirteen convolutions in five stages and three linear layers, as VGG-16, all a quarter as wide; the first
convolution halves, since a digit needs no more. In every round all channels and hidden units stand in one
queue, by the error that is left when they are gone and the rest refitted, divided by the parameters that go
with them, and as many as are 30 % of the original's go: 10 % are left after the third. Read otherwise, 30 %
of what is left each time, 34 % are; the page has both. Then the network is repaired (closed form, no labels),
and trained for a few epochs at a tenth of the learning rate. The first column stops after the repair of each
round.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from graphprune.passes.repair import Repair
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from benchmarks.pruning.data import Split, split, training_digits
from benchmarks.pruning.networks import CLASSES, convolution
from benchmarks.pruning.training import BATCH, CACHE, Recipe, fit, moved
from benchmarks.record import RESULTS, conditions, page, table
from graphprune.cost import cost
from graphprune.graph import Graph
from graphprune.importance import Data
from graphprune.pipeline import Context
from graphprune.plans.candidates import Candidates, Limits
from graphprune.train import finetune
from graphprune.train.distill import Distillation, SoftTargets

WIDTHS = ((16, 16), (32, 32), (64, 64, 64), (128, 128, 128), (128, 128, 128))
HIDDEN = 1024
TRAINING = Recipe(10, 0.05)
RATE = TRAINING.rate / 10
ROUNDS, SHARE = 3, 0.3
GONE, POINTS = 0.92, 1.2  # asked of the last round: parameters, at least; accuracy lost, at most
TITLE = "A VGG-16 in three rounds of 30 % of its channels"
COLUMNS = ("repaired only", "trained", "distilled")
OF = ("the original's channels", "the channels that are left")  # what 30 % are of


class Digits(nn.Module):
    """A border of two around ``[n, 1, 28, 28]``, so that five halvings end in one position."""

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 1, 32, 32]``."""
        return F.pad(x, (2, 2, 2, 2))


def vgg16() -> nn.Module:
    """VGG-16 with batch norms (Simonyan and Zisserman 2015), a quarter as wide."""
    layers: list[nn.Module] = [Digits()]
    inputs = 1
    for stage in WIDTHS:
        layers += [nn.MaxPool2d(2)] if inputs > 1 else []
        for outputs in stage:
            layers += convolution(inputs, outputs, 3, 2 if inputs == 1 else 1, activation=nn.ReLU)
            inputs = outputs
    layers.append(nn.Flatten())
    for _ in range(2):
        layers += [nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Dropout(0.5)]
        inputs = HIDDEN
    return nn.Sequential(*layers, nn.Linear(inputs, CLASSES))


def trained(seed: int) -> nn.Module:
    """A trained network, from the cache or trained now."""
    path = CACHE / f"vgg16-linears-{seed}-{TRAINING.epochs}-{TRAINING.rate}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = vgg16()
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        else:
            fit(model, TRAINING)
            CACHE.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path)
    return model.eval()


class Batches:
    """The 4,000 training digits in a new order and moved about anew, each time they are read."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = training_digits()
        for batch in torch.randperm(len(images)).split(BATCH):
            yield moved(images[batch]), labels[batch]


def without(graph: Graph, count: int, calibration: list[Tensor]) -> Graph:
    """The network without that many of its channels, the least important of all of them."""
    ranked = Candidates.of(
        graph, "reconstruction", limits=Limits(minimum=0.02), data=Data(calibration, None, 512)
    )
    queue = ranked.queue({}, {"params": 1.0})
    gone = 0
    for index, step in enumerate(queue.steps):  # noqa: B007 - read behind the loop
        gone += len(step.positions)
        if gone >= count:
            break
    return graph.apply(queue.plan(index + 1))


def channels(graph: Graph) -> int:
    """How many channels all axes that can be pruned have together."""
    return sum(axis.size for axis in graph.axes.prunable)


@dataclass(frozen=True)
class Round:
    """One network after one round; accuracies on held-out digits, 0 to 1."""

    of: str
    seed: int
    column: str
    number: int
    channels: float
    parameters: float
    macs: float
    baseline: float
    repaired: float
    trained: float

    @property
    def lost(self) -> float:
        """Points that the network has lost."""
        return 100 * (self.baseline - self.trained)


def run(of: str, seed: int, column: str, epochs: int, digits: Split) -> list[Round]:
    """Three rounds of one column, each without 30 % of the channels that ``of`` names."""
    model = trained(seed)
    baseline = digits.score(model)
    graph = graphprune.trace(model, digits.example[0], dynamic_batch=True)
    teacher = copy.deepcopy(graph.module).eval()
    whole, start = cost(graph), channels(graph)
    context = Context(calibration=digits.calibration, seed=seed)
    steps = epochs * -(-len(training_digits()[0]) // BATCH)
    rounds = []
    for number in range(1, ROUNDS + 1):
        count = round(SHARE * (start if of == OF[0] else channels(graph)))
        graph = Repair().run(without(graph, count, digits.calibration), context).graph
        repaired = digits.score(graph.module)
        if column != "repaired only":
            student = graph.module
            finetune(
                student, Batches(), F.cross_entropy, epochs=epochs, seed=10 * seed + number,
                optimizer=lambda p: torch.optim.SGD(p, RATE, momentum=0.9, weight_decay=5e-4, nesterov=True),
                scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps),
                distillation=Distillation(teacher, student, [SoftTargets(temperature=4.0)], alpha=0.9)
                if column == "distilled" else None,
            )  # fmt: skip
        left = cost(graph)
        rounds.append(
            Round(
                of, seed, column, number, channels(graph) / start, left.parameters / whole.parameters,
                left.macs / whole.macs, baseline, repaired, digits.score(graph.module),
            )
        )  # fmt: skip
        print(rounds[-1], f"lost {rounds[-1].lost:+.1f}", flush=True)
    return rounds


def text(rounds: list[Round]) -> str:
    """What is left and lost, the mean over seeds and the spread."""
    baselines = sorted({r.seed: r.baseline for r in rounds}.items())
    before = ", ".join(f"{value:.1%}" for _, value in baselines)
    tables = "\n\n".join(
        f"A round takes 30 % of {of}:\n\n{_table([r for r in rounds if r.of == of])}"
        for of in dict.fromkeys(r.of for r in rounds)
    )
    return (
        f"Accuracy before, on 1,000 held-out digits: {before}. Points lost, the mean over seeds; 0.1 points "
        f"are one digit, and less than none comes of training on.\n\n{tables}\n\n{_goals(rounds)}\n\n"
        "`trained`: repaired, then trained with labels. `distilled`: the same epochs with the unpruned "
        "network's probabilities as targets (temperature 4, nine tenths of the loss). `repaired only`: no "
        "label and no gradient."
    )


def _goals(rounds: list[Round]) -> str:
    """What was asked of the last round, and what holds, by the mean over seeds."""
    lines = []
    for of, column in dict.fromkeys((r.of, r.column) for r in rounds if r.number == ROUNDS):
        own = [r for r in rounds if (r.of, r.column, r.number) == (of, column, ROUNDS)]
        gone, lost = min(1 - r.parameters for r in own), statistics.mean(r.lost for r in own)
        verdict = "yes" if gone >= GONE and lost <= POINTS else "no"
        lines.append([of, column, f"{gone:.1%}", f"{lost:+.1f}", verdict])
    asked = f"at least {GONE:.0%} of the parameters gone, at most {POINTS} points lost"
    return f"Asked: {asked}.\n\n" + table(["30 % of", "column", "gone", "lost", "holds"], lines)


def _table(rounds: list[Round]) -> str:
    lines = []
    for number in range(1, ROUNDS + 1):
        own = [r for r in rounds if r.number == number]
        gone = sorted(1 - r.parameters for r in own)
        macs = sorted(1 - r.macs for r in own)
        row = [str(number), f"{own[0].channels:.1%}", _between(gone), _between(macs)]
        for column in COLUMNS:
            lost = [r.lost for r in own if r.column == column]
            spread = f" ({min(lost):+.1f} to {max(lost):+.1f})" if len(lost) > 1 else ""
            row.append(f"{statistics.mean(lost):+.1f}{spread}" if lost else "")
        lines.append(row)
    return table(["round", "channels left", "parameters gone", "MACs gone", *COLUMNS], lines)


def _between(values: list[float]) -> str:
    """The least and the most of sorted shares, or the one of them."""
    return " to ".join(dict.fromkeys((f"{values[0]:.1%}", f"{values[-1]:.1%}")))


def main() -> None:
    """Run what was asked for, print the page and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    digits, rounds, started = split("vgg"), [], time.perf_counter()
    facts = conditions() | {"threads": "1", "epochs a round": str(given.epochs), "learning rate": f"{RATE:g}"}
    for of, seed, column in itertools.product(OF, given.seeds, COLUMNS):
        rounds += run(of, seed, column, given.epochs, digits)
        plain = [asdict(r) | {"lost": r.lost} for r in rounds]
        page(given.output / "vgg.md", "published.vgg", TITLE, text(rounds), plain, facts)
    print(text(rounds), f"{time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
