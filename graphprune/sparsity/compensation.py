r"""What the entries that stay make up for, by the Gram matrix of what the weight is multiplied with.

For every row the error of the result is ``e H e'``, ``e`` the change of the row. Columns are settled one
after the other (Frantar and Alistarh, *SparseGPT*, ICML 2023, algorithm 1): an entry that goes leaves ``d =
w_j / U_jj`` with ``H^-1 = U'U``, and the columns behind become ``w - d U_j``. An entry is worth keeping by
``w_j^2 / U_jj^2``, what its loss would cost; patterns that count within groups of columns choose when the
first of a group is reached, so that what was made up for so far is seen. At the end the entries that stay
are solved for once more, with the others at zero, where the weight is small enough for that: for a set
``S`` of kept columns, ``w_S = (H w)_S H_SS^-1``, which is the best there is for that mask.

>>> import torch
>>> from graphprune.sparsity.patterns import NofM
>>> x = torch.tensor([[1.0, 1.0, 0.0, 0.1], [2.0, 2.0, 1.0, 0.0], [0.5, 0.5, 3.0, 0.2]])
>>> w = torch.tensor([[1.0, 0.9, 0.5, 0.1]])                         # the first two columns say the same
>>> found, mask = compensated(w, NofM(2, 4), x.T @ x)
>>> mask.tolist(), [round(v, 1) for v in found[0].tolist()]
([[False, True, True, False]], [0.0, 1.9, 0.5, 0.0])
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..inverse_factor import inverse_factor
from .patterns import Anywhere, Blocks, NofM, Pattern, mask_among

BLOCK = 128  # columns whose errors reach the others together, and among which "anywhere" chooses
SOLVED = 2 << 30  # rows times columns cubed, up to which the kept entries are solved for


def compensated(
    matrix: Tensor, pattern: Pattern | Tensor, gram: Tensor, there: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A sparse weight and its mask.

    Args:
        matrix: ``[rows, columns]``; every row is what one output sums over.
        pattern: what may be zero; or the mask itself, where it was chosen already.
        gram: ``[columns, columns]``, ``sum x x'`` or any multiple of it.
        there: ``[rows, columns]``, ``False`` where an entry went before: it makes up for nothing.

    Returns:
        The weight in the matrix's dtype, zero where the mask is ``False``. A row that comes out worse than
        with its entries just set to zero keeps those.

    Raises:
        InputError: the Gram matrix is not finite or does not fit.
    """
    if gram.shape != (matrix.shape[1], matrix.shape[1]):
        raise InputError(f"a weight {list(matrix.shape)} does not go with a Gram matrix {list(gram.shape)}")
    if not bool(torch.isfinite(gram).all()):
        raise InputError("the Gram matrix of the inputs is not finite")
    weight, h = matrix.detach().double(), gram.double()
    there = torch.ones_like(weight, dtype=torch.bool) if there is None else there
    found, mask = _swept(weight, pattern, h, there)
    if weight.shape[0] * weight.shape[1] ** 3 <= SOLVED:
        found = _solved(weight, mask, h)
    plain = weight * mask
    worse = error(weight, found, h) > error(weight, plain, h)
    return torch.where(worse.unsqueeze(1), plain, found).to(matrix.dtype), mask


def worths(matrix: Tensor, factor: Tensor) -> Tensor:
    """What the loss of each entry would cost, given the inverse Gram matrix's factor: ``w_j^2 / U_jj^2``."""
    return (matrix.double() / factor.diagonal()).square()


def error(matrix: Tensor, found: Tensor, gram: Tensor) -> Tensor:
    """``e H e'`` of every row, ``[rows]``."""
    left = matrix.double() - found.double()
    return ((left @ gram.double()) * left).sum(1)


def _swept(weight: Tensor, pattern: Pattern | Tensor, gram: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """One sweep over the columns; the mask is chosen on the way where there is none."""
    factor = inverse_factor(gram)
    left = weight.clone()
    given = pattern & there if isinstance(pattern, Tensor) else None
    if isinstance(pattern, Blocks):  # a block spans what is chosen from at a time
        given = mask_among(pattern, worths(weight, factor), there)
    mask = torch.ones_like(weight, dtype=torch.bool) if given is None else given
    columns = weight.shape[1]
    step = pattern.m * (BLOCK // pattern.m or 1) if isinstance(pattern, NofM) else BLOCK
    for start in range(0, columns, step):
        end = min(start + step, columns)
        if given is None:
            assert not isinstance(pattern, Tensor)
            worth = (left[:, start:end] / factor.diagonal()[start:end]).square()
            own = there[:, start:end]
            if isinstance(pattern, Anywhere):  # so many in all, whatever rounding the blocks before had
                wanted = round(pattern.sparsity * mask[:, :end].numel()) - int((~mask[:, :start]).sum())
                mask[:, start:end] = mask_among(Anywhere(max(wanted, 0) / worth.numel()), worth, own)
            else:
                mask[:, start:end] = mask_among(pattern, worth, own)
        errors = torch.zeros_like(left[:, start:end])
        for j in range(start, end):
            off = torch.where(mask[:, j], 0.0, left[:, j]) / factor[j, j]
            errors[:, j - start] = off
            left[:, j:end] -= off[:, None] * factor[None, j, j:end]
        left[:, end:] -= errors @ factor[start:end, end:]
    return left * mask, mask


def _solved(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """The least error that a mask allows, row by row; rows with one mask share a factorisation."""
    damped = gram + 1e-8 * gram.diagonal().mean().clamp(min=1e-300) * torch.eye(len(gram), dtype=gram.dtype)
    wanted = weight @ damped
    found = torch.zeros_like(weight)
    for row, keep in enumerate(mask):
        if bool(keep.any()):
            own = damped[keep][:, keep]
            found[row, keep] = torch.linalg.lstsq(own, wanted[row, keep, None]).solution[:, 0]
    return found
