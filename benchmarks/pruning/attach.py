"""A plan of ours that removes what another library removed, so that our repair can be put behind it.

Which places of a parameter a library kept is found by letting it prune a copy once more, in which every
parameter holds its own coordinates: what is left says where it came from.

>>> import graphprune
>>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
>>> def prune(copy):
...     for layer, dim in ((copy[0], 0), (copy[2], 1)):
...         layer.weight.data = layer.weight.data.index_select(dim, torch.tensor([0, 3]))
...     copy[0].bias.data = copy[0].bias.data[[0, 3]]
>>> graph = graphprune.trace(model, torch.zeros(2, 3))
>>> dict(plan_of(graph, kept_places(model, prune)).removed)
{'0.weight[0]': (1, 2)}
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from graphprune.axes.terms import mask
from graphprune.graph import Graph
from graphprune.plans.plan import Plan, keep_masks, make_plan

Places = dict[str, dict[int, np.ndarray]]
"""Parameter → dimension → the places that stay, ascending."""


class Detached(ValueError):
    """What a library removed is no plan of ours."""


def kept_places(model: nn.Module, prune: Callable[[nn.Module], None]) -> Places:
    """What ``prune`` leaves of every parameter of ``model``, which itself is not changed.

    Args:
        model: the network.
        prune: prunes a copy of it in place, by a decision already made.
    """
    found: Places = {}
    dim = 0
    while True:
        marked = copy.deepcopy(model)
        shapes = {name: parameter.shape for name, parameter in marked.named_parameters()}
        with torch.no_grad():
            for parameter in marked.parameters():
                if parameter.dim() > dim:
                    view = [-1 if d == dim else 1 for d in range(parameter.dim())]
                    places = torch.arange(parameter.shape[dim], dtype=parameter.dtype)
                    parameter.copy_(places.view(view).expand_as(parameter))
        prune(marked)
        last = 0
        for name, parameter in marked.named_parameters():
            cut = [d for d, size in enumerate(shapes[name]) if parameter.shape[d] != size]
            last = max([last, *cut])
            if dim in cut:
                along = parameter.detach().movedim(dim, 0).reshape(parameter.shape[dim], -1)[:, 0]
                found.setdefault(name, {})[dim] = along.long().numpy()
        if dim >= last:
            return found
        dim += 1


def plan_of(graph: Graph, kept: Places) -> Plan:
    """The plan that leaves exactly ``kept``.

    Raises:
        Detached: there is none, since the library cuts where our graph has no axis that can be cut, or keeps
            an order or a part of a position.
    """
    removed: dict[str, set[int]] = {}
    for name, dims in kept.items():
        if name not in graph.tensors:
            raise Detached(f"parameter {name!r} is not in the graph")
        for dim, places in dims.items():
            stays = np.zeros(graph.tensors[name].shape[dim], bool)
            stays[places] = True
            for axis, index in graph.axes.of(name, dim):
                positions = set(index[index >= 0]) - set(index[(index >= 0) & stays])
                if positions:
                    if not axis.prunable:
                        raise Detached(f"it cuts {axis.name}, which is frozen: {axis.reason}")
                    removed.setdefault(axis.name, set()).update(int(p) for p in positions)
    plan = make_plan(graph, removed)  # type: ignore[arg-type]
    _check(graph, plan, kept)
    return plan


def _check(graph: Graph, plan: Plan, kept: Mapping[str, Mapping[int, np.ndarray]]) -> None:
    masks = keep_masks(graph, plan)
    for name in graph.parameters:
        for dim, term in enumerate(graph.typing.tensors[name]):
            ours = np.flatnonzero(mask(term, masks))
            theirs = kept.get(name, {}).get(dim, np.arange(graph.tensors[name].shape[dim]))
            if not np.array_equal(ours, theirs):
                raise Detached(
                    f"of dimension {dim} of {name!r} it keeps {len(theirs)} places, a plan {len(ours)}"
                )
