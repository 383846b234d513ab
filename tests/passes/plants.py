"""Planting what is dead into networks: parameter slices set to 0, scales, biases that silence a unit."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.axes.axis import Axis
from graphprune.graph import Graph


def kill(graph: Graph, axis: Axis, positions: list[int]) -> None:
    """Set positions of an axis to 0 in every parameter and buffer that has them, in place.

    Tensors are shared with the module the graph was traced from, so that one changes, too.
    """
    with torch.no_grad():
        for name, dim in dict.fromkeys((m.tensor, m.dim) for m in axis.members):
            for other, index in graph.axes.of(name, dim):
                if other.name == axis.name:
                    where = torch.from_numpy(np.flatnonzero(np.isin(index, positions)))
                    graph.tensors[name].index_fill_(dim, where, 0.0)


def damage(model: nn.Module, rng: random.Random) -> list[str]:
    """Zero, scale or silence random slices of random parameters; says what it did."""
    done = []
    parameters = [(n, p) for n, p in model.named_parameters() if p.is_floating_point() and p.dim()]
    with torch.no_grad():
        for name, parameter in rng.sample(parameters, min(len(parameters), rng.randint(1, 5))):
            dim = rng.randrange(min(parameter.dim(), 2))
            size = parameter.shape[dim]
            chosen = torch.tensor(rng.sample(range(size), rng.choice([1, 1, 2, size]) if size > 1 else 1))
            kind = rng.choice(["zero", "zero", "zero", "negative", "one"])
            slices: Tensor = parameter.index_select(dim, chosen)
            new = {"zero": slices * 0, "negative": -slices.abs() - 2.0, "one": torch.ones_like(slices)}[kind]
            parameter.index_copy_(dim, chosen, new)
            done.append(f"{name}[{dim}] {chosen.tolist()} {kind}")
    return done
