"""Latency budgets: the search on latencies that are known, what it refuses, and a network really timed."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune import measure
from graphprune.errors import InputError, PassError, TargetError
from graphprune.latency import solve
from graphprune.latency.bracket import search
from graphprune.latency.goal import Goal, Samples, bounds
from graphprune.pipeline import Context, Pipeline
from graphprune.plans.candidates import Candidates, Limits
from graphprune.plans.plan import Plan
from graphprune.target import Target, get, host_arch

OTHER = "aarch64" if host_arch() == "x86_64" else "x86_64"


def network() -> nn.Module:
    """Convolutions wide enough to have several aligned widths each."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU(),
        nn.Conv2d(96, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 96, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def graph() -> graphprune.Graph:
    return graphprune.trace(network(), torch.randn(1, 3, 32, 32))


def candidates(graph: graphprune.Graph, align: int = 8) -> Candidates:
    return Candidates.of(graph, limits=Limits(minimum=0.0, channel_alignment=align, linear_alignment=4))


@st.composite
def curves(draw: st.DrawFn) -> tuple[list[int], list[float]]:
    """MACs, and a latency that never rises, after each count of steps; the first latency is 1."""
    falls = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=200))
    macs = [10**6 - total for total in accumulate(falls, initial=0)]
    drops = draw(st.lists(st.sampled_from([0, 0, 0, 1, 3, 40]), min_size=len(falls), max_size=len(falls)))
    overhead = draw(st.floats(0.0, 0.9))
    whole = sum(drops) or 1
    latency = [1 - (1 - overhead) * total / whole for total in accumulate(drops, initial=0)]
    return macs, latency


def exact(latency: list[float]) -> Callable[[int, int], Samples]:
    return lambda count, rounds: ([latency[count]] * rounds, [1.0] * rounds)


@settings(deadline=None)
@given(curve=curves(), budget=st.floats(0.05, 0.999), first=st.integers(0, 3))
def test_the_least_that_meets_the_budget(
    curve: tuple[list[int], list[float]], budget: float, first: int
) -> None:
    macs, latency = curve
    last = len(macs) - 1
    first = min(first, last)
    goal = Goal.parse(budget)
    options = {"first": first, "probes": 1000, "tolerance": 0.0, "margin": 0.0}
    if latency[last] > budget:
        with pytest.raises(InputError, match="cannot be reached; the closest is"):
            search(exact(latency), macs.__getitem__, last, goal, **options)  # type: ignore[arg-type]
        return
    found, probes = search(exact(latency), macs.__getitem__, last, goal, **options)  # type: ignore[arg-type]
    wanted = next(count for count, value in enumerate(latency) if count >= first and value <= budget)
    assert found.count == wanted
    assert found.fresh
    assert found is probes[-1]
    assert len(probes) <= 3 + 3 * len(macs).bit_length()


