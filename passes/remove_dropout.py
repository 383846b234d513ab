"""Remove what only training can tell apart: dropout that follows the mode, and ``detach``.

In evaluation mode ``dropout(x) = x`` and ``detach(x) = x``, so outputs do not change; the module no
longer trains as the original did. Dropout that is on in evaluation mode too (Monte Carlo dropout) stays.

>>> import torch, graphprune
>>> from graphprune.pipeline import Pipeline
>>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
>>> print(Pipeline.parse("remove-dropout").run(graphprune.trace(model, torch.zeros(1, 2))).graph)
input_1: f32[1, 2]
linear: f32[1, 2] = linear(input_1, %0.weight, %0.bias)
return (linear,)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphprune.graph import Graph
from graphprune.operands import argument
from graphprune.pipeline import Context, Note, Pass, PassResult

aten = torch.ops.aten

_DROPOUTS = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
)


@dataclass(frozen=True)
class RemoveDropout(Pass):
    """Dropout that is off in evaluation mode goes, inside attention too."""

    name: ClassVar[str] = "remove-dropout"
    ensures: ClassVar[frozenset[str]] = frozenset({"no-dropout"})
    destroys: ClassVar[frozenset[str]] = frozenset({"trainable"})

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Replace each dropout by what it reads."""
        result, notes = graph.copy(), []
        for node in list(result.find(*_DROPOUTS, aten.detach.default)):
            if node.target is not aten.detach.default and argument(node, "train"):
                message = "is on in evaluation mode too, so it is part of the result"
                notes.append(Note("refused", result.where(node), message))
                continue
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            notes.append(Note("changed", result.place(node), "removed"))
        for node in result.find(aten.scaled_dot_product_attention.default):
            if node.meta.pop("follows_training", None):
                notes.append(Note("changed", result.place(node), "attention dropout removed"))
        if not any(note.kind == "changed" for note in notes):
            return PassResult(graph, False, (*notes, Note("info", "", "no dropout to remove")))
        result.sweep()
        return PassResult(result, True, tuple(notes))
