"""Five short epochs behind a pruned network: does it come back to the unpruned one trained as long?

    python -m benchmarks.pruning.finetune [--seeds …] [--epochs 5]

The residual network of :mod:`benchmarks.pruning.networks`, trained, is pruned by ``optimize`` to a quarter of
its multiply-accumulates and repaired; ``result.module`` is then trained like any module. Beside it, the
unpruned network goes through the same epochs with the same batches in the same order.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import graphprune
from benchmarks.pruning.data import split
from benchmarks.pruning.training import SEEDS, Recipe, fit, trained
from benchmarks.record import RESULTS, conditions, page, table

NETWORK = "resnet20"
RATE = 0.02


@dataclass(frozen=True)
class Row:
    """Accuracies of one seed, and the share of multiply-accumulates that was left."""

    seed: int
    left: float
    unpruned: float
    unpruned_trained: float
    repaired: float
    repaired_trained: float

    @property
    def lost(self) -> float:
        """Points that pruning costs after both were trained."""
        return 100 * (self.unpruned_trained - self.repaired_trained)


def run(seed: int, share: float, epochs: int) -> Row:
    """One seed."""
    digits, model = split(NETWORK), trained(NETWORK, seed)
    result = graphprune.optimize(
        model,
        digits.example[0],
        dynamic_batch=True,
        macs=share,
        calibration=digits.calibration,
        measure=False,
    )
    recipe = Recipe(epochs, RATE)
    before = digits.score(model), digits.score(result.module.eval())
    after = []
    for module in (copy.deepcopy(model), result.module):
        torch.manual_seed(seed)
        fit(module, recipe)
        after.append(digits.score(module.eval()))
    left = result.report.final.macs / result.report.original.macs
    return Row(seed, left, before[0], after[0], before[1], after[1])


def main() -> None:
    """Print the rows, and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--macs", type=float, default=0.25)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in given.seeds:
        rows.append(run(seed, given.macs, given.epochs))
        print(rows[-1], f"lost {rows[-1].lost:+.1f}", flush=True)
    lost = [row.lost for row in rows]
    head = ["seed", "MACs left", "unpruned", "trained on", "pruned and repaired", "trained on", "points lost"]
    lines: list[list[str]] = [
        [str(row.seed), *(f"{value:.1%}" for value in list(asdict(row).values())[1:]), f"{row.lost:+.1f}"]
        for row in rows
    ]
    body = table(head, lines)
    facts = conditions() | {"threads": "1", "epochs": str(given.epochs), "learning rate, highest": str(RATE)}
    text = (
        f"Accuracy on 1,000 held-out digits; both networks see the same batches.\n\n{body}\n\n"
        f"Median of the points lost: {statistics.median(lost):+.1f} ({min(lost):+.1f} to {max(lost):+.1f})."
    )
    page(given.output / "finetune.md", "pruning.finetune", "Fine-tuning after pruning", text, rows, facts)
    print(text)


if __name__ == "__main__":
    main()
