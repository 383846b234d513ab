"""What a pruned graph was before, and what was removed from it: the target of a repair.

Applying a plan leaves this with the smaller graph (:func:`graphprune.plans.rewrite.apply_plan`), and further
plans are composed with it, so that however many steps a network shrinks in, what it is compared with is the
network before the first. That network is held, not copied: its tensors stay in memory as long as the
smaller graph does. Nothing of it enters a fingerprint, an artifact or a state dict.

>>> import torch, graphprune
>>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))
>>> graph = graphprune.trace(model, torch.zeros(1, 3))
>>> small = graph.apply(graph.plan({"0.weight[0]": [0, 1]}))
>>> smaller = small.apply(small.plan({"0.weight[0]": [0, 5]}))
>>> dict(smaller.removal.plan.removed), smaller.removal.original.tensors["0.weight"].shape
({'0.weight[0]': (0, 1, 2, 7)}, torch.Size([8, 3]))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..graph import Graph
    from .plan import Plan


@dataclass(frozen=True, eq=False)
class Removal:
    """The network before positions were removed, and the plan that leads from it to the graph this is of.

    Attributes:
        original: the network before; it shares operators and tensors with the graph the plan was applied to.
        plan: every position removed since, in terms of ``original``.
        refitted: tensor name → the value that a repair gave it, fitted to ``original``. A tensor with
            another value by now (it was trained) is not of ``original`` any more.
        restarted: why an earlier removal is not part of this one; empty if there was none.
    """

    original: Graph = field(repr=False)
    plan: Plan
    refitted: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    restarted: str = ""

    @staticmethod
    def of(graph: Graph, plan: Plan, restarted: str = "") -> Removal:
        """The removal that starts with a graph as it is now."""
        original = replace(graph, removal=None, tensors=dict(graph.tensors), _module=None)
        return Removal(original, plan, restarted=restarted)

    def refit(self, values: Mapping[str, torch.Tensor]) -> Removal:
        """The same with more tensors fitted to the original, or the same ones anew."""
        return replace(self, refitted={**self.refitted, **{k: v.detach() for k, v in values.items()}})

    def __deepcopy__(self, memo: dict[int, Any]) -> Removal:
        """Itself: a value, and the original is not to be copied."""
        return self
