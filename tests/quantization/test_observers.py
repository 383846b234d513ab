"""Observers against oracles that keep every number: numpy's percentiles, a search over the raw samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphprune.errors import InputError
from graphprune.integers import INT8, UINT8, Format
from graphprune.quantization import clipping
from graphprune.quantization.histogram import Histogram
from graphprune.quantization.observers import NAMES, Observer, merged, observer
from graphprune.quantization.parameters import of_range, to_integers, to_numbers

UINT4 = Format(4, signed=False, symmetric=False)
ORDERLESS = [name for name in NAMES if name != "moving-average"]


def samples() -> dict[str, Tensor]:
    torch.manual_seed(3)
    normal = torch.randn(50_000)
    return {
        "normal": normal,
        "relu": normal.relu(),
        "shifted": normal * 2 + 1.5,
        "skewed": normal.exp() - 0.5,
        "saturated": (normal * 4).clamp(0, 6),
        "heavy": torch.distributions.Laplace(0.0, 1.0).sample((50_000,)),
    }


SAMPLES = samples()


def seen(name: str, *batches: Tensor, **options: float) -> Observer:
    watch = observer(name, **options)
    for batch in batches:
        watch.see(batch)
    return watch


def error(values: Tensor, low: float, high: float, form: Format) -> float:
    how = of_range(low, high, form)
    return float((to_numbers(to_integers(values, how), how) - values).double().square().mean())


def finite(limit: float = 1e4) -> st.SearchStrategy[float]:
    return st.floats(-limit, limit, width=32)


batches = st.lists(st.lists(finite(), min_size=1, max_size=30), min_size=1, max_size=5)


# ---- the histogram ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.9999, 1.0])
def test_quantiles_are_those_of_numpy_to_the_width_of_a_bin(kind: str, share: float) -> None:
    histogram = Histogram()
    histogram.add(SAMPLES[kind])
    wanted = float(np.quantile(SAMPLES[kind].numpy(), share))
    # Between the neighbouring samples there is no right answer; a bin is 1/128 of its magnitude wide.
    assert histogram.quantile(share) == pytest.approx(wanted, rel=1 / 100, abs=2e-3)


@given(batches)
def test_every_number_is_counted_in_the_bin_that_holds_it(numbers: list[list[float]]) -> None:
    histogram = Histogram()
    for batch in numbers:
        histogram.add(torch.tensor(batch))
    lower, upper, counts = histogram.bins()
    everything = np.sort(np.concatenate([np.asarray(b, np.float32) for b in numbers])).astype(np.float64)
    everything[np.abs(everything) < 2.0**-126] = 0.0
    assert counts.sum() == len(everything) == histogram.total
    assert (lower <= upper).all()
    assert (np.diff(lower) >= 0).all()
    place = 0
    for low, high, count in zip(lower, upper, counts, strict=True):
        inside = everything[place : place + count]
        assert (inside >= min(low, 0.0 if high == 0 else low)).all()
        assert (inside <= high).all()
        place += count


@given(batches)
def test_histograms_add_up(numbers: list[list[float]]) -> None:
    parts = []
    for batch in numbers:
        parts.append(Histogram())
        parts[-1].add(torch.tensor(batch))
    whole = Histogram()
    whole.add(torch.tensor([v for batch in numbers for v in batch]))
    total = Histogram.sum(parts)
    assert (total.low, total.high, total.total) == (whole.low, whole.high, whole.total)
    for left, right in zip(total.bins(), whole.bins(), strict=True):
        np.testing.assert_array_equal(left, right)


# ---- what holds of all of them -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(numbers=batches, form=st.sampled_from([UINT8, INT8, UINT4]))
def test_a_range_holds_zero_and_otherwise_stays_within_what_was_seen(
    name: str, numbers: list[list[float]], form: Format
) -> None:
    watch = seen(name, *map(torch.tensor, numbers))
    low, high = watch.range(form)
    everything = torch.tensor([v for batch in numbers for v in batch])
    assert min(float(everything.min()), 0.0) <= low <= 0.0 <= high <= max(float(everything.max()), 0.0)
    assert watch.seen == len(everything)
    how = of_range(low, high, form)
    assert float(how.scale) > 0
    assert np.isfinite(float(how.scale))


@pytest.mark.parametrize("name", ORDERLESS)
@settings(max_examples=25, deadline=None)
@given(numbers=batches, seed=st.integers(0, 100))
def test_neither_order_nor_batches_matter(name: str, numbers: list[list[float]], seed: int) -> None:
    everything = torch.tensor([v for batch in numbers for v in batch])
    shuffled = everything[torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))]
    assert seen(name, *map(torch.tensor, numbers)).range(UINT8) == seen(name, shuffled).range(UINT8)


@pytest.mark.parametrize("name", ORDERLESS)
def test_merged_observers_know_what_one_that_saw_it_all_does(name: str) -> None:
    a, b = SAMPLES["relu"], SAMPLES["shifted"]
    assert merged([seen(name, a), seen(name, b)]).range(INT8) == seen(name, a, b).range(INT8)


def test_merging_leaves_the_parts_alone() -> None:
    one, other = seen("minmax", torch.ones(3)), seen("minmax", -torch.ones(3))
    merged([one, other]).see(torch.full((2,), 9.0))
    assert one.extent == (1.0, 1.0)
    assert one.seen == other.seen == 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
def test_constant_values_are_flagged_and_give_a_usable_scale(name: str, value: float) -> None:
    watch = seen(name, torch.full((4, 4), value), torch.full((3,), value))
    assert watch.constant
    assert watch.outlier == 1.0
    low, high = watch.range(UINT8)
    assert (low, high) == (min(value, 0.0), max(value, 0.0))
    how = of_range(low, high, UINT8)
    assert to_numbers(to_integers(torch.tensor([value]), how), how).item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_an_error(name: str, value: float) -> None:
    watch = observer(name)
    with pytest.raises(InputError, match="not finite"):
        watch.see(torch.tensor([1.0, value]))


@pytest.mark.parametrize("name", NAMES)
def test_an_observer_that_saw_nothing_says_so(name: str) -> None:
    watch = seen(name, torch.zeros(0, 3))
    assert not watch.seen
    with pytest.raises(InputError, match="saw no values"):
        watch.range(UINT8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_and_strides_count_alike(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, -2.0, 0.5], [4.0, 0.0, -0.25]], dtype=dtype)
    assert seen("minmax", values.t()).extent == (-2.0, 4.0)
    assert seen("minmax", values.expand(3, 2, 3)).seen == 18


# ---- each of them ------------------------------------------------------------------------------------


def test_moving_average_means_what_torch_does() -> None:
    from torch.ao.quantization import MovingAverageMinMaxObserver

    torch.manual_seed(0)
    theirs, ours = (
        MovingAverageMinMaxObserver(averaging_constant=0.1),
        observer("moving-average", averaging=0.1),
    )
    for size in range(1, 9):
        batch = torch.randn(40) * size - 1
        theirs(batch)
        ours.see(batch)
    assert ours.range(UINT8) == pytest.approx((float(theirs.min_val), float(theirs.max_val)), rel=1e-5)


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_is_numpys_of_both_ends(kind: str, percentile: float) -> None:
    low, high = seen("percentile", *SAMPLES[kind].split(7_000), percentile=percentile).range(UINT8)
    ordered = np.sort(SAMPLES[kind].numpy())
    for found, share in [(low, 1 - percentile / 100), (high, percentile / 100)]:
        # Between two neighbouring samples any number is right; a bin is 1/128 of its magnitude wide.
        place = share * (len(ordered) - 1)
        before, after = ordered[max(int(place) - 1, 0)], ordered[min(int(place) + 2, len(ordered) - 1)]
        ends = sorted((0.0, float(before))) if share < 0.5 and before > 0 else [before, after]
        assert ends[0] - abs(ends[0]) / 128 - 1e-6 <= found <= ends[1] + abs(ends[1]) / 128 + 1e-6


def test_a_percentile_that_would_leave_nothing_keeps_everything() -> None:
    values = torch.zeros(100_000)
    values[7] = 3.0
    assert seen("percentile").name == "percentile"
    assert seen("percentile", values).range(UINT8) == (0.0, 3.0)


def test_the_default_percentile_ignores_a_single_outlier() -> None:
    values = torch.cat([SAMPLES["normal"], torch.tensor([1e6])])
    low, high = seen("percentile", values).range(UINT8)
    assert -5 < low < -3
    assert 3 < high < 5


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("form", [UINT8, INT8, UINT4], ids=str)
def test_mse_is_as_good_as_a_search_over_the_raw_samples(kind: str, form: Format) -> None:
    values = SAMPLES[kind][:8_000]
    low, high = float(values.min()), float(values.max())
    shares = torch.linspace(0.15, 1.0, 18).tolist()
    if form.symmetric:
        limit = max(-low, high)
        grid = [(max(low, -limit * s), min(high, limit * s)) for s in shares]
    else:
        grid = [(low * s, high * t) for s in (shares if low < 0 else [1.0]) for t in shares]
    best = min(error(values, a, b, form) for a, b in grid)
    ends = seen("mse", values).range(form)
    found = error(values, ends[0], ends[1], form)
    assert found <= best * 1.01
    assert found <= error(values, low, high, form) * 1.001


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("form", [UINT8, INT8, UINT4], ids=str)
def test_the_expected_error_is_the_one_measured(kind: str, form: Format) -> None:
    values = SAMPLES[kind]
    histogram = Histogram()
    histogram.add(values)
    for low, high in [(-1.0, 2.0), (0.0, 3.0), (-4.0, 4.0)]:
        expected = clipping.squared_error(histogram.bins(), np.array([low]), np.array([high]), form)[0]
        assert expected / len(values) == pytest.approx(error(values, low, high, form), rel=0.03)


@pytest.mark.parametrize("end", [300, 700, 2048])
def test_divergence_is_that_of_the_definition(end: int) -> None:
    rng = np.random.default_rng(end)
    fine = rng.poisson(40 * np.exp(-np.arange(2048) / 300)).astype(float)
    levels = 128
    reference, quantized = fine[:end].copy(), np.zeros(end)
    reference[-1] += fine[end:].sum()
    for level in range(levels):
        inside = [i for i in range(end) if i * levels // end == level]
        filled = [i for i in inside if fine[i]]
        for i in filled:
            quantized[i] = sum(fine[j] for j in inside) / len(filled)
    p, q = reference / reference.sum(), quantized / quantized.sum()
    wanted = sum(a * np.log(a / max(b, 1e-12)) for a, b in zip(p, q, strict=True) if a)
    assert clipping.divergence(fine, end, levels) == pytest.approx(wanted)


@pytest.mark.parametrize("form", [UINT8, INT8], ids=str)
def test_entropy_cuts_a_long_thin_tail_and_keeps_an_even_distribution(form: Format) -> None:
    torch.manual_seed(1)
    bulk = torch.randn(100_000)
    tail = torch.cat([bulk, torch.linspace(10, 40, 20)])
    low, high = seen("entropy", tail).range(form)
    assert 3 < high < 20
    assert low < -3
    even = torch.linspace(-1, 1, 100_000)
    assert seen("entropy", even).range(form) == (-1.0, 1.0)


def test_entropy_looks_closer_where_its_bins_are_too_coarse() -> None:
    values = torch.cat([torch.rand(100_000), torch.full((3,), 1000.0)])
    _, high = seen("entropy", values).range(UINT8)
    assert 0.9 < high < 130


# ---- the hint --------------------------------------------------------------------------------------


def test_outliers_are_seen_by_every_observer() -> None:
    torch.manual_seed(0)
    plain = torch.randn(100_000)
    for name in NAMES:
        assert seen(name, plain).outlier < 2
        assert seen(name, plain, torch.tensor([-500.0])).outlier == pytest.approx(500 / 3.29, rel=0.1)


def test_zeros_do_not_make_what_is_left_an_outlier() -> None:
    values = torch.zeros(1_000_000)
    values[:500] = 1 + torch.rand(500)
    assert seen("minmax", values).outlier < 1.1


# ---- bad input -------------------------------------------------------------------------------------


def test_an_unknown_observer_is_named_with_its_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown observer 'percentil' \(did you mean 'percentile'\?\)"):
        observer("percentil")


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(InputError, match="observer 'minmax' has no option 'percentile'; it takes: none"):
        observer("minmax", percentile=99.0)
    with pytest.raises(InputError, match="did you mean 'averaging'"):
        observer("moving-average", avaraging=0.1)


@pytest.mark.parametrize("value", [50.0, 100.5, float("nan"), "99", True])
def test_a_percentile_out_of_range_is_named(value: object) -> None:
    with pytest.raises(InputError, match="'percentile' of observer 'percentile' must be above 50"):
        observer("percentile", percentile=value)


def test_different_observers_do_not_merge() -> None:
    with pytest.raises(InputError, match="got minmax and mse"):
        merged([observer("minmax"), observer("mse")])
    with pytest.raises(InputError, match=r"percentile=99\.9"):
        merged([observer("percentile"), observer("percentile", percentile=99.9)])
    with pytest.raises(InputError, match="no observers"):
        merged([])
