"""Remove attention heads that cannot change the result.

The analysis of :mod:`.dead`, on the axes of heads alone. A head is dead when nothing reads its context (its
columns of the output projection are 0), when its values are 0, or when they are some other number ``c``:
weights of a softmax sum to 1, so its context is ``c`` whatever is attended to, and the output projection
takes it,

    b' = b + W[:, head] c

A group of queries that share keys and values is dead when all of them are. The other channels, hidden
units and the widths inside heads stay as they are; ``remove-dead-channels`` takes those and heads in one.

>>> import torch, graphprune
>>> from graphprune.pipeline import Context
>>> layer = torch.nn.TransformerEncoderLayer(12, 4, 16, batch_first=True, norm_first=True).eval()
>>> _ = layer.self_attn.out_proj.weight.data[:, 3:6].zero_()
>>> result = RemoveDeadHeads().run(graphprune.trace(layer, torch.zeros(2, 5, 12)), Context())
>>> print(result.notes[0].message)
1 of 4 removed (position 1): 1 unread
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphprune.axes.axis import Axis
from graphprune.graph import Graph
from graphprune.pipeline import Context, Pass, PassResult

from .attention import attentions
from .dead import remove_dead


@dataclass(frozen=True)
class RemoveDeadHeads(Pass):
    """Heads and groups that are unread, zero or constant go; constants move into biases."""

    name: ClassVar[str] = "remove-dead-heads"
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Remove dead heads from a copy."""
        return remove_dead(graph, lambda: _heads(graph), "heads")


def _heads(graph: Graph) -> list[Axis]:
    layers = attentions(graph)
    found = (a for layer in layers for a in (*layer.heads, *layer.shared, *layer.frozen))
    return list({axis.name: axis for axis in found}.values())
