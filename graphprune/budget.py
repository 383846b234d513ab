"""From a budget to a plan: which positions go so that the network costs what was asked, and no less.

Positions of an axis go in steps that keep its widths on the target's alignment, the least important
first. Every step has one score; scores rise along an axis. With scope ``global`` all steps stand in one
queue, with ``local`` every axis gives up the same share. Removing the first k steps of the queue costs
less the larger k is, so the smallest k that meets the budget is found by bisection: about 16
evaluations of the whole network's cost, however many candidates there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil, gcd, lcm

from .axes.axis import Axis
from .axes.terms import kept_size
from .errors import InputError
from .graph import Graph
from .importance import Importance, scores
from .plan import CostModel, Plan, make_plan

# Budget → what :class:`~graphprune.plan.CostModel` calls it.
RESOURCES = {"macs": "macs", "params": "parameters", "bytes": "bytes"}
SCOPES = ("global", "local")
SMALLEST_STEP = 4  # a convolution whose width is no multiple of 4 is slower than the wider one


@dataclass(frozen=True)
class Limits:
    """What may go, and in which steps.

    Attributes:
        minimum: share of its positions that every axis keeps, 0 to 1.
        channel_alignment: convolution widths stay multiples of this (or as they are).
        linear_alignment: the same for linear layers.
        ignored: axes, parameters or modules that keep every position, by name or glob.
        statistical: prune axes that a statistic runs over, too.
    """

    minimum: float = 0.1
    channel_alignment: int = 1
    linear_alignment: int = 1
    ignored: tuple[str, ...] = ()
    statistical: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= 1:
            raise InputError(f"minimum is a share of an axis's positions, 0 to 1, not {self.minimum}")
        if self.channel_alignment < 1 or self.linear_alignment < 1:
            raise InputError("alignments are position counts, at least 1")


@dataclass(frozen=True)
class Step:
    """Positions of one axis that go together; ``score`` is the mean importance of them."""

    axis: str
    positions: tuple[int, ...]
    score: float


def solve(
    graph: Graph,
    budgets: Mapping[str, float],
    importance: Importance = "l2",
    *,
    scope: str = "global",
    limits: Limits | None = None,
    seed: int = 0,
) -> Plan:
    """The plan that removes the fewest steps, in the queue's order, and meets every budget.

    Args:
        budgets: ``macs``, ``params`` or ``bytes`` → a fraction of what the network has now (a float
            up to 1), or an absolute number.
        importance: see :func:`graphprune.importance.scores`.
        scope: ``global`` or ``local``; see the module docstring.
        limits: what may go, and in which steps.
        seed: for random importance.

    Raises:
        InputError: a budget is out of range, cannot be reached (the closest is named), an ignored
            name matches nothing, or the importance does not fit.
    """
    limits = limits or Limits()
    if scope not in SCOPES:
        raise InputError(f"unknown scope {scope!r}; known: {', '.join(SCOPES)}")
    model = CostModel(graph)
    now = model.totals({})
    wanted = {name: _absolute(name, value, now) for name, value in budgets.items()}
    if not wanted:
        raise InputError(f"give a budget: one of {', '.join(RESOURCES)}")
    axes = _candidates(graph, limits)
    queue = _queue(graph, axes, importance, scope, limits, seed)

    def totals(count: int) -> dict[str, int]:
        sizes = {axis.atom: axis.size for axis in axes}
        for step in queue[:count]:
            sizes[graph.axes[step.axis].atom] -= len(step.positions)
        return model.totals(sizes)

    def met(count: int) -> bool:
        found = totals(count)
        return all(found[RESOURCES[name]] <= limit for name, limit in wanted.items())

    if not met(len(queue)):
        closest = totals(len(queue))
        reach = ", ".join(
            f"{name} {closest[key]:,} ({closest[key] / now[key]:.3f} of now) for {limit:,.0f} asked"
            for name, limit in wanted.items()
            for key in (RESOURCES[name],)
        )
        raise InputError(
            f"the budget cannot be reached; the closest is {reach}. "
            "Lower `minimum`, allow statistical axes, or ask for less"
        )
    return _plan(graph, queue[: _first(met, len(queue))])


def _first(holds: Callable[[int], bool], highest: int) -> int:
    """The smallest count for which ``holds``, which is true of ``highest`` and of everything above it."""
    low, high = 0, highest
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _absolute(name: str, value: float, now: Mapping[str, int]) -> float:
    if name not in RESOURCES:
        raise InputError(f"unknown budget {name!r}; known: {', '.join(RESOURCES)}")
    if isinstance(value, bool) or not value > 0:
        raise InputError(f"budget {name} must be positive: a fraction up to 1.0 or an absolute number")
    if isinstance(value, float) and value <= 1:
        return value * now[RESOURCES[name]]
    if value > now[RESOURCES[name]]:
        raise InputError(f"budget {name}={value:,} is more than the network has ({now[RESOURCES[name]]:,})")
    return float(value)


def _candidates(graph: Graph, limits: Limits) -> list[Axis]:
    axes = [a for a in graph.axes.prunable if a.kind == "exact" or limits.statistical]
    for pattern in limits.ignored:
        kept = [a for a in axes if not _matches(a, pattern)]
        known = any(_matches(a, pattern) for a in graph.axes.values())
        if not known:
            raise InputError(f"ignored name {pattern!r} matches no axis, parameter or module")
        axes = kept
    return axes


def _matches(axis: Axis, pattern: str) -> bool:
    names = {axis.name, *(m.tensor for m in axis.members)}
    modules = {name.rpartition(".")[0] for name in names}
    return any(fnmatchcase(name, pattern) for name in names | modules)


def _queue(
    graph: Graph, axes: Sequence[Axis], importance: Importance, scope: str, limits: Limits, seed: int
) -> list[Step]:
    ranked = scores(graph, axes, importance, seed)
    steps: list[tuple[float, int, int, Step]] = []
    for number, axis in enumerate(axes):
        order = ranked[axis.name].argsort(stable=True)
        gone, key = 0, float("-inf")
        for index, keep in enumerate(_widths(graph, axis, limits)):
            chunk = order[gone : axis.size - keep]
            gone = axis.size - keep
            score = float(ranked[axis.name][chunk].mean())
            # Local: the share that is gone after this step decides, so that all axes shrink alike. The
            # maximum keeps an axis's steps in order where rounding would turn equal means round.
            key = max(key, score if scope == "global" else gone / axis.size)
            steps.append((key, index, number, Step(axis.name, tuple(chunk.tolist()), score)))
    return [entry[3] for entry in sorted(steps, key=lambda entry: entry[:3])]


def _widths(graph: Graph, axis: Axis, limits: Limits) -> list[int]:
    """The sizes an axis may shrink to, descending: multiples of its step, down to its minimum."""
    step = _step(graph, axis, limits)
    lowest = max(1, ceil(axis.size * limits.minimum))
    first = (axis.size - 1) // step * step
    return [width for width in range(first, 0, -step) if width >= lowest]


def _step(graph: Graph, axis: Axis, limits: Limits) -> int:
    """How many positions go at a time, so that every dimension the axis stands in stays aligned."""
    step = 1
    for member in axis.members:
        tensor = graph.tensors[member.tensor]
        if tensor.dim() < 2:
            continue
        align = limits.channel_alignment if tensor.dim() > 2 else limits.linear_alignment
        term = graph.typing.tensors[member.tensor][member.dim]
        places = term.size - kept_size(term, {axis.atom: axis.size - 1})  # that one position takes up there
        step = lcm(step, align // gcd(align, places))
    while step > SMALLEST_STEP and axis.size < 2 * step:
        step //= 2
    return step


def _plan(graph: Graph, chosen: Sequence[Step]) -> Plan:
    removed: dict[str | Axis, list[int]] = {}
    for step in chosen:
        removed.setdefault(step.axis, []).extend(step.positions)
    return make_plan(graph, removed)
