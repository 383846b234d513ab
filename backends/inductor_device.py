"""A graph on another device than it was captured on, and the calls of its package on that device.

Capture happens where the model is, mostly on the CPU. For a GPU the weights and example inputs go there, and
so does every device that stands in the graph as an argument (``zeros(…, device=cpu)``).

>>> import torch, graphprune
>>> graph = graphprune.trace(torch.nn.Linear(3, 2), torch.zeros(1, 3))
>>> elsewhere = moved(graph, "meta")
>>> elsewhere.callable()(*elsewhere.examples)[0].device
device(type='meta')
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx.node import map_aggregate

from graphprune.graph import Graph


def moved(graph: Graph, device: str) -> Graph:
    """A copy of ``graph`` whose tensors, examples and device arguments are on ``device``."""
    there = torch.device(device)
    work = graph.copy()
    work.set_tensors({name: value.detach().to(there) for name, value in graph.tensors.items()})

    def placed(argument: Any) -> Any:
        return there if isinstance(argument, torch.device) else argument

    for node in work.fx.nodes:
        if node.op == "call_function":
            node.args = map_aggregate(node.args, placed)
            node.kwargs = map_aggregate(node.kwargs, placed)
    return replace(work, examples=tuple(example.to(there) for example in graph.examples))


def device_of(facts: dict[str, str]) -> str:
    """The device a package was compiled for, by its metadata."""
    return facts.get("AOTI_DEVICE_KEY", "cpu") or "cpu"
