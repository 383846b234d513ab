"""What the tests of pruned graphs share: small modules, and a pruned graph that was proved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import graphprune
from graphprune.plans.plan import Plan
from graphprune.verify import mask_equivalence
from tests.zoo.network import randomise_norms


class Small(nn.Module):
    """A function of an input and of parameters or modules, as a module."""

    def __init__(self, function: Callable[..., Any], **members: Any):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, nn.Parameter(member) if isinstance(member, torch.Tensor) else member)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def proved(graph: graphprune.Graph, plan: Plan, calls: Any = None) -> graphprune.Graph:
    """The pruned graph, once it is proved to be the masked original."""
    pruned = graph.apply(plan)
    certificate = mask_equivalence(graph, plan, calls, pruned=pruned)
    assert certificate.exact
    assert certificate.passed, str(certificate)
    return pruned


def small_net() -> nn.Module:
    """A convolutional classifier with every kind of norm and a dropout, in evaluation mode."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.GroupNorm(4, 12), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 5),
    )  # fmt: skip
    randomise_norms(model, 0)
    return model.eval()
