"""Clamping activations in a row become one: ``relu6(relu(x))`` is ``hardtanh(x, 0, 6)``.

ReLU, ReLU6, hardtanh and clamp all keep a value between two bounds, and so does one after another:

    min(max(min(max(x, a), b), c), d) = min(max(x, lower), upper)
    lower = min(max(a, c), d),   upper = min(max(b, c), d)

so that a chain of them is a single operator, as long as nobody else reads what lies between.

>>> import torch, graphprune
>>> from graphprune.pipeline import Context
>>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Hardtanh(-1, 6))
>>> result = MergeActivations().run(graphprune.trace(model, torch.zeros(2)), Context())
>>> print(result.graph)
input_1: f32[2]
clamp_default: f32[2] = clamp(input_1, 0, 6)
return (clamp_default,)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx

from graphprune.graph import Graph
from graphprune.pipeline import Context, Note, Pass, PassResult

__all__ = ["MergeActivations"]

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeActivations(Pass):
    """Neighbouring ReLU, ReLU6, hardtanh and clamp become one clamp.

    Options:
        keep: names of nodes that stay as they are.
    """

    name: ClassVar[str] = "merge-activations"
    keep: tuple[str, ...] = ()

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Merge from the inputs on; a merged pair may be the first of another."""
        result, notes = graph.copy(), []
        for node in result.nodes:
            source = node.args[0] if node.args else None
            outer = bounds(node)
            if outer is None or not isinstance(source, fx.Node):
                continue
            inner = bounds(source)
            if inner is None:
                continue
            where = result.where(node)
            if {node.name, source.name} & set(self.keep):
                notes.append(Note("refused", where, "is to be kept"))
            elif len(source.users) > 1:
                notes.append(Note("refused", where, f"{source.name} is also read by others"))
            else:
                lower, upper = (min(max(bound, outer[0]), outer[1]) for bound in inner)
                clamp(result, node, source.args[0], lower, upper)
                notes.append(Note("changed", where, f"merged with {source.name}"))
        if not any(note.kind == "changed" for note in notes):
            return PassResult(graph, False, (*notes, Note("info", "", "no activations to merge")))
        result.sweep()
        return PassResult(result, True, tuple(notes))


def bounds(node: fx.Node) -> tuple[float, float] | None:
    """The bounds a clamping operator keeps values between; ``None`` for every other."""
    if node.op != "call_function":
        return None
    if node.target is aten.relu.default:
        return 0, math.inf
    if node.target is aten.relu6.default:
        return 0, 6
    if node.target is aten.hardtanh.default:
        lower, upper = [*node.args[1:], *(-1, 1)[len(node.args) - 1 :]]
        return cast(float, lower), cast(float, upper)
    if node.target is aten.clamp.default and not node.kwargs:
        lower, upper = [*node.args[1:], None, None][:2]
        lower, upper = -math.inf if lower is None else lower, math.inf if upper is None else upper
        return cast(float, lower), cast(float, upper)
    return None


def clamp(graph: Graph, node: fx.Node, source: Any, lower: float, upper: float) -> None:
    """Put ``clamp(source, lower, upper)`` in the place of ``node``."""
    # Whole numbers as integers: a float would turn an integer tensor into floats.
    limits = [None if math.isinf(b) else int(b) if b == int(b) else b for b in (lower, upper)]
    with graph.fx.inserting_before(node):
        merged = graph.fx.call_function(aten.clamp.default, (source, *limits))
    merged.meta = dict(node.meta)
    node.replace_all_uses_with(merged)
    graph.fx.erase_node(node)
