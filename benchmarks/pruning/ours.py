"""Our side of the comparison: everything that decides how well it does is in :func:`pruned`."""

from __future__ import annotations

from typing import Any

from graphprune.passes.repair import repair

from graphprune.budget import solve
from graphprune.graph import Graph
from graphprune.plan import Plan


def pruned(graph: Graph, share: float, calibration: list[Any]) -> Graph:
    """``graph`` with at most ``share`` of its multiply-accumulates, repaired; no labels, no training."""
    return repaired(graph, solve(graph, {"macs": share}, "l2", scope="local"), calibration)


def repaired(graph: Graph, plan: Plan, calibration: list[Any]) -> Graph:
    """``graph`` without what ``plan`` removes, repaired: what stands behind other libraries' choices, too."""
    return repair(graph, graph.apply(plan), plan, calibration).graph
