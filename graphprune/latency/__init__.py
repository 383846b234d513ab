"""Pruning to a latency: the plan that removes the least and whose artifact is measured to be fast enough.

Positions stand in one queue (:mod:`graphprune.plans.candidates`), and taking more of it gives a smaller
network. How long that takes is foretold from measured times of its operators
(:mod:`graphprune.latency.model`), out of a table that is kept from run to run; what the table lacks is
measured now, as far as :data:`SECONDS` go. The
point of the queue where the forecast meets the budget is really pruned, lowered and timed in turns with the
unpruned artifact, and :mod:`graphprune.latency.bracket` corrects the forecast by what was measured until the
budget holds, or is out of reach. What is returned was timed, so the target must run on this host. Sizes
decide and weights do not: a repair afterwards keeps the latency.

Scores that are costs (importance ``reconstruction``) are weighed against the latency that a step saves, as
the table has it; against multiply-accumulates where nothing is known.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ..axes.axis import Axis
from ..blocks import Sizes
from ..graph import Graph
from ..plans.budget import PRICINGS
from ..plans.candidates import Candidates, Queue
from ..plans.plan import Plan
from ..target import Target
from . import bracket
from .bench import Bench
from .goal import Goal, Probe, Samples
from .model import LatencyModel
from .tuning import Filled, Outlook, widths

SECONDS = 120.0  # that a plan spends on filling the table; `graphprune tune` does it ahead of time
_POINTS = 256  # of a queue at which the latency is foretold; others lie between
_LEAST_PRICE = 0.1  # of what its multiply-accumulates say: a measured saving may be nothing but noise

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forecast:
    """What was foretold from the table.

    Attributes:
        sum_ms: the unpruned network's operators together.
        used: how many times of the table went into it.
        filled: what was measured for this plan.
        unmeasured: blocks of which nothing is known, estimated by their size.
        table: where the table is kept.
    """

    sum_ms: float
    used: int
    filled: Filled
    unmeasured: int
    table: str


@dataclass(frozen=True)
class LatencyRecord:
    """How a plan was found.

    Attributes:
        budget: as it was asked for.
        limit: the ratio to the unpruned network's latency that this came to.
        probes: everything that was measured, in order; the first is the unpruned network against itself.
        chosen: the confirmation of what was chosen.
        backend, threads: what ran it.
        forecast: the table's part, ``None`` where nothing was foretold.
        reason: why nothing was.
    """

    budget: str
    limit: float
    probes: tuple[Probe, ...]
    chosen: Probe
    backend: str
    threads: int | None
    forecast: Forecast | None = None
    reason: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for a report."""
        runs = f"{self.backend}, {'default' if self.threads is None else self.threads} threads"
        found, (noise, *others) = self.chosen, self.probes
        return (
            f"latency budget {self.budget}: measured {found.latency_ms:.3g} of {found.whole_ms:.3g} ms "
            f"({found.ratio.median:.3f}, at most {self.limit:.3f} asked) with {found.share:.3f} of the MACs, "
            f"on {runs}",
            *self._foretold(),
            f"noise: the unpruned artifact takes {noise.ratio.median:.3f} ({noise.ratio.low:.3f} to "
            f"{noise.ratio.high:.3f}) of itself, {noise.whole_ms:.3g} ms",
            *map(str, others),
        )

    def _foretold(self) -> tuple[str, ...]:
        found, forecast = self.chosen, self.forecast
        if forecast is None:
            return (f"nothing was predicted: {self.reason}",) if self.reason else ()
        lines = []
        if found.predicted is not None and found.expected is not None:
            said = {"from the table": found.predicted, "after correction": found.expected}
            lines += [
                f"predicted {how}: {share * found.whole_ms:.3g} ms ({share:.3f}), measured is "
                f"{found.ratio.median / share:.3f} of that"
                for how, share in said.items()
            ]
        filled = forecast.filled
        late = f", {filled.missing} left out as the time was up" if filled.missing else ""
        guess = f", {forecast.unmeasured} operators estimated by size" if forecast.unmeasured else ""
        lines.append(
            f"latency table: {forecast.used} times used, {filled.measured} of them measured now in "
            f"{filled.seconds:.0f} s{late}{guess}; the unpruned network's operators add up to "
            f"{forecast.sum_ms:.3g} ms, it takes {self.probes[0].whole_ms:.3g}; kept in {forecast.table}"
        )
        lines += [f"not measured alone: {reason}" for reason in [*dict.fromkeys(filled.refused.values())][:3]]
        return tuple(lines)


