"""What the other libraries have in common here: a way to prune to a budget, found as they document it.

The libraries are read from the folders named in ``GRAPHPRUNE_PEERS`` (separated as in ``PATH``), so that
they need not be installed beside ours; see :mod:`benchmarks.axes.speed`.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from benchmarks.pruning.attach import Detached, kept_places, plan_of
from benchmarks.pruning.data import Split
from benchmarks.pruning.measure import least, quick_macs
from graphprune.graph import Graph
from graphprune.plans.plan import Plan

for folder in filter(None, os.environ.get("GRAPHPRUNE_PEERS", "").split(os.pathsep)):
    if folder not in sys.path:
        sys.path.append(folder)

Replay = Callable[[nn.Module], None]
"""Prunes another copy of the same network in place, by the decision already made."""

Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One network to prune, with all that a method may use.

    Attributes:
        name: of the network.
        model: to be copied, never changed.
        gradients: of the loss over the labelled calibration inputs; empty where there are no labels.
    """

    name: str
    model: nn.Module
    split: Split
    gradients: Gradients

    def copy(self) -> nn.Module:
        """A fresh copy, with the gradients where there are any."""
        model = copy.deepcopy(self.model)
        for name, parameter in model.named_parameters():
            if name in self.gradients:
                parameter.grad = self.gradients[name].clone()
        return model


@dataclass(frozen=True)
class Variant:
    """One way to use a library.

    Attributes:
        library, label: for the table.
        networks: those it can be used on.
        prune: case, ratio → the pruned network and how to prune another copy the same way.
    """

    library: str
    label: str
    networks: frozenset[str]
    prune: Callable[[Case, float], tuple[nn.Module, Replay]]

    def to_budget(self, case: Case, macs: float, low: float = 0.0) -> tuple[float, tuple[nn.Module, Replay]]:
        """The smallest ratio above ``low`` that leaves at most ``macs`` an input, and its network.

        Raises:
            ValueError: no ratio meets the budget.
        """

        def attempt(ratio: float) -> tuple[float, tuple[nn.Module, Replay]]:
            found = self.prune(case, ratio)
            return quick_macs(found[0], case.split.example), found

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs, about theirs
            return least(attempt, macs, low)


def gradients(model: nn.Module, split: Split) -> Gradients:
    """Of the mean loss over the labelled calibration inputs, in eval mode."""
    if split.labels is None:
        return {}
    work = copy.deepcopy(model)
    for batch, labels in zip(split.calibration, split.labels, strict=True):
        (split.loss(work(batch), labels) / len(split.labels)).backward()
    return {name: p.grad for name, p in work.named_parameters() if p.grad is not None}


def plan_for(graph: Graph, case: Case, replay: Replay) -> Plan:
    """What was removed, as a plan of ours.

    Raises:
        Detached: it is none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return plan_of(graph, kept_places(case.model, replay))
        except (KeyError, RuntimeError) as error:
            raise Detached(f"{type(error).__name__}: {error}") from error
