"""Where to cut a range off, so that the numbers inside get finer steps: by squared error and by entropy.

*Squared error.* A bin ``[a, b]`` of a histogram with density ``1/(b-a)`` has the expected error

    s² (G(b/s) - G(a/s)) / (b/s - a/s),    G(u) = r/12 + (u - r)³/3,    r = clamp(round(u), first, last)

where ``G`` is the integral of ``(u - r)²`` from 0: it counts rounding and clipping alike, whether the
bin is wider or narrower than a step. ``first`` and ``last`` are the integers less the zero point, which is
rounded just as :func:`~graphprune.quantization.parameters.of_range` does.

*Entropy.* The range whose quantized distribution Q diverges least from the distribution P with all that
is cut off put on its border: the smallest ``KL(P ‖ Q)`` (Migacz, *8-bit Inference with TensorRT*, GTC 2017).
Symmetric formats look at magnitudes with half their integers (128 at eight bits); asymmetric ones choose one
end of the range after the other, with all of them. Exact zeros are left out: every range holds them exactly.
"""

from __future__ import annotations

import math

import numpy as np

from ..integers import Format
from .histogram import Histogram, magnitudes

Bins = tuple[np.ndarray, np.ndarray, np.ndarray]

FINE = 2048
"""Bins of equal width that divergences are computed over."""
_STRIDE = 8
# Candidates for an end of the range: four to an octave down to 2^-16 of it, then closely around the best.
_SHRINK = 2.0 ** -np.arange(0, 16, 1 / 4)
_NEAR = np.linspace(0.82, 1.18, 37)  # the middle one is 1
_RESOLUTION = 2.0**-12
_ROUNDS = 8


# ---- squared error ---------------------------------------------------------------------------------


def squared_error(bins: Bins, low: np.ndarray, high: np.ndarray, form: Format) -> np.ndarray:
    """The expected squared error of the numbers in a histogram, summed, for every range ``[candidates]``."""
    lower, upper, counts = bins
    first, last = form.range
    if form.symmetric:
        scale = np.maximum(-low, high) / (last - form.middle)
        zero = np.full_like(scale, form.middle)
    else:
        scale = (high - low) / (last - first)
        zero = np.clip(np.rint(first - low / scale), first, last)
    step, first_, last_ = scale[:, None], (first - zero)[:, None], (last - zero)[:, None]
    a, b = lower / step, upper / step
    width = b - a
    point = np.clip(np.rint(a), first_, last_)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = (_integral(b, first_, last_) - _integral(a, first_, last_)) / width
    error = np.where(width > 1e-9, spread, (a - point) ** 2)
    return np.asarray((error * counts).sum(1) * scale**2)