@settings(deadline=None)
@given(curve=curves(), budget=st.floats(0.05, 0.999))
def test_a_few_probes_meet_the_budget_and_nearly_use_it_up(
    curve: tuple[list[int], list[float]], budget: float
) -> None:
    macs, latency = curve
    last = len(macs) - 1
    if latency[last] > 0.98 * budget:
        return
    found, probes = search(exact(latency), macs.__getitem__, last, Goal.parse(budget))
    assert latency[found.count] <= budget
    assert len(probes) <= 10
    slow = max(p.count for p in probes if p.ratio.median > 0.98 * budget or p.count == 0)
    near = macs[slow] - macs[found.count] <= 0.02 * macs[slow] or latency[found.count] >= 0.96 * budget
    assert near or found.count == slow + 1 or len(probes) >= 9


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), budget=st.floats(0.2, 0.9), jitter=st.floats(0.0, 0.15))
def test_noise_costs_little(seed: int, budget: float, jitter: float) -> None:
    """Slow minutes hit both networks alike, jitter and preemption hit one; the true latency counts."""
    draw = random.Random(seed)
    latency = [1 - 0.95 * (count // 5 * 5) / 400 for count in range(401)]

    def noisy(count: int, rounds: int) -> Samples:
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(rounds):
            minute = draw.choice([1.0, 1.0, 2.5])
            for samples, true in ((ours, latency[count]), (theirs, 1.0)):
                hit = 3.0 if draw.random() < 0.05 else 1.0
                samples.append(true * minute * hit * draw.gauss(1.0, jitter / 2))
        return ours, theirs

    found, probes = search(noisy, lambda count: 1000 - 2 * count, 400, Goal.parse(budget))
    assert latency[found.count] <= budget * (1 + jitter / 2)
    assert latency[found.count] >= 0.8 * budget
    assert found.bounds[1] <= 0.98 * budget
    assert len(probes) < 60


def test_a_probe_that_was_lucky_does_not_count() -> None:
    """The first measurement of every count is 10 % too fast, those after it are right."""
    seen: set[int] = set()

    def lucky(count: int, rounds: int) -> Samples:
        factor = 1.0 if count in seen or not count else 0.9
        seen.add(count)
        return [factor * (1 - count / 100)] * rounds, [1.0] * rounds

    found, probes = search(lucky, lambda count: 100 - count, 100, Goal.parse(0.5))
    assert found.count >= 51
    assert sum(p.fresh for p in probes) >= 2


def test_a_slow_moment_at_the_end_of_the_queue_is_measured_again() -> None:
    calls: list[int] = []

    def slow_once(count: int, rounds: int) -> Samples:
        calls.append(count)
        factor = 3.0 if calls.count(10) == 1 and count == 10 else 1.0
        return [factor * (1 - count / 20)] * rounds, [1.0] * rounds

    found, _ = search(slow_once, lambda count: 100 - count, 10, Goal.parse(0.52))
    assert found.count == 10


def test_a_time_holds_as_a_time_when_the_host_becomes_slower() -> None:
    calls: list[int] = []

    def slower(count: int, rounds: int) -> Samples:
        calls.append(rounds)
        host = 14.0 if 24 in calls else 10.0  # from the first confirmation on
        return [host * (1 - count / 100)] * rounds, [host] * rounds

    found, probes = search(slower, lambda count: 100 - count, 100, Goal.parse("5ms"))
    assert found.latency_ms <= 5
    assert found.whole_ms == 14
    assert found.count == pytest.approx(65, abs=2)
    assert any(p.fresh and p.latency_ms > 5 for p in probes)


def test_nothing_goes_when_the_whole_network_is_fast_enough() -> None:
    found, probes = search(exact([1.0, 0.5]), [2, 1].__getitem__, 1, Goal.parse("2ms"))
    assert found.count == 0
    assert len(probes) == 1
    assert search(exact([1.0, 0.5]), [2, 1].__getitem__, 1, Goal.parse(1.0))[0].count == 0


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60).map(sorted))
def test_the_bounds_enclose_the_median(values: list[int]) -> None:
    low, high = bounds(values)
    assert low <= values[(len(values) - 1) // 2]
    assert high >= values[len(values) // 2]


def test_the_bounds_hold_as_often_as_they_say() -> None:
    draw = random.Random(0)
    misses = sum(bounds(sorted(draw.gauss(0, 1) for _ in range(25)))[1] < 0 for _ in range(4000))
    assert 0.01 < misses / 4000 <= 0.06


@pytest.mark.parametrize(
    ("budget", "ms", "share"),
    [
        ("5ms", 5.0, None),
        ("0.8s", 800.0, None),
        (" 300 us", 0.3, None),
        (0.5, None, 0.5),
        (1, None, 1.0),
        ("0.5", None, 0.5),
        (" .25 ", None, 0.25),
        ("1", None, 1.0),
    ],
)
def test_budgets_are_shares_or_times(budget: float | str, ms: float | None, share: float | None) -> None:
    goal = Goal.parse(budget)
    assert (goal.ms, goal.share) == (ms if ms is None else pytest.approx(ms), share)


@pytest.mark.parametrize(
    "budget",
    ["fast", "5", "0", "-0.5", "1.5", "nan", "5 minutes", "-5ms", "0ms", "", None, True, float("nan")],
)
def test_budgets_that_are_neither_are_refused(budget: object) -> None:
    with pytest.raises(InputError, match="latency budget"):
        Goal.parse(budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [0, 0.0, -0.5, 1.5, 5, "5", "-0.5"])
def test_shares_out_of_range_are_refused(budget: float | str) -> None:
    with pytest.raises(InputError, match="out of range; it is a share up to"):
        Goal.parse(budget)


@pytest.mark.parametrize("options", [{"rounds": 0}, {"probes": 0}, {"tolerance": 1.0}, {"margin": -0.1}])
def test_searches_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="cannot search with"):
        search(exact([1.0, 0.5]), [2, 1].__getitem__, 1, Goal.parse(0.5), **options)  # type: ignore[arg-type]


def by_macs(plan: Plan, rounds: int) -> Samples:
    """A runtime whose latency is a fifth overhead, and MACs in eighths."""
    share = plan.after["macs"] / plan.before["macs"] if plan else 1.0
    return [2.0 + 8.0 * round(share * 8) / 8] * rounds, [10.0] * rounds


@pytest.mark.parametrize("align", [1, 8, 32])
@pytest.mark.parametrize("budget", [0.5, "5ms", 0.8])
def test_the_plan_is_the_queue_s(graph: graphprune.Graph, align: int, budget: float | str) -> None:
    chosen = candidates(graph, align)
    plan, record = solve(
        graph, budget, chosen, get("cpu"), measure=by_macs, tolerance=0.0, margin=0.0, probes=100
    )
    limit = budget if isinstance(budget, float) else 0.5
    assert record.limit == limit
    assert by_macs(plan, 1)[0][0] <= 10 * limit
    queue = chosen.queue({}, {"macs": 1})
    count = record.chosen.count
    assert queue.plan(count) == plan
    assert by_macs(queue.plan(count - 1), 1)[0][0] > 10 * limit
    assert len(record.notes) == 1 + len(record.probes)
    assert f"latency budget {budget}: measured" in record.notes[0]


def test_scores_that_are_costs_are_weighed_against_macs(graph: graphprune.Graph) -> None:
    from graphprune.importance import Data

    limits = Limits(minimum=0.0, channel_alignment=8)
    data = Data([torch.randn(4, 3, 32, 32) for _ in range(2)])
    chosen = Candidates.of(graph, "reconstruction", limits=limits, data=data)
    plan, record = solve(graph, 0.5, chosen, get("cpu"), measure=by_macs)
    assert by_macs(plan, 1)[0][0] <= 5.0
    assert graph.apply(plan) is not None
    assert record.chosen.macs == plan.after["macs"]


def test_a_budget_out_of_reach_names_the_closest(graph: graphprune.Graph) -> None:
    with pytest.raises(InputError, match=r"latency budget 0.1 cannot be reached; the closest is 0\.2"):
        solve(graph, 0.1, candidates(graph), get("cpu"), measure=by_macs)


@pytest.mark.parametrize("target", [Target("elsewhere", OTHER), Target("elsewhere", OTHER, portable=False)])
def test_a_target_that_is_not_this_host_is_refused(graph: graphprune.Graph, target: Target) -> None:
    with pytest.raises(TargetError, match=f"'elsewhere' is {OTHER} while this host is {host_arch()}"):
        solve(graph, 0.5, candidates(graph), target)


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        shapes = network()
    graph = graphprune.trace(shapes, torch.randn(1, 3, 32, 32, device="meta"))
    with pytest.raises(InputError, match="meta device"):
        solve(graph, 0.5, Candidates.of(graph, "random"), get("cpu"))


class Bench:
    """Stands in for lowering and timing; keeps what it was made with."""

    made: ClassVar[list[tuple[object, ...]]] = []
    backend = SimpleNamespace(name="fake")

    def __init__(self, graph: graphprune.Graph, target: Target, backend: str, threads: int | None) -> None:
        self.made.append((target.name, backend, threads))

    __call__ = staticmethod(by_macs)

    def outlook(self, widths: object) -> tuple[None, str]:
        """Foretells nothing."""
        return None, ""


def test_optimize_hands_the_budget_on_and_reports_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphprune.latency.Bench", Bench)
    Bench.made.clear()
    result = graphprune.optimize(
        network(), torch.randn(1, 3, 32, 32), target="cpu", latency="5.2ms", threads=1, repair=False,
        backend="onnxruntime", measure=False,
    )  # fmt: skip
    assert Bench.made == [("cpu", "onnxruntime", 1)]
    record = result.report.passes[0]
    said = [note.message for note in record.notes if note.where == "latency"]
    assert said[0].startswith("latency budget 5.2ms: measured 5 of 10 ms (0.500, at most 0.520 asked)")
    assert said[0].endswith("on fake, 1 threads")
    assert any(line.startswith("confirmed at") for line in said)
    assert record.after.macs < record.before.macs
    assert record.mask is not None


def test_a_network_that_is_fast_enough_stays(
    graph: graphprune.Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphprune.latency.Bench", Bench)
    step = Pipeline.parse("prune-channels{latency=10ms}").passes[0]
    result = step.run(graph, Context())
    assert result.graph is graph
    assert not result.changed
    assert "meets the budget as it is" in result.notes[0].message
    assert "measured 10 of 10 ms" in result.notes[1].message


@pytest.mark.parametrize("budget", [0.5, "5ms", "0.8s", "300us"])
def test_the_pass_prints_its_budget_as_it_is_written(budget: float | str) -> None:
    text = f"prune-channels{{latency={budget}}}"
    assert str(Pipeline.parse(text)) == text
    assert Pipeline.parse(text).passes[0].options() == {"latency": budget}


def test_a_latency_stands_alone(graph: graphprune.Graph) -> None:
    with pytest.raises(PassError, match="a latency budget stands alone, and macs is given, too"):
        Pipeline.parse("prune-channels{latency=0.5 macs=0.5}").run(graph)


def test_a_pass_hands_on_who_listens(graph: graphprune.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def stand_in(*args: object, progress: Callable[[str], None], **options: object) -> None:
        progress("measure operator 1 of 2")
        raise Asked

    monkeypatch.setattr("graphprune.passes.prune_channels.solve_latency", stand_in)
    lines: list[str] = []
    (step,) = Pipeline.parse("prune-channels{latency=0.5}").passes
    with pytest.raises(Asked):
        step.run(graph, Context(progress=lines.append))
    assert lines == ["measure operator 1 of 2"]


@pytest.mark.slow
def test_a_real_network_meets_its_budget(graph: graphprune.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured here, and once more by other means; a shared host is why the second look is generous."""
    monkeypatch.setattr("graphprune.latency.bench.TURN", 0.005)
    lines: list[str] = []
    plan, record = solve(
        graph, 0.6, candidates(graph, 16), get("cpu"), threads=1, rounds=6, probes=4, progress=lines.append,
        seconds=30,
    )  # fmt: skip
    assert record.chosen.bounds[1] <= 0.6
    assert record.forecast is not None
    assert record.forecast.filled.measured > 0
    assert record.chosen.predicted == pytest.approx(record.chosen.ratio.median, rel=0.4)
    assert any(line.startswith("measure operator 1 of ") for line in lines)
    assert record.backend == "onnxruntime"
    assert len(lines) >= len(record.probes)
    assert 0 < plan.after["macs"] < plan.before["macs"]
    runners = {
        name: graphprune.optimize(
            module, torch.randn(1, 3, 32, 32), pipeline="clean-up", measure=False, verify=False, threads=1
        )
        for name, module in (("whole", network()), ("small", graph.apply(plan).module))
    }
    x = torch.randn(1, 3, 32, 32)
    timings = measure.interleaved(
        {name: partial(_ten_times, result, x) for name, result in runners.items()}, rounds=20
    )
    assert measure.ratio(timings["small"], timings["whole"]).median < 0.8


def _ten_times(run: Callable[..., object], x: torch.Tensor) -> None:
    for _ in range(10):
        run(x)
