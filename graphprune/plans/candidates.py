"""What may go, in which steps and in which order: the queue that a budget is met from.

Positions of an axis go in steps that keep its widths on the target's alignment, the least important
first. Every step has one score; scores rise along an axis (where they would not, steps are taken
together, as the pool-adjacent-violators algorithm does). With scope ``global`` all steps stand in one
queue, with ``local`` every axis gives up the same share, with ``isomorphic`` every *kind* of axis does:
axes that run through parameters of the same operators in the same dimensions are ranked against each
other alone (Fang et al., *Isomorphic Pruning for Vision Models*, ECCV 2024).

Scores that are costs in one unit (importance ``reconstruction``) stand in the ``global`` queue divided by
what the step saves.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import ceil, gcd, lcm

from ..axes.axis import Axis
from ..axes.terms import Atom, kept_size
from ..errors import InputError
from ..graph import Graph
from ..importance import Data, Importance, Ranking, additive, rank
from .plan import CostModel, Plan, make_plan

# Budget → what :class:`~graphprune.plans.plan.CostModel` calls it.
RESOURCES = {"macs": "macs", "params": "parameters", "bytes": "bytes"}
SCOPES = ("global", "local", "isomorphic")
SMALLEST_STEP = 4  # a convolution whose width is no multiple of 4 is slower than the wider one

Share = float | Mapping[str, float]
"""A share of an axis's positions (a float up to 1.0) or a number of them; or that by name or glob."""


@dataclass(frozen=True)
class Limits:
    """What may go, and in which steps.

    Attributes:
        minimum: what every axis keeps at least: a share of its positions (a float up to 1.0) or a number, or
            a mapping to that from names or globs of axes or of what gives them (a parameter or
            module: ``conv1`` is its output channels); the first match counts.
        maximum: what an axis may keep at most, in the same way; the rest goes before anything else.
        channel_alignment: convolution widths stay multiples of this (or as they are).
        linear_alignment: the same for linear layers.
        ignored: axes, parameters or modules that keep every position, by name or glob.
        only: if given, axes, parameters or modules that alone may lose positions, by name or glob.
        statistical: prune axes that a statistic runs over, too.
    """

    minimum: Share = 0.1
    maximum: Share = 1.0
    channel_alignment: int = 1
    linear_alignment: int = 1
    ignored: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    statistical: bool = False

    def __post_init__(self) -> None:
        for what in ("minimum", "maximum"):
            for value in _values(getattr(self, what)):
                if isinstance(value, bool) or value < 0 or (value > 1 and value != int(value)):
                    raise InputError(
                        f"{what} is a share of an axis's positions, 0.0 to 1.0, or a number, not {value}"
                    )
        if self.channel_alignment < 1 or self.linear_alignment < 1:
            raise InputError("alignments are position counts, at least 1")


@dataclass(frozen=True)
class Step:
    """Positions of one axis that go together.

    Attributes:
        axis: its name.
        positions: which go.
        cost: the sum of their scores.
        gone: how many of the axis's positions are gone after it.
        forced: whether the axis's maximum asks for it.
    """

    axis: str
    positions: tuple[int, ...]
    cost: float
    gone: int
    forced: bool = False


@dataclass(frozen=True)
class Queue:
    """Steps in the order in which they are taken, and what the network costs after each.

    Attributes:
        forced: how many steps at the front are taken in any case.
    """

    graph: Graph
    steps: tuple[Step, ...]
    model: CostModel = field(repr=False)
    forced: int = 0

    def __len__(self) -> int:
        return len(self.steps)

    def sizes(self, count: int) -> dict[Atom, int]:
        """The sizes of axes after the first ``count`` steps."""
        gone: dict[str, int] = {}
        for step in self.steps[:count]:
            gone[step.axis] = step.gone
        axes = self.graph.axes
        return {axes[name].atom: axes[name].size - lost for name, lost in gone.items()}

    def totals(self, count: int) -> dict[str, int]:
        """``{"macs", "parameters", "bytes"}`` after the first ``count`` steps."""
        return self.model.totals(self.sizes(count))

    def cost(self, count: int) -> float:
        """The sum of the scores of what goes in the first ``count`` steps."""
        return sum(step.cost for step in self.steps[:count])

    def plan(self, count: int) -> Plan:
        """The plan that takes the first ``count`` steps."""
        removed: dict[str | Axis, list[int]] = {}
        for step in self.steps[:count]:
            removed.setdefault(step.axis, []).extend(step.positions)
        return make_plan(self.graph, removed)

    def first(self, holds: Callable[[int], bool]) -> int:
        """The smallest count, not below ``forced``, for which ``holds``; it is to hold of all above it."""
        return bisect_left(range(len(self.steps)), True, lo=self.forced, key=holds)


