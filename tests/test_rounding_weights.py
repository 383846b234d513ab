"""Rounding of weights against plain loops in numpy and against all roundings there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import InputError
from graphprune.integers import INT8, Format
from graphprune.inverse_factor import DAMPING
from graphprune.quantization.blocks import Blocks, of_blocks, stored, to_integers, to_numbers
from graphprune.quantization.parameters import of_weight
from graphprune.quantization.parameters import to_integers as per_channel
from graphprune.quantization.rounding import METHODS, error, rounded

FORMS = [stored(8), stored(4), stored(3), stored(4, symmetric=False), stored(8, symmetric=False), Format(4)]


def problem(
    rows: int, columns: int, seed: int = 0, rank: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, correlated inputs with a mean, and their Gram matrix."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rank = rank or max(1, columns // 3)
    x = draw(4 * columns, rank) @ draw(rank, columns) + 0.1 * draw(4 * columns, columns) + draw(columns)
    return draw(rows, columns).float(), x, x.T @ x


def by_hand(weight: torch.Tensor, blocks: Blocks, gram: torch.Tensor) -> np.ndarray:
    """GPTQ as the paper says it: one row, one column after the other, the inverse updated by elimination."""
    w, h = weight.double().numpy(), gram.double().numpy()
    scale, zero = (value.double().numpy() for value in blocks.columns(w.shape[1]))
    low, high = blocks.format.range
    order = np.argsort(-np.diagonal(h), kind="stable")
    damped = h + DAMPING * np.mean(np.diagonal(h)) * np.eye(len(h))
    found = np.zeros_like(w)
    for row in range(len(w)):
        left, inverse, todo = w[row].copy(), np.linalg.inv(damped), list(order)
        while todo:
            j = todo.pop(0)
            found[row, j] = np.clip(np.round(left[j] / scale[row, j]) + zero[row, j], low, high)
            off = left[j] - (found[row, j] - zero[row, j]) * scale[row, j]
            for k in todo:
                left[k] -= off / inverse[j, j] * inverse[j, k]
            inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return found


def squared(weight: torch.Tensor, integers: np.ndarray, blocks: Blocks, x: torch.Tensor) -> np.ndarray:
    """What the products are off by, row by row, from the inputs themselves."""
    scale, zero = (value.double().numpy() for value in blocks.columns(weight.shape[1]))
    off = weight.double().numpy() - (integers - zero) * scale
    return np.square(off @ x.numpy().T).sum(1)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("size", [1, 4, 16, 100])
def test_a_block_keeps_its_range_and_its_zero(form: Format, size: int) -> None:
    weight = problem(5, 18)[0]
    blocks = of_blocks(weight, form, size)
    assert blocks.scale.shape == (5, -(-18 // size))
    integers = to_integers(weight, blocks)
    assert integers.dtype == getattr(torch, form.dtype)
    assert int(integers.min()) >= form.range[0]
    assert int(integers.max()) <= form.range[1]
    scale = blocks.columns(18)[0].abs()
    off = (to_numbers(integers, blocks) - weight).abs()
    # With one more integer on one side, the far end of the other side may saturate by half a step more.
    assert bool((off <= scale * 1.001).all())
    assert bool((off <= scale * 0.501).float().mean() > 0.8)
    nothing = to_integers(torch.zeros_like(weight), blocks)
    assert float(to_numbers(nothing, blocks).abs().max()) == 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_entry_of_a_symmetric_block_is_exact(sign: float) -> None:
    weight = sign * torch.tensor([[0.3, -0.2, 4.0, 1.0]])
    blocks = of_blocks(weight, stored(4), 4)
    assert to_numbers(to_integers(weight, blocks), blocks)[0, 2] == sign * 4.0
    assert set(to_integers(weight, blocks)[0].tolist()) == {0, 6, 7, 8}


def test_one_scale_a_row_is_one_block_a_row() -> None:
    weight = problem(6, 10)[0]
    how = of_weight(weight, INT8, axis=0)
    assert torch.equal(rounded(weight, how), per_channel(weight, how))
    whole = of_weight(weight, INT8, axis=None)
    assert torch.equal(rounded(weight, whole), per_channel(weight, whole))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_searched_range_is_never_worse(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(8, 64, generator=generator) ** 3
    counts = torch.rand(64, generator=generator) if weighted else None
    errors = []
    for search in (False, True):
        blocks = of_blocks(weight, stored(3), 16, search=search, weight=counts)
        off = (to_numbers(to_integers(weight, blocks), blocks) - weight).square()
        errors.append((off * (1 if counts is None else counts)).unflatten(1, (-1, 16)).sum(2))
    assert bool((errors[1] <= errors[0] * 1.0001).all())
    assert float(errors[1].sum()) < 0.95 * float(errors[0].sum())


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize(("rows", "columns", "size"), [(3, 7, 7), (2, 20, 8), (4, 33, 16)])
def test_gptq_is_what_the_paper_says(bits: int, rows: int, columns: int, size: int) -> None:
    weight, x, gram = problem(rows, columns, seed=columns)
    blocks = of_blocks(weight, stored(bits), size)
    wanted, nearest = by_hand(weight, blocks, gram), to_integers(weight, blocks).double().numpy()
    worse = squared(weight, wanted, blocks, x) > squared(weight, nearest, blocks, x)
    wanted[worse] = nearest[worse]
    assert np.array_equal(rounded(weight, blocks, gram, "gptq").double().numpy(), wanted)


def test_gptq_with_more_columns_than_are_done_at_once() -> None:
    weight, x, gram = problem(3, 150, rank=40)
    blocks = of_blocks(weight, stored(4), 32)
    found = rounded(weight, blocks, gram, "gptq").double().numpy()
    wanted = by_hand(weight, blocks, gram)
    assert (found == wanted).mean() > 0.99  # a tie that falls otherwise moves those behind it
    errors = squared(weight, found, blocks, x), squared(weight, wanted, blocks, x)
    np.testing.assert_allclose(errors[0], errors[1], rtol=0.05)


def test_up_or_down_against_all_roundings() -> None:
    """Nothing but up and down, no worse than the nearest, no better than the best, and mostly near it."""
    ratios = []
    for seed in range(20):
        weight, x, gram = problem(3, 8, seed=seed)
        blocks = of_blocks(weight, stored(3), 8)
        scale, zero = (value.double().numpy() for value in blocks.columns(8))
        found = rounded(weight, blocks, gram, "adaround").double().numpy()
        nearest = squared(weight, to_integers(weight, blocks).double().numpy(), blocks, x)
        mine = squared(weight, found, blocks, x)
        for row in range(3):
            exact = weight[row].double().numpy() / scale[row] + zero[row]
            choices = [sorted({*np.clip([np.floor(e), np.ceil(e)], 0, 7)}) for e in exact]
            assert all(q in choice for q, choice in zip(found[row], choices, strict=True))
            every = np.array(list(itertools.product(*choices)))
            off = (weight[row].double().numpy() - (every - zero[row]) * scale[row]) @ x.numpy().T
            best = np.square(off).sum(1).min()
            assert best * 0.9999 <= mine[row] <= nearest[row] * 1.0001
            ratios.append((mine[row] / best, nearest[row] / best))
    assert np.median(ratios, axis=0)[0] < 1.5
    assert np.median(ratios, axis=0)[1] > 4


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 5), columns=st.integers(1, 40), bits=st.sampled_from([2, 3, 4, 8]),
    size=st.sampled_from([1, 4, 16, 64]), seed=st.integers(0, 1000), symmetric=st.booleans(),
)  # fmt: skip
def test_no_method_loses_to_the_nearest(
    rows: int, columns: int, bits: int, size: int, seed: int, symmetric: bool
) -> None:
    weight, x, gram = problem(rows, columns, seed)
    blocks = of_blocks(weight, stored(bits, symmetric), size)
    nearest = squared(weight, to_integers(weight, blocks).double().numpy(), blocks, x)
    for method in METHODS[1:]:
        found = rounded(weight, blocks, gram, method)
        assert found.dtype == torch.uint8
        errors = squared(weight, found.double().numpy(), blocks, x)
        assert bool((errors <= nearest * (1 + 1e-6) + 1e-12).all())


@pytest.mark.parametrize("bits", [4, 3])
def test_correlated_inputs_halve_the_error(bits: int) -> None:
    weight, _, gram = problem(32, 96, rank=12)
    blocks = of_blocks(weight, stored(bits), 32)
    errors = {m: error(weight, rounded(weight, blocks, gram, m), blocks, gram) ** 0.5 for m in METHODS}
    assert errors["gptq"] < errors["nearest"] / 2
    assert errors["adaround"] < errors["nearest"] / 2


def test_the_error_is_that_of_the_products() -> None:
    weight, x, gram = problem(4, 12)
    blocks = of_blocks(weight, stored(3), 4)
    integers = to_integers(weight, blocks)
    wanted = x @ weight.double().T
    off = float((x @ to_numbers(integers, blocks).double().T - wanted).norm() / wanted.norm())
    assert error(weight, integers, blocks, gram) ** 0.5 == pytest.approx(off, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_degenerate_weights_and_inputs(method: str) -> None:
    weight, _, gram = problem(3, 6)
    gram[2], gram[:, 2] = 0.0, 0.0  # an input that is never anything but zero
    for matrix, sums in [
        (weight, gram), (weight, torch.zeros_like(gram)), (torch.zeros_like(weight), gram),
        (weight, torch.ones_like(gram)), (weight[:0], gram), (weight[:, :0], gram[:0, :0]),
    ]:  # fmt: skip
        blocks = of_blocks(matrix, stored(4), 4) if matrix.shape[1] else Blocks.of(
            of_weight(torch.ones(3, 1), INT8, axis=0), 3, 1)  # fmt: skip
        found = rounded(matrix, blocks, sums, method)
        assert found.shape == matrix.shape
        assert torch.equal(found, rounded(matrix, blocks, sums, method))


def test_bad_input_is_named() -> None:
    weight, _, gram = problem(3, 6)
    blocks = of_blocks(weight, stored(4), 4)
    with pytest.raises(InputError, match="one of nearest, gptq, adaround, got 'gtpq'"):
        rounded(weight, blocks, gram, "gtpq")
    with pytest.raises(InputError, match="give calibration inputs"):
        rounded(weight, blocks, method="gptq")
    with pytest.raises(InputError, match=r"\[3, 6\] does not go with a Gram matrix \[5, 5\]"):
        rounded(weight, blocks, gram[:5, :5], "gptq")
    with pytest.raises(InputError, match="Gram matrix of the inputs is not finite"):
        rounded(weight, blocks, gram * float("nan"), "gptq")
    with pytest.raises(InputError, match="not finite"):
        of_blocks(weight * float("inf"), stored(4), 4)
    with pytest.raises(InputError, match="blocks of 0 columns"):
        of_blocks(weight, stored(4), 0)
    with pytest.raises(InputError, match="3 rows takes one scale or one a row, got 2"):
        rounded(weight, of_weight(weight[:2], INT8, axis=0))
