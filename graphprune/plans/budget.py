"""From a budget to a plan: which positions go so that the network costs what was asked, and no less.

Removing the first k steps of the queue (:mod:`~graphprune.plans.candidates`) costs less the larger k is, so
the smallest k that meets the budget is found by bisection: about 16 evaluations of the whole network's cost,
however many candidates there are.

What a step saves depends on the other axes, as MACs are a polynomial of all sizes. Where the queue weighs
scores against savings, they are taken at the sizes of the last solution, a few times over, and the plan with
the lowest sum of scores is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..errors import InputError
from ..graph import Graph
from ..importance import Data, Importance
from .candidates import RESOURCES, Candidates, Limits, Queue
from .plan import CostModel, Plan

PRICINGS = 3


def solve(
    graph: Graph,
    budgets: Mapping[str, float],
    importance: Importance = "l2",
    *,
    scope: str = "global",
    limits: Limits | None = None,
    seed: int = 0,
    data: Data | None = None,
) -> Plan:
    """The plan that removes the fewest steps, in the queue's order, and meets every budget.

    Args:
        budgets: ``macs``, ``params`` or ``bytes`` → a fraction of what the network has now (a float
            up to 1), or an absolute number.
        importance: see :mod:`graphprune.importance`.
        scope: ``global``, ``local`` or ``isomorphic``; see the module docstring.
        limits: what may go, and in which steps.
        seed: for random importance.
        data: calibration inputs, for the importances that look at them.

    Raises:
        InputError: a budget is out of range, cannot be reached (the closest is named), an ignored
            name matches nothing, or the importance does not fit.
    """
    wanted = absolute(CostModel(graph).totals({}), budgets)  # what is out of range is said before ranking
    candidates = Candidates.of(graph, importance, scope=scope, limits=limits, seed=seed, data=data)

    def met(queue: Queue, count: int) -> bool:
        found = queue.totals(count)
        return all(found[RESOURCES[name]] <= limit for name, limit in wanted.items())

    queue = candidates.queue({}, wanted)
    if not met(queue, len(queue)):
        closest, now = queue.totals(len(queue)), queue.totals(0)
        reach = ", ".join(
            f"{name} {closest[key]:,} ({closest[key] / now[key]:.3f} of now) for {limit:,.0f} asked"
            for name, limit in wanted.items()
            for key in (RESOURCES[name],)
        )
        raise InputError(
            f"the budget cannot be reached; the closest is {reach}. "
            "Lower `minimum`, allow statistical axes, or ask for less"
        )
    best: tuple[float, Queue, int] | None = None
    for _ in range(PRICINGS if candidates.priced else 1):
        count = queue.first(partial(met, queue))
        cost = queue.cost(count)
        if best is None or cost < best[0]:
            best = cost, queue, count
        queue = candidates.queue(queue.sizes(count), wanted)
    assert best is not None
    return best[1].plan(best[2])


def absolute(now: Mapping[str, int], budgets: Mapping[str, float]) -> dict[str, float]:
    """Budgets as absolute numbers.

    Args:
        now: what the network has, as :class:`~graphprune.plans.plan.CostModel` counts it.
        budgets: name → a fraction (a float up to 1) or an absolute number.

    Raises:
        InputError: there is none, one is unknown, not positive, or more than the network has.
    """
    if not budgets:
        raise InputError(f"give a budget: one of {', '.join(RESOURCES)}")
    for name in budgets:
        if name not in RESOURCES:
            raise InputError(f"unknown budget {name!r}; known: {', '.join(RESOURCES)}")
    return {name: within(name, value, now[RESOURCES[name]]) for name, value in budgets.items()}


def within(name: str, value: float, now: int) -> float:
    """One budget as an absolute number.

    Raises:
        InputError: it is not positive, or more than there is ``now``.
    """
    if isinstance(value, bool) or not value > 0:
        raise InputError(f"budget {name} must be positive: a fraction up to 1.0 or an absolute number")
    if isinstance(value, float) and value <= 1:
        return value * now
    if value > now:
        raise InputError(f"budget {name}={value:,} is more than the network has ({now:,})")
    return float(value)
