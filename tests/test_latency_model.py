"""Predictions from a table: exact where it was measured, close in between, corrected until a budget holds."""

from __future__ import annotations

import contextlib
import itertools
import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.axes.terms import Atom
from graphprune.blocks import Block, Sizes
from graphprune.errors import BackendError, InputError
from graphprune.fusion import blocks
from graphprune.graph import Graph
from graphprune.latency import falling, solve
from graphprune.latency.goal import Samples
from graphprune.latency.model import FINE, WHOLE, LatencyModel
from graphprune.latency.table import IN_MEMORY, Entry, Machine, Table
from graphprune.latency.tuning import Outlook, widths
from graphprune.plans.candidates import Candidates, Limits
from graphprune.plans.plan import Plan
from graphprune.target import get

CALL = 0.01  # ms of a call that does nothing
MACHINE = Machine("fake", 1, "x86_64", "", "fake", (), 1)
LIMITS = Limits(minimum=0.0, channel_alignment=16, linear_alignment=4)


@cache
def network() -> Graph:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU(),
        nn.Conv2d(96, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 128, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    ).eval()  # fmt: skip
    return graphprune.trace(module, torch.randn(1, 3, 16, 16))


@cache
def candidates() -> Candidates:
    return Candidates.of(network(), limits=LIMITS)


def staircase(block: Block, sizes: Sizes) -> float:
    """Milliseconds on a machine that computes in blocks of 16 channels and moves bytes at a rate."""
    ms = 0.002
    small = {atom: math.ceil(sizes.get(atom, atom.size) / 16) * 16 for v in block.variables for atom in v}
    small = {atom: min(size, atom.size) for atom, size in small.items()}
    for node in block.nodes:
        if "conv" in str(node.target) or "linear" in str(node.target):
            # Wide layers run at a better rate.
            work = block.work(small)
            ms += work * (1.0 + 0.3 / (1 + sum(small.values()) / 64))
    return ms


class Watch:
    """A stopwatch on a machine whose times are known; the table is a real one."""

    def __init__(self, truth: Any = staircase, refused: str = "never") -> None:
        self.table = Table.open(MACHINE, IN_MEMORY)
        self.truth, self.refused, self.measured = truth, refused, 0

    def nothing(self) -> float:
        """Milliseconds of a call."""
        return CALL

    def measure(self, block: Block, sizes: Sizes, text: str) -> Entry:
        """Put the true time into the table."""
        if self.refused in block.label:
            raise BackendError(f"no kernel for {block.label}")
        self.measured += 1
        ms = CALL + self.truth(block, sizes)
        entry = Entry(text, block.label, ms, ms, ms, 1)
        self.table.put(entry)
        return entry


def outlook(watch: Watch | None = None) -> Outlook:
    return Outlook(network(), widths(candidates()), watch or Watch())  # type: ignore[arg-type]


def total(sizes: Sizes, truth: Any = staircase) -> float:
    return CALL + sum(truth(block, sizes) for block in blocks(network()))


def reachable() -> dict[Atom, list[int]]:
    return {atom: [*found, atom.size] for atom, found in widths(candidates()).items()}


@st.composite
def some_sizes(draw: st.DrawFn) -> dict[Atom, int]:
    return {atom: draw(st.sampled_from(found)) for atom, found in reachable().items()}


@settings(deadline=None, max_examples=40)
@given(shares=st.lists(st.sampled_from(FINE), min_size=8, max_size=8))
def test_it_is_exact_where_it_was_measured(shares: list[float]) -> None:
    found = reachable()
    sizes = {
        atom: min(found[atom], key=lambda w, s=share, a=atom: (abs(w - a.size * s), w))  # type: ignore[misc]
        for atom, share in zip(found, shares, strict=False)
    }
    watched = outlook()
    watched.fill([sizes])
    assert watched.model(sizes) == pytest.approx(total(sizes), rel=1e-9)
    assert watched.model({}) == pytest.approx(total({}), rel=1e-9)
    assert not list(watched.model.wanted(sizes))


@settings(deadline=None, max_examples=40)
@given(sizes=some_sizes())
def test_it_is_close_in_between(sizes: dict[Atom, int]) -> None:
    watched = outlook()
    assert watched.fill([sizes]).missing == 0
    assert watched.model(sizes) == pytest.approx(total(sizes), rel=0.12)


@settings(deadline=None, max_examples=40)
@given(sizes=some_sizes(), data=st.data())
def test_widths_in_between_cost_what_the_next_wider_does(sizes: dict[Atom, int], data: st.DataObject) -> None:
    """Time is a staircase: runtimes compute in whole blocks of channels."""
    watched = outlook()
    watched.fill([sizes])
    found = reachable()
    odd = {}
    for atom, size in sizes.items():
        below = max((w for w in found[atom] if w < size), default=0)
        odd[atom] = data.draw(st.integers(below + 1, size))
    assert watched.model(odd) == watched.model(sizes)


