"""Remove the least important positions of every axis until the network meets a budget.

What is removed together follows from the axis types (:mod:`graphprune.axes`), so channels, hidden units,
heads and groups are one mechanism. Importance is a magnitude summed over all coupled parameters (Li et
al., *Pruning Filters for Efficient ConvNets*, ICLR 2017; Fang et al., *DepGraph*, CVPR 2023), or a
callable. A budget means what it says: ``macs=0.5`` leaves at most half the multiply-accumulates, and
more than half if one step less were taken. Widths stay on the target's alignment.

The rewrite is exact in the sense of certificate 1 (the pruned network equals the original with the
removed positions zeroed); the outputs change, and by how much is recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from graphprune.budget import Limits, solve
from graphprune.errors import PassError
from graphprune.graph import Graph
from graphprune.pipeline import Context, Note, Pass, PassResult


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Prune to a budget.

    Attributes:
        macs, params, bytes: budgets, each a fraction of what the network has (a float up to 1.0) or an
            absolute number; at least one.
        importance: ``l1``, ``l2``, ``random``, or a callable ``(graph, axis) -> scores`` from Python.
        scope: ``global`` (one queue for all axes) or ``local`` (the same share of each).
        minimum: share of its positions that every axis keeps.
        align: convolution widths stay multiples of this; ``none`` takes the target's alignment.
        ignored: axes, parameters or modules that keep every position, by name or glob.
        statistical: prune axes that a normalisation runs over, too.
    """

    name: ClassVar[str] = "prune-channels"
    exact: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    importance: Any = "l2"
    scope: str = "global"
    minimum: float = 0.1
    align: int | None = None
    ignored: tuple[str, ...] = ()
    statistical: bool = False

    def run(self, graph: Graph, context: Context) -> PassResult:
        """A smaller graph, with the plan that led to it."""
        asked = {"macs": self.macs, "params": self.params, "bytes": self.bytes}
        budgets = {name: value for name, value in asked.items() if value is not None}
        if not budgets:
            raise PassError(self.name, "needs a budget: macs, params or bytes")
        channels, linears = context.target.channel_alignment, context.target.linear_alignment
        limits = Limits(
            minimum=self.minimum,
            channel_alignment=channels if self.align is None else self.align,
            linear_alignment=linears if self.align is None else self.align,
            ignored=self.ignored,
            statistical=self.statistical,
        )
        plan = solve(graph, budgets, self.importance, scope=self.scope, limits=limits, seed=context.seed)
        if not plan:
            return PassResult(graph, False, (Note("info", "", "the network meets the budget as it is"),))
        small = graph.apply(plan)
        notes = [Note("changed", row.axis, f"{row.before} → {row.after} positions") for row in plan.rows]
        return PassResult(small, True, tuple(notes), plan=plan, pruned=small)
