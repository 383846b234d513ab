"""Patterns by counting, and the correction of what stays against least squares by another library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import InputError
from graphprune.sparsity.compensation import compensated, error
from graphprune.sparsity.patterns import Anywhere, Blocks, NofM

sizes = st.integers(1, 12)
seeds = st.integers(0, 1000)


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(rows=sizes, columns=sizes, share=st.floats(0, 1), seed=seeds)
def test_anywhere_takes_the_lowest(rows: int, columns: int, share: float, seed: int) -> None:
    scores = matrix(rows, columns, seed)
    keep = Anywhere(share).mask(scores)
    assert int((~keep).sum()) == round(share * scores.numel())
    if keep.any() and not keep.all():
        assert scores[keep].min() >= scores[~keep].max()


@given(rows=sizes, columns=sizes, n=st.integers(1, 3), more=st.integers(1, 4), seed=seeds)
def test_n_of_m_counts_in_every_group(rows: int, columns: int, n: int, more: int, seed: int) -> None:
    m, scores = n + more, matrix(rows, columns, seed)
    keep = NofM(n, m).mask(scores)
    for start in range(0, columns, m):
        group, kept = scores[:, start : start + m], keep[:, start : start + m]
        for row, own in zip(group, kept, strict=True):
            assert int(own.sum()) == min(n, len(row))
            assert set(row[own].tolist()) == set(sorted(row.tolist())[-int(own.sum()) :])


edges = st.integers(1, 4)


@given(rows=sizes, columns=sizes, height=edges, width=edges | st.none(), share=st.floats(0, 1), seed=seeds)
def test_blocks_go_whole(
    rows: int, columns: int, height: int, width: int | None, share: float, seed: int
) -> None:
    scores = matrix(rows, columns, seed)
    pattern = Blocks(share, height, width)
    keep = pattern.mask(scores)
    width = width or columns
    kept, gone = [], []
    for r in range(0, rows, height):
        for c in range(0, columns, width):
            block = keep[r : r + height, c : c + width]
            assert bool(block.all()) or not bool(block.any())
            mean = float(scores[r : r + height, c : c + width].mean())
            (kept if bool(block.all()) else gone).append(mean)
    assert len(gone) == round(share * (len(gone) + len(kept)))
    assert not kept or not gone or min(kept) >= max(gone) - 1e-12


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Anywhere(1.5), "share, 0 to 1"),
        (lambda: NofM(4, 4), "1 <= N < M"),
        (lambda: NofM(0, 4), "1 <= N < M"),
        (lambda: Blocks(0.5, 0, 4), "at least one row"),
        (lambda: Blocks(-0.1, 1, 4), "share, 0 to 1"),
        (lambda: Blocks(0.5, 0, None), "at least one row"),
    ],
)
def test_what_is_no_pattern(make, words) -> None:
    with pytest.raises(InputError, match=words):
        make()


@given(
    st.lists(st.sampled_from([-1.0, 0.0, 1.0, 2.0, float("inf"), float("nan")]), min_size=1, max_size=30),
    st.floats(0, 1),
)
def test_of_equal_scores_the_first_go_and_what_is_no_number_last(values: list[float], share: float) -> None:
    scores = torch.tensor(values)
    order = sorted(range(len(values)), key=lambda i: (values[i] != values[i], values[i], i))
    gone = sorted(order[: round(share * len(values))])
    mask = Anywhere(share).mask(scores[None])[0]
    assert (~mask).nonzero()[:, 0].tolist() == gone


@settings(deadline=None)
@given(
    rows=edges, columns=st.integers(2, 10), samples=st.integers(12, 30), share=st.floats(0.1, 0.9), seed=seeds
)  # fmt: skip
def test_a_given_mask_gets_the_least_squares_there_are(
    rows: int, columns: int, samples: int, share: float, seed: int
) -> None:
    x, w = matrix(samples, columns, seed), matrix(rows, columns, seed + 1)
    keep = Anywhere(share).mask(w.abs())
    found, mask = compensated(w, keep, x.T @ x)
    assert torch.equal(mask, keep)
    assert not found[~keep].any()
    for row, own, result in zip(w.numpy(), keep.numpy(), found.numpy(), strict=True):
        best = np.zeros(columns)
        if own.any():
            best[own] = np.linalg.lstsq(x.numpy()[:, own], x.numpy() @ row, rcond=None)[0]
        least = np.linalg.norm(x.numpy() @ (best - row))
        assert np.linalg.norm(x.numpy() @ (result - row)) <= least * (1 + 1e-4) + 1e-6 * np.linalg.norm(row)


@settings(deadline=None)
@given(rows=sizes, columns=st.integers(4, 40), seed=seeds, which=st.integers(0, 2))
def test_never_worse_than_setting_to_zero(rows: int, columns: int, seed: int, which: int) -> None:
    pattern = (Anywhere(0.6), NofM(2, 4), Blocks(0.5, 2, 2))[which]
    x, w = matrix(64, columns, seed), matrix(rows, columns, seed + 1)
    x = x @ matrix(columns, columns, seed + 2)  # correlated inputs
    gram = x.T @ x
    found, mask = compensated(w, pattern, gram)
    assert not found[~mask].any()
    assert bool((error(w, found, gram) <= error(w, w * mask, gram) * (1 + 1e-9) + 1e-9).all())
    if which == 1:
        assert torch.equal(mask.sum(1), NofM(2, 4).mask(w.abs()).sum(1))


def test_correlated_inputs_are_worth_correcting() -> None:
    x = matrix(256, 64, 0) @ matrix(64, 64, 1)
    w, gram = matrix(32, 64, 2), x.T @ x
    plain = error(w, w * NofM(2, 4).mask(w.abs()), gram).sum()
    assert error(w, compensated(w, NofM(2, 4), gram)[0], gram).sum() < 0.5 * plain


def test_wide_weights_are_swept_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphprune.sparsity import compensation

    monkeypatch.setattr(compensation, "SOLVED", 0)
    monkeypatch.setattr(compensation, "BLOCK", 8)
    x = matrix(256, 40, 0) @ matrix(40, 40, 1)
    w, gram = matrix(8, 40, 2), x.T @ x
    for pattern in (Anywhere(0.5), NofM(2, 4), Blocks(0.5, 2, 4)):
        found, mask = compensated(w, pattern, gram)
        assert error(w, found, gram).sum() < 0.8 * error(w, w * mask, gram).sum()


def test_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="does not go with"):
        compensated(torch.ones(2, 3), NofM(1, 2), torch.eye(2))
    with pytest.raises(InputError, match="not finite"):
        compensated(torch.ones(2, 2), NofM(1, 2), torch.full((2, 2), float("nan")))
