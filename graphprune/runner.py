"""Runs a graph operator by operator over many batches at once, keeping only what is still to be read.

Two runners side by side, one for a network before and one for it after pruning, cost one forward pass
each and hold the activations of the frontier, whatever the depth.

>>> import torch, graphprune
>>> graph = graphprune.trace(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()), torch.zeros(1, 3))
>>> runner = Runner(graph, [(torch.ones(1, 3),), (torch.zeros(1, 3),)])
>>> relu = graph.nodes[-2]
>>> runner.advance(relu)
>>> [value.shape for value in runner.values(relu)]
[torch.Size([1, 2]), torch.Size([1, 2])]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .graph import Graph


class Runner:
    """One network, all batches, one operator after the other.

    Args:
        graph: the network; replacing its tensors counts for the operators still to come.
        calls: flat inputs of each batch.
        keep: nodes whose values stay until they are released, once for each time they stand here.
    """

    def __init__(self, graph: Graph, calls: Sequence[Sequence[torch.Tensor]], keep: Iterable[fx.Node] = ()):
        self.graph = graph
        self._nodes = [node for node in graph.fx.nodes if node.op not in ("get_attr", "output")]
        self._place = {node: i for i, node in enumerate(self._nodes)}
        self._next = 0
        self._keep = Counter(keep)
        self._constant = _constants(graph)
        self._fixed: dict[fx.Node, Any] = {}
        inputs = graph.placeholders
        self._values: list[dict[fx.Node, Any]] = [dict(zip(inputs, call, strict=True)) for call in calls]
        self._last: dict[fx.Node, fx.Node] = {}
        for node in self._nodes:
            for source in node.all_input_nodes:
                self._last[source] = node

    def advance(self, node: fx.Node, *, inclusive: bool = True) -> None:
        """Run everything up to ``node`` in execution order, and ``node`` itself if ``inclusive``."""
        end = self._place[node] + inclusive
        while self._next < end:
            self._step(self._nodes[self._next])
            self._next += 1

    def values(self, node: fx.Node) -> list[Any]:
        """The value of a node in every batch; it must have run and still be wanted."""
        if node.op == "get_attr" or node in self._constant:
            return [self._value({}, node)] * len(self._values)
        return [values[node] for values in self._values]

    def release(self, node: fx.Node) -> None:
        """Undo one ``keep`` of a node; after the last one it goes as soon as all that read it have run."""
        self._keep[node] -= 1
        self._free(node, self._next)

    def compute(self, node: fx.Node, batch: int, tensors: Mapping[str, torch.Tensor]) -> Any:
        """What ``node`` gives in one batch when some tensors are others; nothing is stored."""
        return self._run(node, self._values[batch], tensors)

    @torch.no_grad()
    def _step(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            return
        if node in self._constant:
            self._fixed[node] = self._run(node, {}, {})
        else:
            for values in self._values:
                values[node] = self._run(node, values, {})
        for source in node.all_input_nodes:
            self._free(source, self._next + 1)

    def _free(self, node: fx.Node, done: int) -> None:
        """Forget a value whose last reader is among the first ``done`` nodes."""
        if self._keep[node] > 0 or node in self._constant or node.op == "get_attr":
            return
        last = self._last.get(node)
        if last is None or self._place.get(last, len(self._nodes)) < done:
            for values in self._values:
                values.pop(node, None)

    @torch.no_grad()
    def _run(self, node: fx.Node, values: dict[fx.Node, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(values, n, tensors))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _value(
        self, values: dict[fx.Node, Any], node: fx.Node, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> Any:
        if node.op == "get_attr":
            name = str(node.target)
            if tensors and name in tensors:
                return tensors[name]
            return self.graph.bodies[name] if name in self.graph.bodies else self.graph.tensors[name]
        return self._fixed[node] if node in self._constant else values[node]


def _constants(graph: Graph) -> set[fx.Node]:
    """Operators that nothing the caller passes goes into: they run once, not once a batch."""
    found: set[fx.Node] = set()
    for node in graph.fx.nodes:
        if node.op == "call_function" and all(
            source in found or source.op == "get_attr" for source in node.all_input_nodes
        ):
            found.add(node)
    return found
