"""How little may go for a measured latency to be within its limit.

Latency falls as a network shrinks, but in steps (a runtime's kernels work on whole blocks of channels), and
two measurements of one network differ. The search keeps a bracket: the most that was removed and was still
too slow, and the least that was fast enough. It probes between them where a line through both, over MACs,
meets the limit, and halves the bracket where lines keep landing on one side, as on a staircase. A probe
gets more rounds while its confidence bounds enclose the limit. What is left at the end is measured afresh,
because a probe that was picked for being fast is likely to have been lucky: it counts only if the upper
confidence bound of its median (order statistics, no distribution assumed) is within the limit; otherwise
more goes.

>>> staircase = lambda count, rounds: ([1.0 - count // 4 * 0.04] * rounds, [1.0] * rounds)
>>> found, probes = search(staircase, lambda count: 100 - count, 100, Goal.parse(0.5), tolerance=0.0)
>>> found.count, found.ratio.median, len(probes) < 12
(52, 0.48, True)
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import comb, isfinite

from .errors import InputError
from .measure import Ratio

Samples = tuple[Sequence[float], Sequence[float]]
"""Milliseconds of the smaller and of the whole network, taken in turns: one of each a round."""

ROUNDS = 12
PROBES = 8
TOLERANCE = 0.02
MARGIN = 0.02  # one and the same artifact differs by that from process to process: where its memory lies
EFFORT = 4  # measurements of one probe, pooled, while its confidence bounds enclose the limit
CONFIRMATIONS = 3  # measurements of what was chosen, pooled, before it is given up as undecided
_TIME = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*(us|µs|ms|s)\s*")
_MS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True)
class Goal:
    """A latency budget: a share of the whole network's latency, or milliseconds.

    >>> Goal.parse("0.8s").ms, Goal.parse(0.5).share
    (800.0, 0.5)
    """

    text: str
    share: float | None = None
    ms: float | None = None

    @staticmethod
    def parse(budget: float | str) -> Goal:
        """A budget as users write it: ``0.5``, ``"5ms"``, ``"0.8s"``, ``"300us"``.

        Raises:
            InputError: it is neither, or out of range.
        """
        known = "a share up to 1.0 of the unpruned network's, or a time such as '5ms' or '0.8s'"
        if isinstance(budget, str):
            match = _TIME.fullmatch(budget)
            if match is None:
                raise InputError(f"latency budget {budget!r} is not understood; it is {known}")
            ms = float(match[1]) * _MS[match[2]]
            if not ms > 0:
                raise InputError(f"latency budget {budget!r} must be more than nothing")
            return Goal(budget.strip(), ms=ms)
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not isfinite(budget):
            raise InputError(f"latency budget {budget!r} is not understood; it is {known}")
        if not 0 < budget <= 1:
            raise InputError(f"latency budget {budget} is out of range; it is {known}")
        return Goal(f"{budget:g}", share=float(budget))


@dataclass(frozen=True)
class Probe:
    """One measured network.

    Attributes:
        count: steps of the queue that were taken.
        macs: multiply-accumulates that are left, and their ``share``.
        ratio: its latency to the whole network's, over rounds: median and quartiles.
        bounds: one-sided 95 % confidence bounds of that median, lower and upper.
        latency_ms, whole_ms: medians of both, milliseconds.
        rounds: how many.
        fresh: whether this is a confirmation, with samples of its own.
    """

    count: int
    macs: int
    share: float
    ratio: Ratio
    bounds: tuple[float, float]
    latency_ms: float
    whole_ms: float
    rounds: int
    fresh: bool = False

    def __str__(self) -> str:
        kind = "confirmed at" if self.fresh else "probed at"
        return (
            f"{kind} {self.share:.3f} of the MACs: latency {self.ratio.median:.3f} of the unpruned "
            f"({self.ratio.low:.3f} to {self.ratio.high:.3f}, {self.rounds} rounds), {self.latency_ms:.3g} ms"
        )


def search(
    measure: Callable[[int, int], Samples],
    sizes: Callable[[int], int],
    last: int,
    goal: Goal,
    *,
    first: int = 0,
    rounds: int = ROUNDS,
    probes: int = PROBES,
    tolerance: float = TOLERANCE,
    margin: float = MARGIN,
) -> tuple[Probe, tuple[Probe, ...]]:
    """The least count of steps whose measured latency meets the goal, and every probe in order.

    Args:
        measure: (steps taken, rounds) → samples; of no step, the whole network against itself.
        sizes: steps taken → MACs that are left; never rises.
        last: how many steps there are.
        first: how many are taken in any case.
        rounds: of a probe that is clearly fast or slow; up to four times as many near the limit.
        probes: about how many before the best so far is confirmed.
        tolerance: the bracket is narrow enough when its ends differ by this share of their MACs, or its
            fast end is this close to the limit; 0 goes on to a single step.
        margin: share of the limit that is kept free, for what one process cannot know of another.

    Raises:
        InputError: nothing meets the goal; names the closest.
    """
    if rounds < 1 or probes < 1 or not 0 <= tolerance < 1 or not 0 <= margin < 1:
        options = f"rounds={rounds}, probes={probes}, tolerance={tolerance}, margin={margin}"
        raise InputError(f"cannot search with {options}")
    state = _Search(measure, sizes, first, last, goal, rounds, tolerance, margin)
    return state.run(probes), tuple(state.history)


@dataclass
class _Search:
    measure: Callable[[int, int], Samples]
    sizes: Callable[[int], int]
    first: int
    last: int
    goal: Goal
    rounds: int
    tolerance: float
    margin: float
    history: list[Probe] = field(default_factory=list)
    known: dict[int, Probe] = field(default_factory=dict)
    samples: dict[int, tuple[list[float], list[float]]] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    whole_ms: float = 0.0
    one_sided: int = 0  # probes in a row that moved the same end of the bracket

    def run(self, budgeted: int) -> Probe:
        whole = self.probe(0, self.rounds)
        self.whole_ms = whole.whole_ms
        if self.first == 0 and self.limit >= 1 - self.margin:
            return whole
        spent = 0
        while True:
            low, high = self.bracket()
            if high is None and low.count == self.last:
                if low.fresh:
                    raise self.out_of_reach()
                self.again(self.last)  # one slow moment must not be the verdict
            elif high is not None and (spent >= budgeted or self.narrow(low, high)):
                if self.confirmed(high.count):
                    return self.known[high.count]
                self.refused.add(high.count)
                spent = min(spent, budgeted - 2)
            else:
                count = self.between(low, high)
                found = self.decided(count)
                spent += 1
                slow = found.ratio.median > self.limit
                same = self.one_sided > 0 if slow else self.one_sided < 0
                self.one_sided = (self.one_sided if same else 0) + (1 if slow else -1)

    @property
    def limit(self) -> float:
        """What the ratio may be, with the margin taken off."""
        asked = self.goal.share if self.goal.share is not None else (self.goal.ms or 0.0) / self.whole_ms
        return asked * (1 - self.margin)

    def bracket(self) -> tuple[Probe, Probe | None]:
        """The slow end, and the fast one if there is any yet."""
        slow = [c for c, p in self.known.items() if p.ratio.median > self.limit or c in self.refused]
        low = self.known[max([0, *slow])]
        # What is hardly smaller than one that was refused would only be tried until it is lucky.
        below = low.share * (1 - self.tolerance) if low.count in self.refused else low.share
        fast = [
            count
            for count, probe in self.known.items()
            if count > low.count and (probe.share <= below or count == self.last)
        ]
        return low, self.known[min(fast)] if fast else None

    def narrow(self, low: Probe, high: Probe) -> bool:
        if high.count <= max(low.count + 1, self.first):
            return True
        close = high.ratio.median >= self.limit * (1 - self.tolerance)
        return self.tolerance > 0 and (close or low.share - high.share <= self.tolerance * low.share)

    def decided(self, count: int) -> Probe:
        """Measure until it is clear on which side of the limit it is, or as clear as it will be."""
        found = self.probe(count, self.rounds)
        for _ in range(EFFORT - 1):
            if not found.bounds[0] <= self.limit <= found.bounds[1]:
                break
            found = self.probe(count, self.rounds)
        return found

    def between(self, low: Probe, high: Probe | None) -> int:
        """Where to probe next, strictly inside the bracket."""
        first, last = max(low.count + 1, self.first), high.count - 1 if high is not None else self.last
        if abs(self.one_sided) >= 2:
            self.one_sided = 0
            return (first + last + 1) // 2
        aim = self.limit * (1 - self.tolerance / 2)
        slow = max(low.ratio.median, low.bounds[1]) if low.count else 1.0
        # A line through both ends; without a fast one, through the whole network, or the origin.
        if high is not None:
            run, rise = low.share - high.share, slow - high.ratio.median
        else:
            run, rise = (1 - low.share, 1 - slow) if low.count else (1.0, 1.0)
        if rise <= 0 or run <= 0:
            return (first + last + 1) // 2
        share = low.share - (slow - aim) * run / rise
        if low.count in self.refused:
            share = min(share, low.share * (1 - self.tolerance))
        return max(first, min(last, self.at(share, first, last)))

    def at(self, share: float, low: int, high: int) -> int:
        """The least count in a range that leaves at most this share of the MACs, or the range's end."""
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.share(middle) <= share else (middle + 1, high)
        return low

    def share(self, count: int) -> float:
        return self.sizes(count) / max(1, self.sizes(0))

    def confirmed(self, count: int) -> bool:
        """Whether it is within the limit when it is measured with nothing of what it was chosen by."""
        for attempt in range(CONFIRMATIONS):
            found = self.probe(count, 2 * self.rounds, fresh=True) if attempt else self.again(count)
            if self.goal.ms is not None and found.latency_ms > self.goal.ms:
                # The host is slower than it was at the start: what counts is the time now.
                self.whole_ms = max(self.whole_ms, found.whole_ms)
                return False
            if found.bounds[1] <= self.limit or found.bounds[0] > self.limit:
                return found.bounds[1] <= self.limit
        return False

    def again(self, count: int) -> Probe:
        """Measure anew."""
        del self.samples[count]
        return self.probe(count, 2 * self.rounds, fresh=True)

    def probe(self, count: int, rounds: int, fresh: bool = False) -> Probe:
        """Measure; samples of one count are pooled."""
        ours, theirs = self.samples.setdefault(count, ([], []))
        more = self.measure(count, rounds)
        ours.extend(more[0])
        theirs.extend(more[1])
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        found = Probe(
            count, self.sizes(count), self.share(count), _quartiles(ratios), bounds(ratios),
            statistics.median(ours), statistics.median(theirs), len(ratios), fresh,
        )  # fmt: skip
        self.known[count] = found
        if self.history and self.history[-1].count == count and len(more[0]) < len(ours):
            self.history.pop()  # the same with fewer rounds
        self.history.append(found)
        return found

    def out_of_reach(self) -> InputError:
        best = min((p for p in self.known.values() if p.count), key=lambda p: p.ratio.median)
        return InputError(
            f"latency budget {self.goal.text} cannot be reached; the closest is {best.ratio.median:.3f} of "
            f"the unpruned network's ({best.latency_ms:.3g} of {best.whole_ms:.3g} ms, with {best.share:.3f} "
            "of the MACs). Lower `minimum`, allow statistical axes, or ask for less"
        )


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """One-sided 95 % bounds of the median of what ascending ``values`` are drawn from.

    Of n values, the median is below the k-th with the probability that a fair coin falls on one side fewer
    than k times in n; the bound is the first k for which that is 95 %.

    >>> bounds(list(range(1, 21)))
    (6, 15)
    """
    n, below = len(values), 0.0
    for k in range(1, n + 1):
        below += comb(n, k - 1) / 2**n
        if below >= 0.95:
            return values[n - k], values[k - 1]
    return values[0], values[-1]


def _quartiles(values: Sequence[float]) -> Ratio:
    if len(values) == 1:
        return Ratio(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, low, high)
