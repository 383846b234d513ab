"""Compute once what depends on parameters alone: weight norm, weight standardisation, fused projections.

For deployment: the weight that ``weight_norm`` derives from a direction ``v`` and a length ``g`` becomes one
parameter, into which a batch norm can then fold. What trained it is gone, so the module no longer
trains as the original did.

>>> import torch, graphprune
>>> from graphprune.pipeline import Pipeline
>>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
>>> graph = graphprune.trace(layer, torch.zeros(1, 3))
>>> print(Pipeline.parse("fold-parameters").run(graph).graph)
input_1: f32[1, 3]
linear: f32[1, 2] = linear(input_1, %weight, %bias)
return (linear,)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphprune.graph import Graph
from graphprune.pipeline import Context, Pass, PassResult

from .fold_constants import fold


@dataclass(frozen=True)
class FoldParameters(Pass):
    """Operators on parameters, buffers and literals alone become parameters.

    Options:
        max_bytes: how much larger than the tensors it replaces a folded tensor may be.
    """

    name: ClassVar[str] = "fold-parameters"
    ensures: ClassVar[frozenset[str]] = frozenset({"folded-parameters"})
    destroys: ClassVar[frozenset[str]] = frozenset({"trainable"})
    max_bytes: int = 1 << 20

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Fold a copy's operators on parameters."""
        return fold(graph, self.max_bytes, lambda tensor: True)
