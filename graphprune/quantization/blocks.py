r"""Scales and zero points of blocks: one pair for so many columns of every row of a matrix.

A row of a weight is what one output sums over. With one scale a row, its largest entry decides how finely
all of it is rounded; with one for every 32 columns, only 32 entries share that fate (Dettmers et al., *8-bit
Optimizers via Block-wise Quantization*, ICLR 2022). A symmetric range of ``2^b`` integers has one more
below its middle than above, so the entry of largest magnitude goes to the lowest integer, whatever its
sign: the scale takes the sign, and may be negative.

From few bits less is lost when large entries saturate and the others are rounded more finely: ``search``
shrinks every block's range to where the squared error is least.

>>> import torch
>>> blocks = of_blocks(torch.tensor([[4.0, 1.0, -8.0, 2.0]]), stored(4), 2)
>>> blocks.scale.tolist()
[[-0.5, 1.0]]
>>> to_integers(torch.tensor([[4.0, 1.0, -8.0, 2.0]]), blocks).tolist()
[[0, 6, 0, 10]]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..integers import Format
from .parameters import TINY, Parameters

# What share of its range a block keeps, where the best is looked for.
SHARES = tuple(1 - step / 40 for step in range(21))


@dataclass(frozen=True, eq=False)
class Blocks:
    """How a matrix ``[rows, columns]`` becomes integers.

    Attributes:
        scale: float32 ``[rows, blocks]``, never zero, of either sign.
        zero_point: int32 ``[rows, blocks]``.
        format: the integers.
        size: columns of a block; the last one may be shorter.
    """

    scale: Tensor
    zero_point: Tensor
    format: Format
    size: int

    def columns(self, count: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every entry, ``[rows, count]``."""
        return _spread(self.scale, self.size, count), _spread(self.zero_point, self.size, count)

    @classmethod
    def of(cls, how: Parameters, rows: int, columns: int) -> Blocks:
        """One scale for everything, or one a row, as blocks that are whole rows.

        Raises:
            InputError: there are neither one nor ``rows`` scales.
        """
        if how.scale.numel() not in (1, rows):
            raise InputError(f"a matrix of {rows} rows takes one scale or one a row, got {how.scale.numel()}")
        scale, zero = (value.reshape(-1, 1).expand(rows, 1) for value in (how.scale, how.zero_point))
        return cls(scale, zero, how.format, max(columns, 1))


def stored(bits: int, symmetric: bool = True) -> Format:
    """The format that runtimes pack weights in: without a sign, every integer used."""
    return Format(bits, signed=False, symmetric=symmetric)


def of_blocks(
    matrix: Tensor, form: Format, size: int, *, search: bool = False, weight: Tensor | None = None
) -> Blocks:
    """Scales that fit every block of a matrix.

    Args:
        matrix: ``[rows, columns]``.
        form: the integers.
        size: columns of a block.
        search: look for the share of its range with the least squared error, instead of keeping all of it.
        weight: ``[columns]``, how much an error of each column counts in the search.

    Raises:
        InputError: the matrix is not finite or not a matrix, or the size not positive.
    """
    if matrix.dim() != 2 or size < 1:
        raise InputError(f"blocks of {size} columns do not part a tensor of shape {list(matrix.shape)}")
    if not bool(torch.isfinite(matrix).all()):
        raise InputError("a weight holds values that are not finite, and cannot be quantized")
    parted = _parted(matrix.detach().float(), size)  # [rows, blocks, size]
    scale, zero = _fitted(parted, form, 1.0)
    if search:
        each = torch.ones(matrix.shape[1]) if weight is None else weight.float()
        counts = _parted(each.unsqueeze(0), size)  # padding counts nothing
        best = _error(parted, scale, zero, form, counts)
        for share in SHARES[1:]:
            other, its_zero = _fitted(parted, form, share)
            error = _error(parted, other, its_zero, form, counts)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, other, scale), torch.where(better, its_zero, zero)
    return Blocks(scale, zero.to(torch.int32), form, size)


def to_integers(matrix: Tensor, how: Blocks) -> Tensor:
    """``clamp(round(matrix / scale) + zero_point)``, half to even, in the format's dtype."""
    scale, zero = how.columns(matrix.shape[1])
    integers = torch.round(matrix.detach().float() / scale) + zero
    return integers.clamp(*how.format.range).to(getattr(torch, how.format.dtype))


def to_numbers(integers: Tensor, how: Blocks) -> Tensor:
    """``scale * (integers - zero_point)`` in float32."""
    scale, zero = how.columns(integers.shape[1])
    return (integers.to(torch.int32) - zero).float() * scale


def _fitted(parted: Tensor, form: Format, share: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point, both float32 ``[rows, blocks]``, of a share of every block's range."""
    first, last = form.range
    high, low = parted.amax(2) * share, parted.amin(2) * share
    if not form.symmetric:
        high, low = high.clamp_min(0), low.clamp_max(0)
        scale = ((high - low) / (last - first)).clamp_min(TINY)
        return scale, (first - torch.round(low / scale)).clamp(first, last)
    extreme = torch.where(high > -low, high, low)
    # The side with more integers takes the extreme entry: below the middle, where there is such a side.
    scale = extreme / (first - form.middle)
    scale = torch.where(scale.abs() < TINY, torch.full_like(scale, TINY), scale)
    return scale, torch.full_like(scale, form.middle)


def _error(parted: Tensor, scale: Tensor, zero: Tensor, form: Format, counts: Tensor) -> Tensor:
    scale, zero = scale.unsqueeze(2), zero.unsqueeze(2)
    found = ((parted / scale).round_() + zero).clamp_(*form.range)
    return (found.sub_(zero).mul_(scale).sub_(parted).square_() * counts).sum(2)


def _parted(matrix: Tensor, size: int) -> Tensor:
    """``[rows, columns]`` as ``[rows, blocks, size]``, zeros behind the last column."""
    return F.pad(matrix, (0, -matrix.shape[1] % size)).unflatten(1, (-1, size))


def _spread(value: Tensor, size: int, count: int) -> Tensor:
    return value.repeat_interleave(size, 1)[:, :count] if value.shape[1] > 1 else value.expand(-1, count)
