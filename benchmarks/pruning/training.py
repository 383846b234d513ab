"""Networks trained here, once for each seed, and kept in a folder that git ignores.

    python -m benchmarks.pruning.training [--networks …] [--seeds …]

trains what is missing and prints the accuracy of each on held-out digits.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pruning import networks
from benchmarks.pruning.data import split, training_digits

CACHE = Path(__file__).parents[2] / "build" / "checkpoints"
SEEDS = (0, 1, 2)
BATCH = 64


@dataclass(frozen=True)
class Recipe:
    """How one network is trained: epochs over 4,000 digits, one-cycle, and the optimizer's settings."""

    epochs: int
    rate: float
    optimizer: str = "sgd"
    decay: float = 5e-4


RECIPES = {
    "resnet20": Recipe(15, 0.1),
    "vgg": Recipe(15, 0.05),
    "mobilenetv2": Recipe(20, 0.1),
    "vit": Recipe(60, 2e-3, "adamw", 0.05),
}


def trained(name: str, seed: int = 0) -> nn.Module:
    """A trained network in eval mode, from the cache or trained now; the same weights each time.

    A checkpoint carries its recipe's name and is trained anew when that changes.
    """
    recipe = RECIPES[name]
    path = CACHE / f"{name}-{seed}-{recipe.optimizer}-{recipe.epochs}-{recipe.rate}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = networks.define(name)
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        else:
            fit(model, recipe)
            CACHE.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            torch.save(model.state_dict(), part)
            part.replace(path)
    return model.eval()


def fit(model: nn.Module, recipe: Recipe, augment: Callable[[Tensor], Tensor] | None = None) -> None:
    """Train on the 4,000 digits, moved about; draws from torch's global generator."""
    images, labels = training_digits()
    steps = recipe.epochs * (len(images) // BATCH)
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), recipe.rate, weight_decay=recipe.decay)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), recipe.rate, momentum=0.9, weight_decay=recipe.decay, nesterov=True
        )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps)
    move = augment or moved
    model.train()
    for _ in range(recipe.epochs):
        order = torch.randperm(len(images))
        for start in range(0, len(images) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            loss = F.cross_entropy(model(move(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def moved(images: Tensor) -> Tensor:
    """Every image shifted by up to two pixels, turned by up to 12 degrees and scaled by up to a tenth."""
    count = len(images)
    angle = (torch.rand(count) - 0.5) * 0.42
    scale = 1 + (torch.rand(count) - 0.5) * 0.2
    shift = (torch.rand(count, 2) - 0.5) * 4 * 2 / images.shape[-1]
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cosine, -sine, shift[:, 0], sine, cosine, shift[:, 1]], 1)
    grid = F.affine_grid(rows.view(count, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def main() -> None:
    """Train what is missing, and say how good it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--networks", nargs="+", default=networks.NAMES, choices=networks.NAMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.networks:
        for seed in given.seeds:
            started = time.perf_counter()
            score = split(name).score(trained(name, seed))
            print(f"{name} {seed}: {score:.1%} ({time.perf_counter() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
