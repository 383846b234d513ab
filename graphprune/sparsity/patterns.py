"""Which entries of a weight stay: anywhere, N of every M, or whole blocks.

A pattern turns scores, the larger the more worth keeping, into a mask. Weights are seen as the matrix that
their operator multiplies with, ``[rows, columns]``, a row for every output; what ``N of M`` counts are
neighbouring columns, as the sparse tensor cores of GPUs want it (Mishra et al., *Accelerating Sparse Deep
Neural Networks*, 2021: 2 of 4).

>>> import torch
>>> scores = torch.tensor([[4.0, 1.0, 3.0, 1.5]])
>>> Anywhere(0.25).mask(scores).tolist()
[[True, False, True, True]]
>>> NofM(2, 4).mask(scores).tolist()
[[True, False, True, False]]
>>> Blocks(0.5, 1, 2).mask(scores).tolist()
[[True, True, False, False]]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InputError


class Pattern(Protocol):
    """What may be zero."""

    def mask(self, scores: Tensor) -> Tensor:
        """Which entries of a matrix stay, given their scores ``[rows, columns]``."""

    def refusal(self, rows: int, columns: int) -> str:
        """Why a matrix cannot have this pattern; empty where it can."""


@dataclass(frozen=True)
class Anywhere:
    """The lowest scores go, wherever they are.

    Attributes:
        sparsity: share of the entries that becomes zero, 0 to 1; rounded to the nearest number of them.
    """

    sparsity: float

    def __post_init__(self) -> None:
        _check_share(self.sparsity)

    def mask(self, scores: Tensor) -> Tensor:
        """See :class:`Pattern`; of equal scores the first go."""
        return _without_lowest(scores.reshape(-1), round(self.sparsity * scores.numel())).reshape(
            scores.shape
        )

    def refusal(self, rows: int, columns: int) -> str:
        """Nothing: every matrix can."""
        return ""


@dataclass(frozen=True)
class NofM:
    """Of every ``m`` neighbouring columns ``n`` stay; in the last group as many as there are, up to ``n``.

    Attributes:
        n: how many stay, at least 1.
        m: of how many.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise InputError(f"N of M needs 1 <= N < M, got {self.n} of {self.m}")

    @property
    def sparsity(self) -> float:
        """The share that becomes zero where the columns are a multiple of ``m``."""
        return 1 - self.n / self.m

    def mask(self, scores: Tensor) -> Tensor:
        """See :class:`Pattern`; of equal scores the first stay."""
        rows, columns = scores.shape
        filled = functional.pad(scores, (0, -columns % self.m), value=-float("inf"))
        groups = filled.reshape(rows, -1, self.m)
        order = groups.argsort(dim=-1, descending=True, stable=True)
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., : self.n], True)
        return keep.reshape(rows, -1)[:, :columns]

    def refusal(self, rows: int, columns: int) -> str:
        """A matrix with fewer columns than ``m`` has no group."""
        return (
            f"it has {columns} columns, and {self.n} of {self.m} counts in groups" if columns < self.m else ""
        )


@dataclass(frozen=True)
class Blocks:
    """Whole blocks go, those of the lowest mean score; a block at the edge may be smaller.

    Attributes:
        sparsity: share of the blocks that becomes zero, 0 to 1.
        rows, columns: of a block; columns ``None`` are all there are, so that whole outputs go.
    """

    sparsity: float
    rows: int
    columns: int | None

    def __post_init__(self) -> None:
        _check_share(self.sparsity)
        if self.rows < 1 or (self.columns is not None and self.columns < 1):
            raise InputError(f"a block has at least one row and column, got {self.rows} × {self.columns}")

    def mask(self, scores: Tensor) -> Tensor:
        """See :class:`Pattern`."""
        means = self.means(scores)
        keep = _without_lowest(means.reshape(-1), round(self.sparsity * means.numel())).reshape(means.shape)
        return self.spread(keep, *scores.shape)

    def spread(self, keep: Tensor, rows: int, columns: int) -> Tensor:
        """From what stays of the blocks to what stays of a matrix's entries."""
        whole = keep.repeat_interleave(self.rows, 0).repeat_interleave(self.columns or columns, 1)
        return whole[:rows, :columns]

    def means(self, scores: Tensor) -> Tensor:
        """The mean score of every block, ``[rows of blocks, columns of blocks]``."""
        rows, columns = scores.shape
        width = self.columns or columns
        pads = (0, -columns % width, 0, -rows % self.rows)
        shape = ((rows + pads[3]) // self.rows, self.rows, (columns + pads[1]) // width, width)
        sums = functional.pad(scores, pads).reshape(shape).sum((1, 3))
        counts = functional.pad(torch.ones_like(scores), pads).reshape(shape).sum((1, 3))
        return sums / counts

    def refusal(self, rows: int, columns: int) -> str:
        """A matrix smaller than a block has none."""
        if rows >= self.rows and columns >= (self.columns or 1):
            return ""
        return f"it is {rows} × {columns}, smaller than a block of {self.rows} × {self.columns or columns}"


def mask_among(pattern: Pattern, scores: Tensor, there: Tensor) -> Tensor:
    """The mask of a weight of which some entries went before: those go first, and none comes back.

    Args:
        pattern: what may be zero.
        scores: ``[rows, columns]``, not negative.
        there: of the same shape, ``False`` where an entry is gone.

    >>> there = torch.tensor([[False, False, True, True]])
    >>> mask_among(NofM(2, 4), torch.tensor([[4.0, 3.0, 2.0, 0.0]]), there).tolist()
    [[False, False, True, True]]
    """
    return pattern.mask(lowered(pattern, scores, there)) & there


def lowered(pattern: Pattern, scores: Tensor, there: Tensor) -> Tensor:
    """Scores with those of gone entries below all others; in the mean of a block they count as nothing."""
    return scores.masked_fill(~there, 0.0 if isinstance(pattern, Blocks) else -1.0)


def _check_share(sparsity: float) -> None:
    if not 0 <= sparsity <= 1:
        raise InputError(f"sparsity is a share, 0 to 1, got {sparsity}")


def _without_lowest(scores: Tensor, count: int) -> Tensor:
    """All but the ``count`` lowest of ``[n]``; of equal ones the first go, NaN last."""
    if count <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    # Selection instead of sorting: linear in the number of entries, and masks of millions are made often.
    edge, odd = scores.kthvalue(count).values, scores.isnan()
    keep = odd if bool(edge.isnan()) else ~(scores < edge)
    equal = (odd if bool(edge.isnan()) else scores == edge).nonzero()[:, 0]
    return keep.index_fill(0, equal[: count - int((~keep).sum())], False)