@settings(deadline=None, max_examples=40)
@given(sizes=some_sizes())
def test_each_block_stays_between_the_points_around_it(sizes: dict[Atom, int]) -> None:
    watched = outlook()
    watched.fill([sizes])
    model = watched.model
    for block in model.blocks:
        corners = [staircase(block, corner) for _, corner in model._corners(block, sizes, FINE)]
        shares = [share for share, _ in model._corners(block, sizes, FINE)]
        assert sum(shares) == pytest.approx(1.0)
        ms = model._time(block, sizes)
        assert ms is not None
        if len(corners) > 1:
            assert ms <= max(corners) + 1e-12
            beyond = block.work(sizes) < min(block.work(c) for _, c in model._corners(block, sizes, FINE))
            assert beyond or ms >= min(corners) - 1e-12


@pytest.mark.parametrize("count", [1, 3, 8, 15])
def test_little_time_gives_a_coarser_prediction(count: int) -> None:
    """The most costly operators first; whatever is known counts, the rest goes by size."""
    sizes = {atom: found[len(found) // 2] for atom, found in reachable().items()}
    watched = outlook()
    left = iter(range(count))

    def stop(done: float, total: float, label: str) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        watched.fill([sizes], progress=stop)
    assert len(watched.table) <= count
    assert watched.model(sizes) / watched.model({}) == pytest.approx(total(sizes) / total({}), rel=0.35)


def test_the_clock_ends_it_and_says_what_is_missing() -> None:
    watched = outlook()
    filled = watched.fill([{}], seconds=0.0)
    assert filled.measured == 0
    assert filled.missing == len({block.text({}) for block in blocks(network())})
    assert watched.model({}) == 0.0
    rest = watched.fill([{}])
    assert (rest.measured, rest.missing) == (filled.missing, 0)


def test_nothing_is_measured_twice() -> None:
    watch = Watch()
    sizes = {atom: found[0] for atom, found in reachable().items()}
    first = outlook(watch).fill([sizes])
    assert first.measured == watch.measured == len(watch.table)
    assert outlook(watch).fill([sizes]).measured == 0


def test_an_operator_that_does_not_run_alone_is_estimated_and_named() -> None:
    sizes = {atom: found[len(found) // 2] for atom, found in reachable().items()}
    watched = outlook(Watch(refused="pool"))
    filled = watched.fill([sizes])
    assert [reason.split(":")[0] for reason in set(filled.refused.values())] == ["average-pool"]
    assert watched.model.unmeasured(sizes) == 1
    assert watched.model(sizes) == pytest.approx(total(sizes), rel=0.15)


class Branch(nn.Module):
    """A convolution, and a branch that is no operator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, (x,))


def test_what_cannot_be_taken_out_of_a_network_is_estimated_and_named() -> None:
    graph = graphprune.trace(Branch().eval(), torch.randn(1, 3, 8, 8))

    def build(block: Block, sizes: Sizes) -> float:
        block.graph(sizes)
        return 1.0

    watched = Outlook(graph, {}, Watch(build))  # type: ignore[arg-type]
    filled = watched.fill([{}])
    assert filled.measured >= 1
    assert any("cond" in reason for reason in filled.refused.values())
    assert watched.model({}) > 1.0


def test_coarse_grids_count_where_fine_ones_are_not_known() -> None:
    known: dict[str, float] = {}
    model = LatencyModel(network(), widths(candidates()), known.get, lambda: CALL)
    half = {atom: size // 2 for atom, size in ((a, a.size) for a in reachable())}
    assert model(half) == 0.0
    for want in model.wanted({}, WHOLE):
        known[want.text] = CALL + staircase(want.block, want.sizes)
    rough = model(half)
    assert rough == pytest.approx(total(half), rel=0.3)
    for want in model.wanted(half):
        known[want.text] = CALL + staircase(want.block, want.sizes)
    assert abs(model(half) - total(half)) < abs(rough - total(half))


def test_what_a_position_saves_is_what_its_blocks_save() -> None:
    watched = outlook()
    for atom, found in reachable().items():
        half = min((w for w in found if w < atom.size), key=lambda w, a=atom: abs(w - a.size / 2))  # type: ignore[misc]
        watched.fill([{atom: half}])
        saved = (total({}) - total({atom: half})) / (atom.size - half)
        assert watched.model.saved(atom, {}) == pytest.approx(saved, rel=1e-6)


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=30))
def test_a_curve_that_falls_stays_and_one_that_does_not_is_levelled(values: list[float]) -> None:
    level = falling(values)
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(level))
    assert sum(level) == pytest.approx(sum(values))
    assert falling(sorted(values, reverse=True)) == sorted(values, reverse=True)


# ---- the planner's loop --------------------------------------------------------------------------


def machine(factor: float, overhead: float = 0.0, steep: float = 1.0) -> Any:
    """Times plans on a machine where the network takes what its operators do, but for these."""

    def measure(plan: Plan, rounds: int) -> Samples:
        axes = network().axes
        sizes = {axes[name].atom: axes[name].size - len(gone) for name, gone in plan.removed.items()}
        whole = total({})
        ms = factor * (whole * (total(sizes) / whole) ** steep + overhead * whole)
        return [ms] * rounds, [factor * whole * (1 + overhead)] * rounds

    return measure


@pytest.mark.parametrize("budget", [0.8, 0.5, 0.3])
@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
@pytest.mark.parametrize(("overhead", "steep"), [(0.0, 1.0), (0.2, 1.0), (0.0, 0.7), (0.0, 1.6)])
def test_the_forecast_is_corrected_until_the_budget_holds(
    budget: float, factor: float, overhead: float, steep: float
) -> None:
    run = machine(factor, overhead, steep)
    plan, record = solve(
        network(), budget, candidates(), get("cpu"), measure=run, outlook=outlook(), rounds=3
    )
    ours, whole = run(plan, 1)
    assert ours[0] <= budget * whole[0]
    assert record.chosen.fresh
    # A machine that is not even proportional is corrected step by step.
    off = 0.15 if steep == 1.0 else 0.25
    assert record.chosen.expected == pytest.approx(record.chosen.ratio.median, rel=off)
    assert record.chosen.predicted is not None
    if overhead == 0.0 and steep == 1.0:
        assert record.chosen.predicted == pytest.approx(record.chosen.ratio.median, rel=0.12)
        assert sum(not probe.fresh for probe in record.probes[1:]) <= 3
    assert len(record.probes) <= 12


def test_a_good_forecast_needs_fewer_probes_than_macs() -> None:
    """A machine on which the first layer, few of the multiply-accumulates, takes most of the time."""

    def first_is_slow(block: Block, sizes: Sizes) -> float:
        slow = 40.0 if "batch-norm" in block.label else 1.0
        return slow * staircase(block, sizes)

    def run(plan: Plan, rounds: int) -> Samples:
        axes = network().axes
        sizes = {axes[name].atom: axes[name].size - len(gone) for name, gone in plan.removed.items()}
        return [total(sizes, first_is_slow)] * rounds, [total({}, first_is_slow)] * rounds

    def probed(**options: Any) -> int:
        _, record = solve(network(), 0.5, candidates(), get("cpu"), measure=run, rounds=3, **options)
        return sum(not probe.fresh for probe in record.probes[1:])

    assert probed(outlook=outlook(Watch(first_is_slow))) < probed()


def test_out_of_reach_is_measured_before_it_is_said() -> None:
    seen: list[Plan] = []
    run = machine(2.0, overhead=0.5)

    def watched(plan: Plan, rounds: int) -> Samples:
        seen.append(plan)
        return run(plan, rounds)

    with pytest.raises(InputError, match=r"latency budget 0\.2 cannot be reached; the closest is 0\.3"):
        solve(network(), 0.2, candidates(), get("cpu"), measure=watched, outlook=outlook(), rounds=3)
    queue = candidates().queue({}, {"macs": 1.0})
    assert queue.plan(len(queue)) in seen


def test_the_report_says_what_was_foretold() -> None:
    watch = Watch(refused="pool")
    _, record = solve(
        network(), 0.5, candidates(), get("cpu"), measure=machine(2.0), outlook=outlook(watch), rounds=3
    )
    lines = record.notes
    assert record.forecast is not None
    said = "\n".join(lines)
    assert f"{watch.measured} of them measured now" in said
    assert "1 operators estimated by size" in said
    assert "predicted from the table: " in said
    assert "predicted after correction: " in said
    assert "not measured alone: average-pool: no kernel for average-pool" in said
    assert f"it takes {2 * total({}):.3g}; kept in memory" in said


def test_without_a_forecast_whole_networks_are_measured_and_it_is_said() -> None:
    watch = Watch(refused="")  # every label contains it
    plan, record = solve(
        network(), 0.5, candidates(), get("cpu"), measure=machine(1.0), outlook=outlook(watch), rounds=3
    )
    assert record.forecast is None
    assert "nothing was predicted: " in record.notes[1]
    assert "measuring whole networks alone" in record.notes[1]
    assert machine(1.0)(plan, 1)[0][0] <= 0.5 * total({})


def test_costs_are_weighed_against_latency() -> None:
    """With one score for all, what saves the most latency goes first, however few its operations."""
    from graphprune.importance import Data

    def last_is_slow(block: Block, sizes: Sizes) -> float:
        slow = 400.0 if block.label.startswith("linear") else 1.0
        return slow * staircase(block, sizes)

    data = Data([torch.randn(4, 3, 16, 16) for _ in range(2)])
    priced = Candidates.of(network(), "reconstruction", limits=LIMITS, data=data)
    assert priced.priced

    def run(truth: Any) -> dict[str, int]:
        def measure(plan: Plan, rounds: int) -> Samples:
            axes = network().axes
            sizes = {axes[name].atom: axes[name].size - len(gone) for name, gone in plan.removed.items()}
            return [total(sizes, truth)] * rounds, [total({}, truth)] * rounds

        watched = Outlook(network(), widths(priced), Watch(truth))  # type: ignore[arg-type]
        plan, _ = solve(network(), 0.6, priced, get("cpu"), measure=measure, outlook=watched, rounds=3)
        return {name: len(gone) for name, gone in plan.removed.items()}

    hidden = "9.weight[0]"
    assert run(last_is_slow).get(hidden, 0) > run(staircase).get(hidden, 0)
