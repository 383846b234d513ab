"""Timing: candidates whose duration is known, and clocks that are not real."""

from __future__ import annotations

import gc
import itertools
import time
from collections import Counter
from functools import partial

import pytest
import torch

from graphprune import measure
from graphprune.errors import GraphpruneError, InputError
from graphprune.measure import interleaved, isolated, ratio


class Clock:
    """A clock that only moves when a candidate says so."""

    def __init__(self) -> None:
        self.now = 0
        self.calls: list[str] = []

    def perf_counter_ns(self) -> int:
        return self.now

    def candidate(self, name: str, *milliseconds: float):
        durations = list(milliseconds)

        def call() -> None:
            self.calls.append(name)
            self.now += int(durations[0] * 1e6)
            durations.append(durations.pop(0))

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure.time, "perf_counter_ns", clock.perf_counter_ns)
    return clock


def test_medians_and_quartiles(clock):
    timings = interleaved({"a": clock.candidate("a", 1, 2, 3, 4, 5)}, rounds=5, warmup=0)
    timing = timings["a"]
    assert (timing.median_ms, timing.low_ms, timing.high_ms, timing.rounds) == (3, 2, 4, 5)
    assert timing.samples == (1, 2, 3, 4, 5)
    assert str(timing).startswith("3 ms (2 to 4")


def test_candidates_take_turns(clock):
    interleaved({n: clock.candidate(n, 1) for n in "abc"}, rounds=3, warmup=1)
    calls = "".join(clock.calls)
    assert calls[:3] == "abc"
    assert [sorted(calls[i : i + 3]) for i in (3, 6, 9)] == [list("abc")] * 3


@pytest.mark.parametrize("count", range(1, 8))
def test_every_candidate_stands_in_every_place_and_behind_every_other_equally_often(count):
    names = list("abcdefg"[:count])
    orders = measure._orders(names)
    assert all(sorted(order) == names for order in orders)
    places = Counter((name, place) for order in orders for place, name in enumerate(order))
    assert len(places) == count**2
    assert len(set(places.values())) == 1
    behind = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(behind) == count * (count - 1)
    assert len(set(behind.values())) <= 1


def test_ratio_is_of_rounds_not_of_medians(clock):
    # A machine that is ten times slower in every other round changes medians, not ratios.
    slow = {"a": clock.candidate("a", 2, 20), "b": clock.candidate("b", 1, 10)}
    timings = interleaved(slow, rounds=6, warmup=0)
    found = ratio(timings["a"], timings["b"])
    assert (found.median, found.low, found.high) == (2, 2, 2)
    assert str(found) == "2.00 (2.00 to 2.00)"


def test_min_seconds_goes_on(clock):
    timings = interleaved({"a": clock.candidate("a", 100)}, rounds=1, warmup=0, min_seconds=1.0)
    assert timings["a"].rounds == 10


def test_real_durations():
    timings = interleaved({"short": partial(time.sleep, 0.002), "long": partial(time.sleep, 0.02)}, rounds=3)
    assert timings["short"].median_ms >= 2
    assert ratio(timings["long"], timings["short"]).median > 1.5


def test_threads_are_stated_and_restored():
    before, seen = torch.get_num_threads(), []
    timings = interleaved({"a": lambda: seen.append(torch.get_num_threads())}, rounds=2, threads=before + 1)
    assert set(seen) == {before + 1}
    assert timings["a"].threads == before + 1
    assert torch.get_num_threads() == before


def test_a_failing_candidate_leaves_threads_and_collection_as_they_were():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        interleaved({"a": lambda: 1 / 0}, threads=before + 1)
    assert torch.get_num_threads() == before
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("candidates", "options", "says"),
    [
        ({}, {}, "no candidate"),
        ({"a": int}, {"rounds": 0}, "rounds=0"),
        ({"a": int}, {"warmup": -1}, "warmup=-1"),
        ({"a": int}, {"threads": 0}, "threads=0"),
    ],
)
def test_senseless_measurements_are_refused(candidates, options, says):
    with pytest.raises(InputError, match=says):
        interleaved(candidates, **options)
    with pytest.raises(InputError, match=says):
        isolated(candidates, **options)


def test_ratio_needs_one_measurement(clock):
    a = interleaved({"a": clock.candidate("a", 1)}, rounds=2)["a"]
    b = interleaved({"b": clock.candidate("b", 1)}, rounds=3)["b"]
    with pytest.raises(InputError, match="one measurement"):
        ratio(a, b)


def sleeper(seconds: float):
    return partial(time.sleep, seconds)


def broken():
    raise ValueError("no such model")


def test_isolated_candidates_run_in_processes_of_their_own():
    timings = isolated(
        {"a": partial(sleeper, 0.001), "b": partial(sleeper, 0.03)}, rounds=3, warmup=1, threads=1
    )
    assert timings["a"].threads == 1
    assert ratio(timings["b"], timings["a"]).median > 2
    with pytest.raises(GraphpruneError, match="candidate 'bad' failed: ValueError: no such model"):
        isolated({"bad": broken}, rounds=1)
