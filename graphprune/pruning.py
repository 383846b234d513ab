"""What ``optimize`` runs: pruning to a budget, repair, training, the lossless pipeline, another precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import InputError
from .graph import Graph
from .pipeline import LOSSLESS, Context, Instrument, Pass, Pipeline
from .plans.budget import absolute
from .plans.candidates import RESOURCES
from .plans.plan import CostModel, Plan
from .plans.schedule import shares
from .precision import suffix
from .sparsity.zeros import empty_by_masks
from .textual import make_pass


@dataclass(frozen=True)
class Pruning:
    """What the caller asked for.

    Attributes:
        budgets: name → a fraction, an absolute number, or ``None``.
        importance: of ``prune-channels``.
        repair: whether ``repair`` follows each removal.
        steps, schedule: how many rounds, and how much each leaves (:mod:`graphprune.plans.schedule`).
        callback: the caller's training after each round.
        precision, max_drop: what the numbers become afterwards (:mod:`graphprune.precision`).
    """

    budgets: Mapping[str, Any]
    importance: Any = "auto"
    repair: bool = True
    steps: int = 1
    schedule: str = "polynomial"
    callback: Callable[[Any, int], Any] | None = None
    precision: str | None = None
    max_drop: float | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """The budgets that were given."""
        return {name: value for name, value in self.budgets.items() if value is not None}

    def pipeline(self, given: str | Pipeline | None, graph: Graph | None = None) -> Pipeline:
        """The passes.

        Args:
            given: the caller's own passes, instead.
            graph: the captured network, whose cost the rounds' budgets are shares of; without it, the
                pipeline has the right passes in the right order, and the last round's budget in each.

        Raises:
            InputError: both passes and a budget, rounds without a budget, or a value out of range.
        """
        shares(1.0, self.steps, self.schedule)
        asked = self.asked
        last = suffix(self.precision, self.max_drop)
        if given is not None and last:
            raise InputError(f"both a pipeline and a precision are given; end the pipeline with {last}")
        if given is not None:
            if asked:
                raise InputError(
                    f"both a pipeline and a budget ({', '.join(asked)}) are given; "
                    "write the budget into the pipeline: prune-channels{macs=0.5},repair,…"
                )
            self._no_rounds("a pipeline of your own")
            return Pipeline.parse(given) if isinstance(given, str) else given
        lossless = LOSSLESS
        if graph is not None and empty_by_masks(graph):  # folded in, they leave channels that are dead
            lossless += ",remove-dead-channels"
        lossless = f"{lossless},{last}" if last else lossless
        if not asked:
            self._no_rounds("no budget")
            return Pipeline.parse(lossless)
        if "latency" in asked and self.steps > 1:
            raise InputError(
                "a latency budget is reached in one step; for several give macs, params or bytes"
            )
        rounds: Sequence[dict[str, Any]] = [asked] * self.steps
        if graph is not None and "latency" not in asked:
            rounds = self._rounds(graph) if self.steps > 1 else rounds
            absolute(CostModel(graph).totals({}), asked)  # out of range is said before anything runs
        passes: list[Pass] = []
        for number, budgets in enumerate(rounds, 1):
            passes.append(make_pass("prune-channels", {**budgets, "importance": self.importance}))
            if self.repair:
                passes.append(make_pass("repair", {}))
            if self.callback is not None:
                passes.append(make_pass("train", {"function": self.callback, "step": number}))
        return Pipeline((*passes, *Pipeline.parse(lossless)))

    def _no_rounds(self, why: str) -> None:
        if self.steps > 1 or self.callback is not None:
            raise InputError(f"steps and callback go with a budget (as in macs=0.5), and there is {why}")

    def _rounds(self, graph: Graph) -> Sequence[dict[str, Any]]:
        """The budgets of every round, as absolute numbers."""
        now = CostModel(graph).totals({})
        rounds: list[dict[str, Any]] = [{} for _ in range(self.steps)]
        for name, limit in absolute(now, self.asked).items():
            whole = now[RESOURCES[name]]
            for budgets, share in zip(rounds, shares(limit / whole, self.steps, self.schedule), strict=True):
                budgets[name] = max(1, int(share * whole + 1e-6))
        return rounds


def planned(passes: Pipeline, graph: Graph, context: Context, instruments: Sequence[Instrument] = ()) -> Plan:
    """What the first pass of a pipeline that plans would remove; passes before it run.

    Raises:
        InputError: no pass of the pipeline plans.
    """
    for index, step in enumerate(passes):
        plan = getattr(step, "plan", None)
        if plan is not None:
            before = Pipeline(passes.passes[:index]).run(graph, context, instruments)
            found: Plan = plan(before.graph, context)[0]
            return found
    raise InputError("dry_run shows a plan, and nothing is pruned: give a budget, as in macs=0.5")
