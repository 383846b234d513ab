"""Our side of the comparison: everything that decides how well it does is in :func:`pruned`."""

from __future__ import annotations

from typing import Any

from graphprune.passes.repair import repair

from graphprune.graph import Graph
from graphprune.importance import Data
from graphprune.plans.budget import solve
from graphprune.plans.candidates import Limits
from graphprune.plans.plan import Plan

LIMIT = 2048  # calibration samples: all there are
MINIMUM = 0.05  # share of its positions that every axis keeps: a tenth would forbid eight times fewer MACs


def pruned(graph: Graph, share: float, calibration: list[Any]) -> Graph:
    """``graph`` with at most ``share`` of its multiply-accumulates, repaired; no labels, no training."""
    limits = Limits(minimum=MINIMUM)
    plan = solve(graph, {"macs": share}, "reconstruction", limits=limits, data=Data(calibration, limit=LIMIT))
    return repaired(graph, plan, calibration)


def repaired(graph: Graph, plan: Plan, calibration: list[Any]) -> Graph:
    """``graph`` without what ``plan`` removes, repaired: what stands behind other libraries' choices, too."""
    return repair(graph, graph.apply(plan), plan, calibration, limit=LIMIT).graph
