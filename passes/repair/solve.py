r"""Least squares towards known weights, from sums that do not grow with the number of samples.

A linear operator ``y = x W + b`` is to give ``t``. With ``r = t - (x W0 + b0)``, what the weights at hand
leave over, the change ``D`` of the weights and ``c`` of the bias minimise

    sum |r - x D - c|^2 + n lambda |D|^2,        lambda = ridge * mean variance of x,

a ridge regression (Hoerl and Kennard, 1970) that shrinks towards ``W0`` instead of towards zero. With
means taken off (``c`` is not penalised) this is

    (Sxx + n lambda I) D = Sxr,        c = mean(r) - mean(x) D.

Only ``sum x'x``, ``sum x'r``, ``sum x``, ``sum r`` and ``sum r^2`` are kept, in float64. Without an
intercept the moments are taken around zero. Where the matrix is singular, of all the solutions the
smallest change is taken, by its eigenvectors.

>>> gram = Gram()
>>> x = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]])       # [groups, rows, columns]
>>> gram.add(x, x.sum(-1, keepdim=True) + 3, x)
>>> change, shift = gram.solve(ridge=0.0, intercept=True)
>>> change.flatten().round(decimals=6).tolist(), shift.flatten().round(decimals=6).tolist()
([1.0, 1.0], [3.0])
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

# Eigenvalues below this share of the largest are rounding, not data; also what a Cholesky factor may span.
RANK = 1e-13


@dataclass
class Gram:
    """The sums of ``groups`` independent regressions of ``outputs`` on ``columns`` each.

    Attributes:
        rows: samples added so far.
        residual: sum over everything of ``r**2``.
        signal: sum over everything of ``t**2``.
    """

    rows: int = 0
    residual: float = 0.0
    signal: float = 0.0
    _xx: torch.Tensor = field(default=None, repr=False)  # type: ignore[assignment]
    _xr: torch.Tensor = field(default=None, repr=False)  # type: ignore[assignment]
    _x: torch.Tensor = field(default=None, repr=False)  # type: ignore[assignment]
    _r: torch.Tensor = field(default=None, repr=False)  # type: ignore[assignment]

    def add(self, x: torch.Tensor, r: torch.Tensor, target: torch.Tensor) -> None:
        """Take samples in.

        Args:
            x: ``[groups, rows, columns]``, what the operator reads.
            r: ``[groups, rows, outputs]``, what its weights leave over.
            target: any shape, the values the operator is to give, for the relative error.
        """
        x, r, target = x.double(), r.double(), target.double()
        if self._xx is None:
            groups, _, columns = x.shape
            self._xx = x.new_zeros(groups, columns, columns)
            self._xr = x.new_zeros(groups, columns, r.shape[-1])
            self._x, self._r = x.new_zeros(groups, columns), x.new_zeros(groups, r.shape[-1])
        self._xx.baddbmm_(x.mT, x)
        self._xr.baddbmm_(x.mT, r)
        self._x += x.sum(1)
        self._r += r.sum(1)
        self.rows += x.shape[1]
        self.residual += float(r.square().sum())
        self.signal += float(target.square().sum())

    @property
    def finite(self) -> bool:
        """Whether nothing infinite or NaN was added."""
        return bool(torch.isfinite(self._xx).all() and torch.isfinite(self._xr).all())

    def solve(self, ridge: float, intercept: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The changes ``D [groups, columns, outputs]`` and ``c [groups, outputs]`` (no intercept: zero)."""
        n = self.rows
        mean_x, mean_r = self._x / n, self._r / n
        xx, xr = self._xx, self._xr
        if intercept:
            xx = xx - n * mean_x.unsqueeze(2) * mean_x.unsqueeze(1)
            xr = xr - n * mean_x.unsqueeze(2) * mean_r.unsqueeze(1)
        penalty = ridge * xx.diagonal(dim1=1, dim2=2).mean(1)
        change = _solve(xx + torch.diag_embed(penalty.unsqueeze(1).expand(xx.shape[:2])), xr)
        if not intercept:
            return change, torch.zeros_like(mean_r)
        return change, mean_r - (mean_x.unsqueeze(1) @ change).squeeze(1)

    def left(self, change: torch.Tensor, shift: torch.Tensor) -> float:
        """Sum over everything of ``(r - x D - c)**2``, which is what a change of the weights leaves over."""
        fitted = (change * (self._xx @ change)).sum() + self.rows * shift.square().sum()
        cross = (change * self._xr).sum() + (shift * self._r).sum()
        cross = cross - (shift * (self._x.unsqueeze(1) @ change).squeeze(1)).sum()
        return max(0.0, self.residual + float(fitted - 2 * cross))


def _solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``matrix`` ``[g, d, d]``, symmetric and positive semi-definite, into ``right`` ``[g, d, m]``."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    sound = (info == 0) & (pivots.amin(1) > RANK * matrix.shape[1] * pivots.amax(1))
    if bool(sound.all()):
        return torch.cholesky_solve(right, factor)
    solution = torch.empty_like(right)
    if bool(sound.any()):
        solution[sound] = torch.cholesky_solve(right[sound], factor[sound])
    values, vectors = torch.linalg.eigh(matrix[~sound])
    kept = values > RANK * matrix.shape[1] * values.amax(1, keepdim=True).clamp_min(0)
    inverse = torch.where(kept, 1 / values.where(kept, torch.ones_like(values)), torch.zeros_like(values))
    solution[~sound] = vectors @ (inverse.unsqueeze(2) * (vectors.mT @ right[~sound]))
    return solution
