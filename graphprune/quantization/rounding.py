r"""How a weight is rounded, given its scales: each entry by itself, or all together for what they multiply.

With ``H = X'X``, the Gram matrix of what the weight is multiplied with, the error of the result is, for every
row ``e = w - q`` by itself,

    |e X'|^2 = e H e'.

- ``nearest`` minimises ``|e|^2``, as if ``H`` were the identity.
- ``gptq`` (Frantar, Ashkboos, Hoefler and Alistarh, ICLR 2023, algorithm 1) rounds one column after the
  other, for all rows at once, and lets the columns still to come make up for the error: with ``U`` the upper
  Cholesky factor of ``H^-1``, ``H^-1 = U'U``, column ``j`` leaves ``d = (w_j - q_j) / U_jj`` and the
  others become ``w - d U_j``. Columns come in falling order of ``H_jj``, and a hundredth of its mean is
  added to the diagonal.
- ``adaround`` has the objective of Nagel et al. (*Up or Down? Adaptive Rounding for Post-Training
  Quantization*, ICML 2020), with the Gram matrix for the expectation: every entry is rounded up or down,
  nothing else. They relax it and descend by gradients; here it is solved by coordinate descent on the
  integers, from where ``gptq`` ends when it is held to up and down.

A row that comes out worse than its nearest rounding keeps that one, so that no method loses to ``nearest`` on
the Gram matrix it was given.

>>> import torch
>>> from graphprune.quantization.blocks import of_blocks, stored
>>> w = torch.tensor([[0.3, 0.3, 1.0]])
>>> how = of_blocks(w, stored(2), 3)                            # the integers 0 … 3 stand for 1, 0.5, 0, -0.5
>>> x = torch.tensor([[1.0, 1.0, 0.1], [2.0, 2.0, 0.0], [1.0, 0.9, 0.0]])         # two columns say the same
>>> for method in METHODS:
...     integers = rounded(w, how, x.T @ x, method)
...     print(integers.tolist(), f"{error(w, integers, how, x.T @ x):.2f}")
[[1, 1, 0]] 0.42
[[1, 2, 0]] 0.02
[[1, 2, 0]] 0.02
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..inverse_factor import inverse_factor
from .blocks import Blocks, to_integers, to_numbers
from .parameters import Parameters

METHODS = ("nearest", "gptq", "adaround")

SWEEPS = 16  # of coordinate descent, at most
BLOCK = 128  # columns whose errors reach the others together


def rounded(
    matrix: Tensor, how: Parameters | Blocks, gram: Tensor | None = None, method: str = "nearest"
) -> Tensor:
    """A weight as integers.

    Args:
        matrix: ``[rows, columns]``; every row is what one output sums over.
        how: its scales, one for all, one a row or one a block.
        gram: ``[columns, columns]``, ``sum x x'`` or any multiple of it; ``nearest`` does without.
        method: one of :data:`METHODS`.

    Returns:
        ``[rows, columns]`` in the format's dtype.

    Raises:
        InputError: the method is unknown or lacks its Gram matrix, or that is not finite or does not fit.
    """
    blocks = how if isinstance(how, Blocks) else Blocks.of(how, *matrix.shape)
    if method not in METHODS:
        raise InputError(f"rounding must be one of {', '.join(METHODS)}, got {method!r}")
    nearest = to_integers(matrix, blocks)
    if method == "nearest" or not matrix.numel():
        return nearest
    if gram is None:
        raise InputError(f"{method} rounds by the Gram matrix of the inputs; give calibration inputs")
    if gram.shape != (matrix.shape[1], matrix.shape[1]):
        raise InputError(f"a weight {list(matrix.shape)} does not go with a Gram matrix {list(gram.shape)}")
    if not bool(torch.isfinite(gram).all()):
        raise InputError("the Gram matrix of the inputs is not finite")
    task = _Task(matrix, blocks, gram)
    found = task.gptq() if method == "gptq" else task.descended(task.gptq(up_or_down=True))
    errors = [_errors(matrix, q, blocks, gram) for q in (found.to(nearest.dtype), nearest)]
    return torch.where((errors[0] <= errors[1]).unsqueeze(1), found.to(nearest.dtype), nearest)


def error(matrix: Tensor, integers: Tensor, how: Parameters | Blocks, gram: Tensor) -> float:
    """The squared error of what the weight is multiplied to, relative to the square of that."""
    blocks = how if isinstance(how, Blocks) else Blocks.of(how, *matrix.shape)
    whole = matrix.detach().double()
    signal = float(((whole @ gram.double()) * whole).sum())
    left = float(_errors(matrix, integers, blocks, gram).sum())
    return left / signal if signal > 0 else 0.0


def _errors(matrix: Tensor, integers: Tensor, how: Blocks, gram: Tensor) -> Tensor:
    """``e H e'`` of every row, ``[rows]``."""
    left = matrix.detach().double() - to_numbers(integers, how).double()
    return ((left @ gram.double()) * left).sum(1)