def solve(
    graph: Graph,
    budget: float | str,
    candidates: Candidates,
    target: Target,
    *,
    backend: str = "auto",
    threads: int | None = None,
    rounds: int = bracket.ROUNDS,
    probes: int = bracket.PROBES,
    tolerance: float = bracket.TOLERANCE,
    margin: float = bracket.MARGIN,
    seconds: float = SECONDS,
    measure: Callable[[Plan, int], Samples] | None = None,
    outlook: Outlook | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Plan, LatencyRecord]:
    """The plan that takes the fewest steps of the queue and is measured to meet the budget.

    Args:
        graph: the network; it is measured on its example inputs.
        budget: a share of the unpruned artifact's latency (up to 1.0), or a time (``"5ms"``, ``"0.8s"``).
        candidates: what may go, in the target's alignment.
        target: what it is lowered for; must be this host.
        backend: a backend's name, or ``auto``.
        threads: of the runtime; ``None`` is its default.
        rounds, probes, tolerance, margin: see :func:`graphprune.latency.bracket.search`.
        seconds: how long operators that the table lacks may be measured; 0 takes what is there.
        measure: (plan, rounds) → samples; by default lowers and times.
        outlook: what latencies are foretold with; by default this machine's table, and nothing where
            ``measure`` is given.
        progress: called with a line of text before each measurement.

    Raises:
        InputError: the budget is out of range, or cannot be reached; names the closest.
        TargetError: the target does not run on this host.
        BackendError: the runtime is missing, or cannot lower the network.
        ArtifactError: the latency table is damaged, or another machine's.
    """
    goal = Goal.parse(budget)
    used, where, say = backend, "memory", progress or log.debug
    if measure is None:
        bench = Bench(graph, target, backend, threads)
        measure, used = bench, bench.backend.name
        if outlook is None:
            outlook, where = bench.outlook(widths(candidates))
    share = goal.share or 0.5
    queue, forecast, predict, reason = _queue(candidates, share), None, None, ""
    if outlook is not None:
        with outlook.table:
            queue, forecast, predict, reason = _foretold(
                candidates, queue, share, outlook, seconds, where, say
            )

    def sample(count: int, rounds: int) -> Samples:
        share = queue.totals(count)["macs"] / max(1, queue.totals(0)["macs"])
        say(f"measure latency with {share:.3f} of the MACs, {rounds} rounds")
        return measure(queue.plan(count), rounds)

    found, history = bracket.search(
        sample, lambda count: queue.totals(count)["macs"], len(queue), goal, first=queue.forced,
        rounds=rounds, probes=probes, tolerance=tolerance, margin=margin, predict=predict,
    )  # fmt: skip
    limit = goal.share if goal.share is not None else (goal.ms or 0.0) / found.whole_ms
    record = LatencyRecord(goal.text, limit, history, found, used, threads, forecast, reason)
    return queue.plan(found.count), record


def _queue(
    candidates: Candidates, share: float, model: LatencyModel | None = None, start: Queue | None = None
) -> Queue:
    """The steps in order; scores that are costs are weighed against what they save near that share."""
    wanted = {"macs": 1.0}  # only which budget it is matters here, not how much
    queue = start or candidates.queue({}, wanted)
    for _ in range(PRICINGS if candidates.priced else 0):
        sizes = queue.sizes(_point(queue, share, model))
        price = None if model is None else partial(_price, model, sizes)
        queue = candidates.queue(sizes, wanted, price)
    return queue


def _point(queue: Queue, share: float, model: LatencyModel | None) -> int:
    """The fewest steps that should leave this share of the latency, or of the MACs without a model."""
    if model is None:
        return queue.first(lambda count: queue.totals(count)["macs"] <= share * queue.totals(0)["macs"])
    whole = model({})
    return queue.first(lambda count: model(queue.sizes(count)) <= share * whole)


def _price(model: LatencyModel, sizes: Sizes, axis: Axis, macs: float) -> float:
    """The share of the latency that one position of an axis takes, about: to half of what is left of it."""
    saved = model.saved(axis.atom, sizes) / max(model({}), 1e-9)
    return max(saved, _LEAST_PRICE * macs)


def _foretold(
    candidates: Candidates,
    queue: Queue,
    share: float,
    outlook: Outlook,
    seconds: float,
    where: str,
    say: Callable[[str], None],
) -> tuple[Queue, Forecast | None, Callable[[int], float] | None, str]:
    """The queue, weighed by latency where it is weighed; what is foretold along it, or why nothing is."""

    def progress(done: float, total: float, label: str) -> None:
        say(f"measure operator {done + 1:.0f} of {total:.0f}: {label}")

    model = outlook.model
    first = outlook.fill([queue.sizes(_point(queue, share, None))], seconds=seconds, progress=progress)
    whole = model({})
    if not whole:
        reasons = "; ".join(dict.fromkeys(first.refused.values())) or "there was no time to measure operators"
        return queue, None, None, f"{reasons}; the plan was found by measuring whole networks alone"
    queue = _queue(candidates, share, model, queue)
    # The table is filled around the widths that MACs led to; latency may lead elsewhere.
    point = queue.sizes(_point(queue, share, model))
    then = outlook.fill([point], seconds=max(0.0, seconds - first.seconds), progress=progress)
    filled = Filled(first.measured + then.measured, then.missing, then.refused, first.seconds + then.seconds)
    predict = _curve(queue, model)
    return queue, Forecast(whole, outlook.used, filled, model.unmeasured(point), where), predict, ""


def _curve(queue: Queue, model: LatencyModel) -> Callable[[int], float]:
    """Steps taken → latency as a share of the unpruned network's; never rises."""
    last = len(queue)
    counts = sorted({round(i * last / _POINTS) for i in range(_POINTS + 1)})
    whole = model({})
    values = falling([model(queue.sizes(count)) / whole for count in counts])

    def predict(count: int) -> float:
        after = next(i for i, known in enumerate(counts) if known >= count)
        if counts[after] == count:
            return values[after]
        left = (counts[after] - count) / (counts[after] - counts[after - 1])
        return values[after] + left * (values[after - 1] - values[after])

    return predict


def falling(values: Sequence[float]) -> list[float]:
    """The nearest sequence that never rises: neighbours in the wrong order share their mean.

    >>> falling([1.0, 0.6, 0.8, 0.5])
    [1.0, 0.7, 0.7, 0.5]
    """
    pools: list[tuple[float, int]] = []  # sum, how many
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] < pools[-1][0] * pools[-2][1]:
            last = pools.pop()
            pools[-1] = (pools[-1][0] + last[0], pools[-1][1] + last[1])
    return [total / count for total, count in pools for _ in range(count)]
