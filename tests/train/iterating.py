"""A run of ``iterate`` that tests start, kill and start again; and a program: ``iterating.py DIR STOP``.

It has everything that a resumption could get wrong: batch norm, dropout, shuffled and noisy data, an
optimizer with a state, a data generator, a teacher and a repair.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from graphprune.train.distill import SoftTargets
from graphprune.train.iterate import iterate
from graphprune.train.rounds import Iterated


class Shuffled:
    """Samples in a new order with new noise each time; the order from a generator of its own."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(3)
        self.x = torch.randn(48, 1, 6, 6, generator=draw)
        self.y = self.x.mean((1, 2, 3)).mul(20).long().clamp(-1, 1) + 1
        self.generator = torch.Generator().manual_seed(4)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in torch.randperm(48, generator=self.generator).split(16):
            yield self.x[batch] + 0.1 * torch.randn(len(batch), 1, 6, 6), self.y[batch]


def network() -> nn.Module:
    """A small classifier of ``[n, 1, 6, 6]``, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(16, 24, 3),
            nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3),
        )  # fmt: skip
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean, module.running_var = (
                    torch.randn(len(module.weight)) * 0.3,
                    torch.rand(len(module.weight)) + 0.5,
                )
    return model.eval()


def correct(module: nn.Module) -> float:
    """The share of samples that are classified as they should be."""
    data = Shuffled()
    return float((module(data.x).argmax(1) == data.y).float().mean())


def run(directory: Path | None, progress: Callable[[str], None] | None = None, seed: int = 5) -> Iterated:
    """Three rounds of two epochs."""
    return iterate(
        network(), torch.zeros(2, 1, 6, 6), Shuffled(), F.cross_entropy, params=0.5, per_round=0.22, epochs=2,
        optimizer=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), distil=[SoftTargets(temperature=2.0)],
        evaluate=correct, pruning={"align": 1}, directory=directory, seed=seed, progress=progress,
    )  # fmt: skip


def stopping(count: int, stop: Callable[[], None]) -> Callable[[str], None]:
    """Progress that stops the run when it is called for the ``count``-th time."""
    seen = 0

    def say(_: str) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            stop()

    return say


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), stopping(int(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL)))
    print("finished")