@dataclass(frozen=True)
class Candidates:
    """Everything that may go, each axis's steps in order, before they stand in one queue.

    Attributes:
        steps: axis name → its steps, those that are to go together merged.
        kinds: axis name → what it is compared with under scope ``isomorphic``.
        priced: whether scores are divided by what a step saves.
    """

    graph: Graph
    steps: Mapping[str, Sequence[Step]]
    kinds: Mapping[str, Hashable]
    scope: str
    priced: bool
    model: CostModel = field(repr=False)

    @staticmethod
    def of(
        graph: Graph,
        importance: Importance = "l2",
        *,
        scope: str = "global",
        limits: Limits | None = None,
        seed: int = 0,
        data: Data | None = None,
    ) -> Candidates:
        """Rank every axis; arguments and errors as of :func:`graphprune.plans.budget.solve`."""
        limits = limits or Limits()
        if scope not in SCOPES:
            raise InputError(f"unknown scope {scope!r}; known: {', '.join(SCOPES)}")
        axes = allowed(graph, limits)
        ranked = rank(graph, axes, importance, seed, data)
        steps = {axis.name: _steps(graph, axis, ranked[axis.name], limits) for axis in axes}
        kinds = {axis.name: _kind(graph, axis) for axis in axes} if scope == "isomorphic" else {}
        priced = scope == "global" and additive(importance)
        return Candidates(graph, steps, kinds, scope, priced, CostModel(graph))

    def queue(
        self,
        sizes: Mapping[Atom, int],
        wanted: Mapping[str, float],
        pricing: Callable[[Axis, float], float] | None = None,
    ) -> Queue:
        """All steps in one order.

        Args:
            sizes: of axes, where the scores are divided by what a step saves there.
            wanted: absolute budgets, whose shares a step saves.
            pricing: axis and the share of the budgets that one of its positions takes up → what scores are
                divided by instead of that share.
        """
        entries: list[tuple[bool, float, int, int, Step]] = []
        now = self.model.totals({})
        for number, (name, steps) in enumerate(self.steps.items()):
            axis = self.graph.axes[name]
            price = self._price(axis, sizes, wanted, now) if self.priced else 1.0
            if pricing is not None and self.priced:
                price = pricing(axis, price)
            for index, (step, mean) in enumerate(zip(steps, _pooled(steps), strict=True)):
                # Local: the share that is gone after this step decides, so that all axes shrink alike.
                key = step.gone / axis.size if self.scope == "local" else mean / price
                entries.append((not step.forced, key, index, number, step))
        if self.scope == "isomorphic":
            entries = self._shares(entries)
        entries.sort(key=lambda entry: entry[:4])
        forced = sum(not entry[0] for entry in entries)
        return Queue(self.graph, tuple(entry[4] for entry in entries), self.model, forced)

    def _price(
        self, axis: Axis, sizes: Mapping[Atom, int], wanted: Mapping[str, float], now: Mapping[str, int]
    ) -> float:
        """The share of the budgets that one position takes up at the given sizes."""
        saved = self.model.marginal(axis.atom, sizes)
        share = sum(saved[RESOURCES[name]] / max(1, now[RESOURCES[name]]) for name in wanted)
        return max(share, 1e-15)

    def _shares(
        self, entries: Iterable[tuple[bool, float, int, int, Step]]
    ) -> list[tuple[bool, float, int, int, Step]]:
        """The same steps with the share that is gone of their kind of axis as the key."""
        total: Counter[Hashable] = Counter()
        for name, kind in self.kinds.items():
            total[kind] += self.graph.axes[name].size
        gone: Counter[Hashable] = Counter()
        found = []
        for forced, _, index, number, step in sorted(entries, key=lambda entry: entry[:4]):
            kind = self.kinds[step.axis]
            gone[kind] += len(step.positions)
            found.append((forced, gone[kind] / total[kind], index, number, step))
        return found