def _integral(u: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    nearest = np.rint(u)
    np.maximum(nearest, first, out=nearest)
    np.minimum(nearest, last, out=nearest)
    off = u - nearest
    return np.asarray(nearest / 12 + off * off * off / 3)  # a power would take ten times as long


def least_squared_error(histogram: Histogram, form: Format) -> tuple[float, float]:
    """The range with the smallest expected squared error, within what was seen and zero.

    Both ends first shrink together, then one after the other and both around where they are, until neither
    moves.
    """
    bins = histogram.bins()
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if low == high:
        return low, high
    limit = max(-low, high)
    thresholds = np.concatenate([limit * _SHRINK, -low * _SHRINK, high * _SHRINK])
    thresholds = thresholds[thresholds > 0]
    lows = np.concatenate([np.maximum(low, -thresholds), low * _SHRINK])
    highs = np.concatenate([np.minimum(high, thresholds), high * _SHRINK])
    if low < 0 < high and not form.symmetric:
        coarse = _SHRINK[:16:2]
        grids = np.meshgrid(low * coarse, high * coarse)
        lows, highs = np.r_[lows, grids[0].ravel()], np.r_[highs, grids[1].ravel()]
    best = _best(_joined(bins, limit), lows, highs, form)
    for _ in range(_ROUNDS):
        before = best
        near = _joined(bins, max(-best[0], best[1]))
        if form.symmetric:
            reach = max(-best[0], best[1]) * _NEAR
            return _best(near, np.maximum(low, -reach), np.minimum(high, reach), form)
        if high > 0:
            ends = np.concatenate([[best[1]], high * _SHRINK, np.minimum(best[1] * _NEAR, high)])
            best = _best(near, np.full_like(ends, best[0]), ends, form)
        if low < 0:
            ends = np.concatenate([[best[0]], low * _SHRINK, np.maximum(best[0] * _NEAR, low)])
            best = _best(near, ends, np.full_like(ends, best[1]), form)
        if low < 0 < high:
            lows, highs = np.maximum(best[0] * _NEAR[::3], low), np.minimum(best[1] * _NEAR[::3], high)
            grids = np.meshgrid(lows, highs)
            best = _best(near, grids[0].ravel(), grids[1].ravel(), form)
        if best == before:
            break
    return best


def _joined(bins: Bins, limit: float) -> Bins:
    """Neighbouring bins as one as long as they are narrow for a range of this size; zero stays alone."""
    lower, upper, counts = bins
    key = np.floor((lower + upper) / 2 / (limit * _RESOLUTION))
    zero = (lower == 0) & (upper == 0)
    starts = np.flatnonzero(np.r_[True, (key[1:] != key[:-1]) | zero[1:] | zero[:-1]])
    ends = np.r_[starts[1:], len(key)] - 1
    return lower[starts], upper[ends], np.add.reduceat(counts, starts)


def _best(bins: Bins, low: np.ndarray, high: np.ndarray, form: Format) -> tuple[float, float]:
    place = int(np.argmin(squared_error(bins, low, high, form)))
    return float(low[place]), float(high[place])


# ---- entropy ---------------------------------------------------------------------------------------


def least_divergence(histogram: Histogram, form: Format) -> tuple[float, float]:
    """The range with the smallest divergence, within what was seen and zero."""
    bins = histogram.bins()
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if low == high:
        return low, high
    first, last = form.range
    if form.symmetric:
        limit = _upper_end(magnitudes(*bins), 0.0, max(-low, high), last - form.middle + 1)
        return max(low, -limit), min(high, limit)
    levels = last - first + 1
    if high > 0:
        high = _upper_end(bins, low, high, levels)
    if low < 0:
        lower, upper, counts = bins
        mirrored = (-upper[::-1], -lower[::-1], counts[::-1])
        low = -_upper_end(mirrored, -high, -low, levels)
    return low, high


def _upper_end(bins: Bins, low: float, high: float, levels: int) -> float:
    """The best upper end of a range with a fixed lower one, between zero and ``high``."""
    for _ in range(_ROUNDS):
        fine = _even(bins, low, high)
        step = (high - low) / FINE
        smallest = max(levels, math.ceil(-low / step) + 1)
        ends = np.arange(FINE, min(smallest, FINE) - 1, -_STRIDE)
        best = int(ends[np.argmin([divergence(fine, int(end), levels) for end in ends])])
        # The best at the rim of the search: an outlier makes the bins too coarse, look again inside.
        if best != ends[-1] or smallest > levels:
            return high if best == FINE else low + best * step
        high = low + best * step
    return high


def _even(bins: Bins, low: float, high: float) -> np.ndarray:
    """Counts in :data:`FINE` bins of equal width, what lies outside in the outermost; no exact zeros."""
    lower, upper, counts = bins
    kept = (lower != 0) | (upper != 0)
    lower, upper, counts = lower[kept], upper[kept], counts[kept].astype(np.float64)
    edges = np.linspace(low, high, FINE + 1)
    edges[0], edges[-1] = -np.inf, np.inf
    wide = upper > lower
    known = np.stack([lower[wide], upper[wide]], 1).ravel()
    reached = np.cumsum(counts[wide])
    reached = np.stack([reached - counts[wide], reached], 1).ravel()
    fine = np.diff(np.interp(edges, known, reached)) if len(known) else np.zeros(FINE)
    return fine + np.histogram(lower[~wide], edges, weights=counts[~wide])[0]


def divergence(fine: np.ndarray, end: int, levels: int) -> float:
    """``KL(P ‖ Q)`` of the first ``end`` bins in ``levels`` groups, all that follows put on the last bin."""
    inside = fine[:end]
    full = inside > 0
    clipped = inside.copy()
    clipped[-1] += fine[end:].sum()
    if not clipped.sum() or not inside.sum():
        return float("inf")
    group = np.arange(end) * levels // end
    mass = np.bincount(group, inside, levels)
    share = np.bincount(group, full, levels)
    spread = np.where(full, mass[group] / np.maximum(share[group], 1), 0.0)
    p, q = clipped / clipped.sum(), spread / spread.sum()
    present = p > 0
    return float((p[present] * np.log(p[present] / np.maximum(q[present], 1e-12))).sum())
