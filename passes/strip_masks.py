"""Masks become part of their weights: the last step after training a network with zeros.

``mul(weight, mask)`` becomes the weight, zeros included, and the mask goes. What trains on from there may
fill the zeros again.

>>> import torch, graphprune
>>> from graphprune.pipeline import Pipeline
>>> graph = graphprune.trace(torch.nn.Linear(4, 2), torch.zeros(1, 4))
>>> print(Pipeline.parse("prune-weights{pattern=2:4},strip-masks").run(graph).graph)
input_1: f32[1, 4]
linear: f32[1, 2] = linear(input_1, %weight, %bias)
return (linear,)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphprune.passes.prune_weights.masks import mask_of, product_of

from graphprune.graph import Graph
from graphprune.pipeline import Context, Note, Pass, PassResult


@dataclass(frozen=True)
class StripMasks(Pass):
    """Multiply masks into their weights and remove them."""

    name: ClassVar[str] = "strip-masks"
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    def run(self, graph: Graph, context: Context) -> PassResult:
        """A graph without masks; notes say how many zeros became permanent."""
        found = {name: mask for name in graph.parameters if (mask := mask_of(graph, name)) is not None}
        if not found:
            return PassResult(graph, False, (Note("info", "", "no weight has a mask"),))
        result = graph.copy()
        # A negative weight times zero is -0.0; adding zero makes it the zero that all others are.
        result.set_tensors({n: graph.tensors[n].detach() * graph.tensors[m] + 0.0 for n, m in found.items()})
        notes = []
        for name, mask in found.items():
            product = product_of(result, name)
            weight = next(n for n in product.all_input_nodes if n.target == name)
            product.replace_all_uses_with(weight)
            zeros = int((graph.tensors[mask] == 0).sum())
            notes.append(Note("changed", name, f"{zeros:,} zeros are part of it now"))
        result.sweep()
        return PassResult(result.propagate(), True, tuple(notes))
