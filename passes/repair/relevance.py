"""Which places of a sequence the outputs depend on: padding is not worth fitting.

Padded tokens run through every layer, and no output depends on them. In a fit they are rows like any
other, of values that look like no real token's. Where the caller passes integers or booleans (tokens,
masks), the original's outputs are differentiated once for every batch, projected on a random direction, and
rows whose gradient is zero throughout are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from graphprune.graph import Graph
from graphprune.importance.probe import gradients
from graphprune.importance.readers import linears

Relevance = Mapping[str, Sequence[torch.Tensor]]
"""Operator name → for every batch a mask, shaped as its result with one channel."""


def relevance(graph: Graph, calls: Sequence[Sequence[torch.Tensor]], seed: int) -> Relevance:
    """The masks of operators some of whose rows do not matter; empty where all do.

    Args:
        graph: the original network.
        calls: flat inputs of each batch.
        seed: of the directions.
    """
    if not any(not node.meta["val"].is_floating_point() for node in graph.placeholders):
        return {}
    found = linears(graph)
    masks: dict[str, list[torch.Tensor]] = {linear.node.name: [] for linear in found}
    for slopes in gradients(graph, calls, [linear.node for linear in found], seed=seed):
        for linear, (_, slope) in zip(found, slopes, strict=True):
            masks[linear.node.name].append((slope != 0).any(linear.channels, keepdim=True))
    # Where nothing matters the output hangs on something that is not differentiable: everything counts.
    return {
        name: each
        for name, each in masks.items()
        if any(not bool(mask.all()) for mask in each) and all(bool(mask.any()) for mask in each)
    }
