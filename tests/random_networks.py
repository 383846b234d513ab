"""Random small networks out of :mod:`tests.random_steps`, described by a value that prints and shrinks."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests import random_steps as steps
from tests.random_steps import IMAGE, SEQUENCE, Run, Shape
from tests.zoo import prepare

WIDEST = 96  # features; wider activations cost time and show nothing


@dataclass(frozen=True)
class Recipe:
    """A random network: what it starts from, its steps with a seed each, and how it ends.

    Attributes:
        start: ``image`` (``[2, 3, 8, 8]``), ``sequence`` (``[2, 5, 6]``) or ``tokens`` (ids ``[2, 5]``).
        body: step numbers with the seed of their choices; a step that does not fit is left out.
        turn: after which step an image becomes a sequence (or a sequence an image), if any.
        end: how the last activation becomes the output.
    """

    start: str
    body: tuple[tuple[int, int], ...]
    turn: int | None
    end: int


def build(recipe: Recipe) -> tuple[nn.Module, tuple[Tensor, ...], list[str]]:
    """The network in float64 and eval mode, its inputs, and the names of its steps."""
    rng = random.Random(repr(recipe))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.randrange(2**31))
        layers, names, shape = _body(recipe)
        head, tail = _end(shape, recipe.end)
        layers.append(head)
        names.append(tail)
        model = prepare(nn.Sequential(*layers), rng.randrange(2**31)).double()
    if recipe.start == "tokens":
        return model, (torch.randint(0, 11, (2, 5), generator=generator),), names
    size = (2, 3, 8, 8) if recipe.start == "image" else (2, 5, 6)
    return model, (torch.randn(*size, generator=generator, dtype=torch.float64),), names


def _body(recipe: Recipe) -> tuple[list[nn.Module], list[str], Shape]:
    first: nn.Module
    shape: Shape = (5, 8)
    if recipe.start == "image":
        first, shape = nn.Conv2d(3, 8, 3, padding=1), (8, 8, 8)
    else:
        first = nn.Embedding(11, 8) if recipe.start == "tokens" else nn.Linear(6, 8)
    layers: list[nn.Module] = [first]
    names = [recipe.start]
    for place, (number, seed) in enumerate(recipe.body):
        if place == recipe.turn:
            layer, shape = _turned(shape)
            layers.append(layer)
            names.append("turn")
        family = IMAGE if len(shape) == 3 else SEQUENCE
        name = list(family)[number % len(family)]
        made = family[name](shape, random.Random(seed))
        if (
            made is None
            or torch.Size(made[1]).numel() > WIDEST * 64
            or made[1][-1 if len(shape) == 2 else 0] > WIDEST
        ):
            continue
        layers.append(made[0])
        names.append(name)
        shape = made[1]
    return layers, names, shape


def _turned(shape: Shape) -> tuple[nn.Module, Shape]:
    if len(shape) == 3:
        return Run(lambda m, x: x.flatten(2).transpose(1, 2)), (shape[1] * shape[2], shape[0])
    return Run(lambda m, x: x.transpose(1, 2).unsqueeze(-1)), (shape[1], shape[0], 1)


def _end(shape: Shape, choice: int) -> tuple[nn.Module, str]:
    if len(shape) == 3:
        c, h, w = shape
        ends: list[tuple[str, nn.Module]] = [
            ("sum", nn.Sequential(Run(lambda m, x: x.sum((2, 3))), nn.Linear(c, 3))),
            ("mean", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 3))),
            ("flatten", nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, 3))),
            ("conv", nn.Conv2d(c, 2, 1)),
        ]
    else:
        t, d = shape
        ends = [
            ("sum", nn.Sequential(Run(lambda m, x: x.sum(1)), nn.Linear(d, 3))),
            ("first", nn.Sequential(Run(lambda m, x: x[:, 0]), nn.Linear(d, 3))),
            ("flatten", nn.Sequential(nn.Flatten(), nn.Linear(t * d, 3))),
            ("linear", nn.Linear(d, 3)),
        ]
    name, layer = ends[choice % len(ends)]
    return layer, f"end: {name}"


def sandwich(family: str, name: str, seed: int) -> Recipe:
    """One step between two that mix channels: every family on its own."""
    names = list(IMAGE if family == "image" else SEQUENCE)
    mix = names.index("conv" if family == "image" else "linear")
    return Recipe(family, ((mix, seed), (names.index(name), seed), (mix, seed + 1)), None, seed)


__all__ = ["IMAGE", "SEQUENCE", "Recipe", "build", "sandwich", "steps"]