class _Task:
    """One weight, in float64 and transposed: the entries of a column are neighbours in memory."""

    def __init__(self, matrix: Tensor, how: Blocks, gram: Tensor):
        scale, zero = how.columns(matrix.shape[1])
        self._weight = matrix.detach().double().T.contiguous()  # [columns, rows]
        self._scale, self._zero = (v.double().T.contiguous() for v in (scale, zero))
        self._first, self._last = how.format.range
        self._gram = gram.double()

    def gptq(self, up_or_down: bool = False) -> Tensor:
        """Integers ``[rows, columns]``; with ``up_or_down`` next to the weight as it was."""
        order = self._gram.diagonal().argsort(descending=True, stable=True)
        left, scale, zero = self._weight[order], self._scale[order], self._zero[order]
        low, high = self._bounds(up_or_down)
        low, high = low[order], high[order]
        factor = inverse_factor(self._gram[order][:, order])
        found = torch.empty_like(left)
        for start in range(0, len(left), BLOCK):
            end = min(start + BLOCK, len(left))
            errors = torch.empty_like(left[start:end])
            for j in range(start, end):
                integer = torch.round(left[j] / scale[j]).add_(zero[j])
                integer = torch.minimum(torch.maximum(integer, low[j]), high[j])
                found[j] = integer
                off = (left[j] - (integer - zero[j]) * scale[j]) / factor[j, j]
                errors[j - start] = off
                left[j + 1 : end].addr_(factor[j, j + 1 : end], off, alpha=-1)
            left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
        result = torch.empty_like(found)
        result[order] = found
        return result.T

    def descended(self, start: Tensor) -> Tensor:
        """Coordinate descent among up and down, until nothing changes or :data:`SWEEPS` are over."""
        low, high = self._bounds(up_or_down=True)
        found = start.T.contiguous()
        slope = self._gram @ (self._weight - (found - self._zero) * self._scale)  # [columns, rows]
        diagonal = self._gram.diagonal()
        for _ in range(SWEEPS):
            changed = False
            for begin in range(0, len(found), BLOCK):
                end = min(begin + BLOCK, len(found))
                moves = torch.zeros_like(found[begin:end])
                for j in range(begin, end):
                    if diagonal[j] <= 0:
                        continue
                    step = torch.round(slope[j] / (diagonal[j] * self._scale[j]))
                    integer = torch.minimum(torch.maximum(found[j] + step, low[j]), high[j])
                    move = (integer - found[j]) * self._scale[j]
                    if not bool(move.count_nonzero()):
                        continue
                    changed = True
                    found[j], moves[j - begin] = integer, move
                    slope[begin:end].addr_(self._gram[begin:end, j], move, alpha=-1)
                slope[:begin].addmm_(self._gram[:begin, begin:end], moves, alpha=-1)
                slope[end:].addmm_(self._gram[end:, begin:end], moves, alpha=-1)
            if not changed:
                break
        return found.T

    def _bounds(self, up_or_down: bool) -> tuple[Tensor, Tensor]:
        """The integers that each entry may become, ``[columns, rows]``."""
        if not up_or_down:
            return torch.full_like(self._weight, self._first), torch.full_like(self._weight, self._last)
        exact = self._weight / self._scale + self._zero
        return exact.floor().clamp(self._first, self._last), exact.ceil().clamp(self._first, self._last)