def _pooled(steps: Sequence[Step]) -> list[float]:
    """Scores a position, made to rise along an axis: neighbours in the wrong order share their mean."""
    blocks: list[list[float]] = []  # sum of scores, positions, steps
    for step in steps:
        blocks.append([step.cost, len(step.positions), 1])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    return [cost / count for cost, count, number in blocks for _ in range(int(number))]


def _kind(graph: Graph, axis: Axis) -> Hashable:
    """What an axis runs through: operators and the dimensions of their parameters, whatever the sizes."""
    places = Counter[Hashable]()
    for member in axis.members:
        whole = member.placement.startswith("[") and member.placement.endswith("]")
        for node in graph.readers(member.tensor):
            places[str(node.target), graph.tensors[member.tensor].dim(), member.dim, whole] += 1
    # How many layers share a residual stream is not what kind of axis it is.
    return frozenset(places)


def allowed(graph: Graph, limits: Limits) -> list[Axis]:
    """The axes that may lose positions: exact ones (or all that are not frozen) that no name keeps out.

    Raises:
        InputError: a name matches nothing.
    """
    axes = [a for a in graph.axes.prunable if a.kind == "exact" or limits.statistical]
    for what in ("ignored", "only"):
        for pattern in getattr(limits, what):
            if not any(_matches(a, pattern) for a in graph.axes.values()):
                raise InputError(f"{what} name {pattern!r} matches no axis, parameter or module")
    for what in ("minimum", "maximum"):
        value = getattr(limits, what)
        for pattern in value if isinstance(value, Mapping) else ():
            if not any(_matches(a, pattern, members=False) for a in graph.axes.values()):
                raise InputError(f"{what} name {pattern!r} matches no axis, nor what gives one")
    axes = [a for a in axes if not any(_matches(a, pattern) for pattern in limits.ignored)]
    if limits.only:
        axes = [a for a in axes if any(_matches(a, pattern) for pattern in limits.only)]
    return axes


def _matches(axis: Axis, pattern: str, members: bool = True) -> bool:
    """Whether a pattern names the axis, or (``members``) anything that it runs through."""
    tensors = {m.tensor for m in axis.members} if members else {axis.members[0].tensor}
    names = {axis.name, *tensors, *(tensor.rpartition(".")[0] for tensor in tensors)}
    # The bracket of an axis's name would be a set of characters to a glob.
    return pattern in names or any(fnmatchcase(name, pattern) for name in names)


def _values(share: Share) -> Iterable[float]:
    return share.values() if isinstance(share, Mapping) else (share,)


def count_of(axis: Axis, share: Share, default: float) -> int:
    """How many positions a limit means for an axis; ``default`` where it is a mapping without it."""
    if isinstance(share, Mapping):
        share = next(
            (value for pattern, value in share.items() if _matches(axis, pattern, members=False)), default
        )
    if isinstance(share, float) and share <= 1:
        return ceil(axis.size * share - 1e-9)
    return int(share)


def _steps(graph: Graph, axis: Axis, ranking: Ranking, limits: Limits) -> list[Step]:
    """An axis's positions in steps: its sizes stay multiples of its alignment, not below its minimum."""
    step = _alignment(graph, axis, limits)
    lowest = max(1, count_of(axis, limits.minimum, 0.0))
    highest = count_of(axis, limits.maximum, 1.0)
    first = (axis.size - 1) // step * step
    steps, gone = [], 0
    for width in range(first, 0, -step):
        if width < lowest:
            break
        chunk = slice(gone, axis.size - width)
        # The size before this step is still above the maximum.
        forced = axis.size - gone > highest
        gone = axis.size - width
        steps.append(Step(axis.name, ranking.order[chunk], sum(ranking.costs[chunk]), gone, forced))
    return steps


def _alignment(graph: Graph, axis: Axis, limits: Limits) -> int:
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
