"""Remove the least important positions of every axis until the network meets a budget.

What is removed together follows from the axis types (:mod:`graphprune.axes`), so channels, hidden units,
heads and groups are one mechanism. Importances are listed in :mod:`graphprune.importance`, from magnitudes
(Li et al., *Pruning Filters for Efficient ConvNets*, ICLR 2017) to the error that the best repair leaves
(Hassibi and Stork, *Optimal Brain Surgeon*, 1993); they are summed over all coupled parameters (Fang et al.,
*DepGraph*, CVPR 2023). A budget means what it says: ``macs=0.5`` leaves at most half the
multiply-accumulates, and more than half if one step less were taken; ``latency=0.5`` leaves an artifact that
was timed on this host at half the unpruned one's (:mod:`graphprune.latency`). Widths stay on the target's
alignment.

The rewrite is exact in the sense of certificate 1 (the pruned network equals the original with the
removed positions zeroed); the outputs change, and by how much is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from graphprune.errors import PassError
from graphprune.graph import Graph
from graphprune.importance import Data
from graphprune.latency import solve as solve_latency
from graphprune.pipeline import Context, Note, Pass, PassResult
from graphprune.plans.budget import solve
from graphprune.plans.candidates import RESOURCES, Candidates, Limits, Share
from graphprune.plans.plan import CostModel, Plan


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Prune to a budget.

    Attributes:
        macs, params, bytes: budgets, each a fraction of what the network has (a float up to 1.0) or an
            absolute number.
        latency: a budget measured on this host: a fraction of the unpruned artifact's latency, or a time
            (``"5ms"``); stands alone. One budget is needed.
        importance: a name of :data:`graphprune.importance.NAMES`, a callable ``(graph, axis) -> scores`` from
            Python, or ``auto``: ``reconstruction`` where there are calibration inputs, else ``l2``.
        scope: ``global`` (one queue for all axes), ``local`` (the same share of each) or ``isomorphic`` (the
            same share of each kind of axis).
        minimum: share of its positions that every axis keeps, or a number of them; from Python also by name.
        maximum: what an axis keeps at most, in the same way.
        align: convolution widths stay multiples of this; ``none`` takes the target's alignment.
        ignored: axes, parameters or modules that keep every position, by name or glob.
        only: axes, parameters or modules that alone may lose positions, by name or glob.
        statistical: prune axes that a normalisation runs over, too (embedding widths).
        loss: from Python, ``module -> loss`` or an iterator of losses for the Taylor importances.
        limit: calibration samples that an importance looks at.
    """

    name: ClassVar[str] = "prune-channels"
    exact: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | str | None = None
    importance: Any = "auto"
    scope: str = "global"
    minimum: Share = 0.1
    maximum: Share = 1.0
    align: int | None = None
    ignored: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    statistical: bool = False
    loss: Callable[[Any], Any] | None = None
    limit: int = 512

    def run(self, graph: Graph, context: Context) -> PassResult:
        """A smaller graph, with the plan that led to it."""
        plan, said = self.plan(graph, context)
        if not plan:
            met = Note("info", "", "the network meets the budget as it is")
            return PassResult(graph, False, (met, *said[1:]))
        small = graph.apply(plan)
        notes = [Note("changed", row.axis, f"{row.before} → {row.after} positions") for row in plan.rows]
        return PassResult(small, True, (*said, *notes), plan=plan, pruned=small)

    def plan(self, graph: Graph, context: Context) -> tuple[Plan, tuple[Note, ...]]:
        """What would go, and notes that say how it was chosen and what was measured; nothing is changed."""
        asked = {"macs": self.macs, "params": self.params, "bytes": self.bytes}
        # An absolute budget that earlier passes have met already asks for nothing.
        now = CostModel(graph).totals({})
        budgets = {
            name: min(value, now[RESOURCES[name]]) if value > 1 else value
            for name, value in asked.items()
            if value is not None
        }
        if not budgets and self.latency is None:
            raise PassError(self.name, "needs a budget: macs, params, bytes or latency")
        if budgets and self.latency is not None:
            raise PassError(
                self.name,
                f"a latency budget stands alone, and {', '.join(budgets)} is given, too; "
                "put one prune-channels after the other",
            )
        channels, linears = context.target.channel_alignment, context.target.linear_alignment
        limits = Limits(
            minimum=self.minimum,
            maximum=self.maximum,
            channel_alignment=channels if self.align is None else self.align,
            linear_alignment=linears if self.align is None else self.align,
            ignored=self.ignored,
            only=self.only,
            statistical=self.statistical,
        )
        importance, why = self.importance, ""
        if importance == "auto":
            known = context.calibration is not None
            importance = "reconstruction" if known else "l2"
            why = ": with calibration inputs" if known else ": there are no calibration inputs"
        data = Data(context.calibration, self.loss, self.limit)
        chosen = Note("info", "", f"ranked by {importance}{why}; scope {self.scope}")
        if self.latency is None:
            plan = solve(
                graph, budgets, importance, scope=self.scope, limits=limits, seed=context.seed, data=data
            )
            return plan, (chosen,)
        ranked = Candidates.of(
            graph, importance, scope=self.scope, limits=limits, seed=context.seed, data=data
        )
        plan, record = solve_latency(
            graph, self.latency, ranked, context.target, backend=context.backend, threads=context.threads,
            progress=context.progress,
        )  # fmt: skip
        return plan, (chosen, *(Note("info", "latency", line) for line in record.notes))
