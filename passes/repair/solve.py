r"""Least squares towards known weights, from sums that do not grow with the number of samples.

A linear operator ``y = x W + b`` is to give ``t``. With ``r = t - (x W0 + b0)``, what the weights at hand
leave over, the change ``D`` of the weights and ``c`` of the bias minimise

    sum |r - x D - c|^2 + n lambda |D|^2,        lambda = ridge * mean variance of x,

a ridge regression (Hoerl and Kennard, 1970) that shrinks towards ``W0`` instead of towards zero. With
means taken off (``c`` is not penalised) this is

    (Sxx + n lambda I) D = Sxr,        c = mean(r) - mean(x) D.

Only ``sum x'x``, ``sum x'r``, ``sum x``, ``sum r`` and ``sum r^2`` are kept, in float64. Products of
float32 rows are made in float32, a chunk at a time, which is twice as fast; so that no large mean eats up
their digits, all is counted from the means of the first chunk. Without an intercept the moments are those
around zero. Where the matrix is singular, of all the solutions the smallest change is taken, by its
eigenvectors.

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

# Of the symmetric matrix of moments, only the blocks on and above the diagonal are summed.
BLOCK = 1024

# What is tried where the samples themselves decide; half as many for matrices wider than WIDE.
RIDGES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
WIDE = 2048
RIDGE = 1e-2  # where too few samples are there to hold some back

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
    _from_x: torch.Tensor = field(default=None, repr=False)  # type: ignore[assignment]
    _from_r: torch.Tensor = field(default=None, repr=False)  # type: ignore[assignment]
    _xx: torch.Tensor = field(default=None, repr=False)  # type: ignore[assignment]
    _xr: torch.Tensor = field(default=None, repr=False)  # type: ignore[assignment]
    _x: torch.Tensor = field(default=None, repr=False)  # type: ignore[assignment]
    _r: torch.Tensor = field(default=None, repr=False)  # type: ignore[assignment]

    def add(self, x: torch.Tensor, r: torch.Tensor, target: torch.Tensor, like: Gram | None = None) -> None:
        """Take samples in.

        Args:
            x: ``[groups, rows, columns]``, what the operator reads.
            r: ``[groups, rows, outputs]``, what its weights leave over.
            target: any shape, the values the operator is to give, for the relative error.
            like: count from the same means as this one, if it has begun, so that both can be merged.
        """
        if x.dtype not in (torch.float32, torch.float64) or r.dtype != x.dtype:
            x, r = x.double(), r.double()
        if self._xx is None:
            self._begin(x, r)
            if like is not None and like._xx is not None:
                self._from_x, self._from_r = like._from_x, like._from_r
        self.rows += x.shape[1]
        self.residual += float(r.double().square().sum())
        self.signal += float(target.square().sum(dtype=torch.float64))
        x, r = x - self._from_x.unsqueeze(1).to(x.dtype), r - self._from_r.unsqueeze(1).to(r.dtype)
        self._xr += x.mT @ r
        self._x += x.sum(1, dtype=torch.float64)
        self._r += r.sum(1, dtype=torch.float64)
        for start in range(0, x.shape[2], BLOCK):
            rows = slice(start, start + BLOCK)
            left = x[:, :, rows].mT
            for behind in range(start, x.shape[2], BLOCK):
                columns = slice(behind, behind + BLOCK)
                self._xx[:, rows, columns] += left @ x[:, :, columns]

    def merged(self, other: Gram) -> Gram:
        """Both as one; the other was counted from this one's means, or is empty."""
        if not other.rows:
            return self
        names = ("rows", "residual", "signal", "_xx", "_xr", "_x", "_r")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Gram(_from_x=self._from_x, _from_r=self._from_r, **sums)

    def chosen_ridge(self, held: Gram, intercept: bool) -> float:
        """Of :data:`RIDGES` the one that, fitted to these samples, leaves least of those held back."""
        if not held.rows:
            return RIDGE
        candidates = RIDGES if self._xx.shape[1] <= WIDE else RIDGES[1::2]
        left = [held.left(*self.solve(ridge, intercept)) for ridge in candidates]
        return candidates[min(range(len(left)), key=left.__getitem__)]

    def _begin(self, x: torch.Tensor, r: torch.Tensor) -> None:
        groups, _, columns = x.shape
        self._xx = x.new_zeros(groups, columns, columns, dtype=torch.float64)
        self._xr = x.new_zeros(groups, columns, r.shape[-1], dtype=torch.float64)
        self._x = x.new_zeros(groups, columns, dtype=torch.float64)
        self._r = r.new_zeros(groups, r.shape[-1], dtype=torch.float64)
        # Rounded to what is taken off, so that adding it back later is exact.
        self._from_x, self._from_r = (v.mean(1).nan_to_num(0.0, 0.0, 0.0).double() for v in (x, r))

    @property
    def finite(self) -> bool:
        """Whether nothing infinite or NaN was added."""
        return bool(torch.isfinite(self._xx).all() and torch.isfinite(self._xr).all())

    def solve(self, ridge: float, intercept: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The changes ``D [groups, columns, outputs]`` and ``c [groups, outputs]`` (no intercept: zero)."""
        n = self.rows
        xx, xr, x, r = self._moments(intercept)
        penalty = ridge * xx.diagonal(dim1=1, dim2=2).mean(1)
        xx.diagonal(dim1=1, dim2=2).add_(penalty.unsqueeze(1))
        change = _solve(xx, xr)
        if not intercept:
            return change, torch.zeros_like(r)
        return change, (r - (x.unsqueeze(1) @ change).squeeze(1)) / n

    def _moments(self, centred: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """``sum x'x``, ``sum x'r``, around the means or zero, and ``sum x``, ``sum r`` around zero."""
        n, (x, r) = self.rows, (self._x, self._r)
        xx = self._xx.triu()
        xx += xx.triu(1).mT
        if centred:
            xx.baddbmm_(x.unsqueeze(2), x.unsqueeze(1), alpha=-1 / n)
            xr = self._xr - x.unsqueeze(2) * r.unsqueeze(1) / n
        else:
            a, b = self._from_x, self._from_r
            cross = a.unsqueeze(2) * (x + n * a / 2).unsqueeze(1)
            xx += cross
            xx += cross.mT
            xr = self._xr + a.unsqueeze(2) * r.unsqueeze(1) + (x + n * a).unsqueeze(2) * b.unsqueeze(1)
        return xx, xr, x + n * self._from_x, r + n * self._from_r

    def left(self, change: torch.Tensor, shift: torch.Tensor) -> float:
        """Sum over everything of ``(r - x D - c)**2``, which is what a change of the weights leaves over."""
        xx, xr, x, r = self._moments(centred=False)
        fitted = (change * (xx @ change)).sum() + self.rows * shift.square().sum()
        cross = (change * xr).sum() + (shift * r).sum()
        cross = cross - (shift * (x.unsqueeze(1) @ change).squeeze(1)).sum()
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
