"""How little may go for a measured latency to be within its limit.

Latency falls as a network shrinks, but in steps (a runtime's kernels work on whole blocks of channels), and
two measurements of one network differ. The search keeps a bracket: the most that was removed and was still
too slow, and the least that was fast enough. It probes between them where a line through both meets the
limit: a line over predicted latency (:mod:`graphprune.latency.model`), which every probe so corrects, or over
MACs where nothing is predicted. It halves the bracket where lines keep landing on one side, as on a
staircase. A probe gets more rounds while its confidence bounds enclose the limit. What is left at the end is
measured afresh, because a probe that was picked for being fast is likely to have been lucky: it counts only
if the upper confidence bound of its median (order statistics, no distribution assumed) is within the limit;
otherwise more goes.

>>> staircase = lambda count, rounds: ([1.0 - count // 4 * 0.04] * rounds, [1.0] * rounds)
>>> found, probes = search(staircase, lambda count: 100 - count, 100, Goal.parse(0.5), tolerance=0.0)
>>> found.count, found.ratio.median, len(probes) < 12
(52, 0.48, True)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import InputError
from .goal import Goal, Probe, Samples, bounds, quartiles

ROUNDS = 12
PROBES = 8
TOLERANCE = 0.02
MARGIN = 0.02  # one and the same artifact differs by that from process to process: where its memory lies
EFFORT = 4  # measurements of one probe, pooled, while its confidence bounds enclose the limit
CONFIRMATIONS = 3  # measurements of what was chosen, pooled, before it is given up as undecided


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
    predict: Callable[[int], float] | None = None,
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
        predict: steps taken → latency as a share of the whole network's, from a model; never rises.

    Raises:
        InputError: nothing meets the goal; names the closest.
    """
    if rounds < 1 or probes < 1 or not 0 <= tolerance < 1 or not 0 <= margin < 1:
        options = f"rounds={rounds}, probes={probes}, tolerance={tolerance}, margin={margin}"
        raise InputError(f"cannot search with {options}")
    state = _Search(measure, sizes, first, last, goal, rounds, tolerance, margin, predict)
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
    predict: Callable[[int], float] | None = None
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
        below = self.place(low) * (1 - self.tolerance if low.count in self.refused else 1.0)
        fast = [
            count
            for count, probe in self.known.items()
            if count > low.count and (self.place(probe) <= below or count == self.last)
        ]
        return low, self.known[min(fast)] if fast else None

    def narrow(self, low: Probe, high: Probe) -> bool:
        if high.count <= max(low.count + 1, self.first):
            return True
        # What noise does not tell from the limit is close to it: more probes would only be more noise.
        close = max(high.ratio.median, high.bounds[1]) >= self.limit * (1 - self.tolerance)
        apart = self.place(low) - self.place(high)
        return self.tolerance > 0 and (close or apart <= self.tolerance * self.place(low))

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
            run, rise = self.place(low) - self.place(high), slow - high.ratio.median
        else:
            run, rise = (1 - self.place(low), 1 - slow) if low.count else (1.0, 1.0)
        if rise <= 0 or run <= 0:
            return (first + last + 1) // 2
        place = self.place(low) - (slow - aim) * run / rise
        if low.count in self.refused:
            place = min(place, self.place(low) * (1 - self.tolerance))
        return max(first, min(last, self.at(place, first, last)))

    def at(self, place: float, low: int, high: int) -> int:
        """The least count in a range that stands no higher than this, or the range's end."""
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.position(middle) <= place else (middle + 1, high)
        return low

    def place(self, probe: Probe) -> float:
        """Where a probe stands on what lines are drawn over."""
        return probe.share if probe.predicted is None else probe.predicted

    def position(self, count: int) -> float:
        """Where a count stands: its predicted latency, or its MACs; a share of the whole network's."""
        return self.share(count) if self.predict is None else self.predict(count)

    def expected(self, count: int) -> float:
        """The predicted latency, corrected by what was measured: on the line through the nearest two."""
        here, measured = self.position(count), sorted(self.known)
        nearest = [*[c for c in measured if c < count][-2:], *[c for c in measured if c > count][:1]][-2:]
        ends = [
            (self.place(p), p.ratio.median if p.count else 1.0) for p in map(self.known.get, nearest) if p
        ]
        if len(ends) < 2 or ends[0][0] <= ends[1][0]:
            return here
        (left, high), (right, low) = ends
        return max(low + (here - right) * (high - low) / (left - right), 0.0)

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
        foretold = self.foretold(count)
        ours, theirs = self.samples.setdefault(count, ([], []))
        more = self.measure(count, rounds)
        ours.extend(more[0])
        theirs.extend(more[1])
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        found = Probe(
            count, self.sizes(count), self.share(count), quartiles(ratios), bounds(ratios),
            statistics.median(ours), statistics.median(theirs), len(ratios), fresh, *foretold,
        )  # fmt: skip
        self.known[count] = found
        if self.history and self.history[-1].count == count and len(more[0]) < len(ours):
            self.history.pop()  # the same with fewer rounds
        self.history.append(found)
        return found

    def foretold(self, count: int) -> tuple[float | None, float | None]:
        """What was predicted and expected before the count was first measured."""
        if self.predict is None or not count:
            return None, None
        known = self.known.get(count)
        if known is not None:
            return known.predicted, known.expected
        return self.predict(count), self.expected(count)

    def out_of_reach(self) -> InputError:
        best = min((p for p in self.known.values() if p.count), key=lambda p: p.ratio.median)
        return InputError(
            f"latency budget {self.goal.text} cannot be reached; the closest is {best.ratio.median:.3f} of "
            f"the unpruned network's ({best.latency_ms:.3g} of {best.whole_ms:.3g} ms, with {best.share:.3f} "
            "of the MACs). Lower `minimum`, allow statistical axes, or ask for less"
        )
