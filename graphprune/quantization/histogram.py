"""Histograms of streams of numbers in constant memory, for ranges that are not known beforehand.

The bins are the bfloat16 numbers: a float32 belongs to the one that its upper 16 bits spell, and that is
found by a shift. A bin is at most 1/128 of its magnitude wide, so one outlier a million times as large as
the rest costs no resolution, one pass over the numbers is enough, and histograms of parts add up exactly,
whatever the order. 65536 counts are 512 KiB. Zero has a bin for itself.

>>> import torch
>>> histogram = Histogram()
>>> _ = histogram.add(torch.arange(10_000.0)), histogram.add(torch.tensor([-5.0]))
>>> histogram.total, round(histogram.quantile(0.5) / 5000, 2)
(10001, 1.0)
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

_CODES = 1 << 16
_NORMAL = 0x0080  # the upper 16 bits of the smallest normal number, 2^-126


def _flushed(value: float) -> float:
    return 0.0 if abs(value) < 2.0**-126 else value


class Histogram:
    """Counts of numbers by their upper 16 bits, and the smallest and largest one.

    Attributes:
        low: the smallest number seen, ``inf`` before any.
        high: the largest, ``-inf`` before any.
        total: how many were seen.
    """

    def __init__(self) -> None:
        self.low, self.high, self.total = float("inf"), float("-inf"), 0
        self._counts = torch.zeros(_CODES, dtype=torch.int64)

    def add(self, values: Tensor) -> tuple[float, float]:
        """Count a tensor's numbers; returns its own smallest and largest.

        Raises:
            InputError: one is NaN or infinite, in float32.
        """
        flat = values.detach().to(torch.float32).flatten()
        low, high = (_flushed(float(v)) for v in torch.aminmax(flat))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise InputError("holds values that are not finite")
        codes = (flat.view(torch.int32) >> 16).bitwise_and_(_CODES - 1)
        self._counts += torch.bincount(codes, minlength=_CODES).cpu()
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.total += flat.numel()
        return low, high

    @staticmethod
    def sum(histograms: Iterable[Histogram]) -> Histogram:
        """The histogram of all that these have seen."""
        result = Histogram()
        for other in histograms:
            result._counts = result._counts + other._counts
            result.low, result.high = min(result.low, other.low), max(result.high, other.high)
            result.total += other.total
        return result

    def bins(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lower edges, upper edges and counts of the bins that hold something, float64, in ascending order.

        Edges lie within ``low`` and ``high``; a bin of a single number has no width.
        """
        counts = self._counts.numpy()
        codes = np.flatnonzero(counts)
        magnitude = (codes & 0x7FFF).astype(np.uint32)
        near = (magnitude << 16).view(np.float32).astype(np.float64)
        far = ((magnitude + 1) << 16).view(np.float32).astype(np.float64)
        # What lies below the smallest normal number counts as zero, whether or not the processor flushes it.
        zero = magnitude < _NORMAL
        near[zero] = far[zero] = 0.0
        negative = codes >= _CODES // 2
        lower, upper = np.where(negative, -far, near), np.where(negative, -near, far)
        order = np.argsort(lower, kind="stable")
        clip = (self.low, self.high)
        return lower[order].clip(*clip), upper[order].clip(*clip), counts[codes][order]

    def quantile(self, share: float) -> float:
        """The number that ``share`` (0 to 1) of all numbers do not exceed; uniform inside a bin."""
        lower, upper, counts = self.bins()
        return _quantile(lower, upper, counts, share)

    def magnitude(self, share: float) -> float:
        """The same of the magnitudes of all numbers but zero; 0 if there are none."""
        lower, upper, counts = magnitudes(*self.bins())
        inside = upper > 0
        return _quantile(lower[inside], upper[inside], counts[inside], share) if inside.any() else 0.0


def magnitudes(
    lower: np.ndarray, upper: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bins of numbers as bins of their magnitudes, in ascending order; none of them straddles zero."""
    negative = lower < 0
    near, far = np.where(negative, -upper, lower), np.where(negative, -lower, upper)
    order = np.lexsort((far, near))
    return near[order], far[order], counts[order]


def _quantile(lower: np.ndarray, upper: np.ndarray, counts: np.ndarray, share: float) -> float:
    reached = np.cumsum(counts)
    wanted = share * reached[-1]
    place = int(np.searchsorted(reached, wanted))
    inside = (wanted - (reached[place] - counts[place])) / counts[place]
    return float(lower[place] + inside * (upper[place] - lower[place]))
