"""Schedules against formulas written out by hand, and what holds of all of them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphprune.errors import InputError
from graphprune.plans.schedule import shares
from graphprune.train.schedules import Constant, Cubic, Exponential, OneCycle, Polynomial, Rising, Schedule

RISING = (Polynomial, Cubic, OneCycle, Exponential)

steps = st.integers(0, 3000)
ranges = st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(sorted)
spans = st.tuples(st.integers(0, 500), st.integers(1, 2000), st.integers(1, 300))


@st.composite
def rising(draw: Any, kinds: tuple[type[Rising], ...] = RISING) -> Rising:
    (initial, final), (begin, length, frequency) = draw(ranges), draw(spans)
    kind = draw(st.sampled_from(kinds))
    return kind(initial=initial, final=final, begin=begin, end=begin + length, frequency=frequency)


schedules = rising() | st.builds(
    lambda s, span, open_end: Constant(s, span[0], None if open_end else span[0] + span[1], span[2]),
    st.floats(0, 1), spans, st.booleans(),
)  # fmt: skip


@given(schedules)
def test_due_is_every_so_many_steps_from_begin_to_end(schedule: Schedule) -> None:
    end = 3000 if schedule.end is None else schedule.end
    wanted = set(range(schedule.begin, end + 1, schedule.frequency))
    assert {step for step in range(3001) if schedule.due(step)} == wanted
    if schedule.end is not None:
        assert schedule.last == max(wanted)
    assert schedule.reached == schedule(schedule.last)


@given(schedules, steps, steps)
def test_it_never_falls_and_ends_at_the_target(schedule: Schedule, one: int, other: int) -> None:
    early, late = sorted((one, other))
    assert 0 <= schedule(early) <= schedule(late) + 1e-12
    assert schedule(late) <= schedule.target + 1e-12
    assert schedule(10**6) == schedule.target
    assert schedule.begin == 0 or schedule(schedule.begin - 1) == 0


@given(ranges, spans, st.floats(0.1, 5), st.floats(0, 1))
def test_polynomial_decay(ends: list[float], span: tuple[int, int, int], power: float, share: float) -> None:
    (initial, final), (begin, length, _) = ends, span
    step = begin + int(share * length)
    schedule = Polynomial(initial=initial, final=final, begin=begin, end=begin + length, power=power)
    wanted = final + (initial - final) * (1 - (step - begin) / length) ** power
    assert schedule(step) == pytest.approx(wanted, abs=1e-12)
    cubic = Cubic(initial=initial, final=final, begin=begin, end=begin + length)
    assert cubic(step) == Polynomial(initial=initial, final=final, begin=begin, end=begin + length)(step)


@given(ranges, st.integers(1, 2000), st.floats(0, 1), st.floats(8, 20), st.floats(3, 7))
def test_one_cycle(ends: list[float], end: int, share: float, alpha: float, beta: float) -> None:
    step = int(share * (end - 1))
    t = step / end
    wanted = ends[0] + (ends[1] - ends[0]) * (1 + math.exp(-alpha + beta)) / (1 + math.exp(-alpha * t + beta))
    found = OneCycle(initial=ends[0], final=ends[1], end=end, alpha=alpha, beta=beta)(step)
    assert found == pytest.approx(wanted, abs=1e-12)


@given(st.floats(0, 0.9), st.integers(2, 100))
def test_exponential_takes_the_same_share_of_what_is_left(initial: float, count: int) -> None:
    schedule = Exponential(initial=initial, final=0.95, end=count, frequency=1)
    left = [1 - schedule(step) for step in range(count + 1)]
    factors = [after / before for before, after in pairwise(left)]
    assert factors == pytest.approx([factors[0]] * count)


@pytest.mark.parametrize(("kind", "name"), [(Cubic, "polynomial"), (Exponential, "exponential")])
def test_rounds_of_optimize_follow_the_same_curves(kind: type[Rising], name: str) -> None:
    schedule = kind(final=0.7, end=5, frequency=1)
    assert shares(1 - 0.7, 5, name) == pytest.approx([1 - schedule(step) for step in range(1, 6)])


def test_what_is_reached_where_the_frequency_does_not_meet_the_end() -> None:
    schedule = Polynomial(initial=0.5, final=0.8, end=211, frequency=100, power=1.0)
    assert (schedule.last, schedule.due(211)) == (200, False)
    assert schedule.reached == pytest.approx(0.5 + 0.3 * 200 / 211)
    assert schedule.reached < schedule.target


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Constant(1.5), "share"),
        (lambda: Constant(0.5, frequency=0), "at least 1"),
        (lambda: Constant(0.5, begin=-1), "at least 0"),
        (lambda: Constant(0.5, begin=True), "number of steps"),
        (lambda: Constant(0.5, begin=5, end=4), "before begin"),
        (lambda: Cubic(final=0.5, begin=7, end=7), "not after"),
        (lambda: Cubic(initial=0.6, final=0.5, end=9), "never comes back"),
        (lambda: Cubic(final=math.nan, end=9), "rises"),
        (lambda: Cubic(final=0.5, end=9.5), "number of steps"),  # type: ignore[arg-type]
        (lambda: Polynomial(final=0.5, end=9, power=0.0), "power"),
        (lambda: OneCycle(final=0.5, end=9, alpha=math.inf), "alpha"),
        (lambda: Exponential(final=1.0, end=9), "below 1"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        make()
