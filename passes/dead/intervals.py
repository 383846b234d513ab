"""Interval arithmetic on tensors: between what bounds each element of a value lies, whatever the input.

Bounds are float64 and broadcast against the value they belong to. ``[c, c]`` is a constant, ``[-inf, inf]``
is nothing known. Sums and products follow Moore, *Interval Analysis* (1966): the result holds every value
that operands inside their bounds can give; ``0 · inf`` is 0, because values themselves are finite.

>>> import torch
>>> x = Interval(torch.tensor([0.0, -1.0]), torch.tensor([6.0, 1.0]))
>>> (x * Interval.of(torch.tensor([-2.0, 1.0]))).lo.tolist()
[-12.0, -1.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Interval:
    """Elements between ``lo`` and ``hi``, both float64 and of one shape."""

    lo: torch.Tensor
    hi: torch.Tensor

    @staticmethod
    def of(value: torch.Tensor) -> Interval:
        """A value that is known."""
        wide = value.detach().to("cpu", torch.float64)
        return Interval(wide, wide)

    @staticmethod
    def unknown(rank: int) -> Interval:
        """Nothing known about a value with ``rank`` dimensions."""
        return Interval.between(-math.inf, math.inf, rank)

    @staticmethod
    def between(lo: float, hi: float, rank: int) -> Interval:
        """One pair of bounds for every element."""
        shape = (1,) * rank
        return Interval(
            torch.full(shape, lo, dtype=torch.float64), torch.full(shape, hi, dtype=torch.float64)
        )

    @property
    def constant(self) -> torch.Tensor:
        """Where the value is one known number."""
        return (self.lo == self.hi) & self.lo.isfinite()

    @property
    def zero(self) -> torch.Tensor:
        """Where the value is 0."""
        return (self.lo == 0) & (self.hi == 0)

    @property
    def shape(self) -> torch.Size:
        """The shape of the bounds."""
        return self.lo.shape

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Interval:
        """The image under a function that never decreases (or only moves elements)."""
        lo, hi = (_number(function(bound)) for bound in (self.lo, self.hi))
        return Interval(lo, hi)

    def __add__(self, other: Interval) -> Interval:
        return Interval(_number(self.lo + other.lo, -math.inf), _number(self.hi + other.hi, math.inf))

    def __neg__(self) -> Interval:
        return Interval(-self.hi, -self.lo)

    def __sub__(self, other: Interval) -> Interval:
        return self + -other

    def __mul__(self, other: Interval) -> Interval:
        corners = [_number(a * b) for a in (self.lo, self.hi) for b in (other.lo, other.hi)]
        return Interval(_fold(torch.minimum, corners), _fold(torch.maximum, corners))

    def reciprocal(self) -> Interval:
        """``1 / x``; nothing known where ``x`` may be 0."""
        sure = (self.lo > 0) | (self.hi < 0)
        return Interval(torch.where(sure, 1 / self.hi, -math.inf), torch.where(sure, 1 / self.lo, math.inf))

    def hull(self, other: Interval) -> Interval:
        """The smallest interval around both."""
        return Interval(torch.minimum(self.lo, other.lo), torch.maximum(self.hi, other.hi))

    def with_number(self, number: float) -> Interval:
        """The smallest interval around this one and a number."""
        return Interval(self.lo.clamp(max=number), self.hi.clamp(min=number))

    def over(self, dims: Sequence[int]) -> Interval:
        """The smallest interval around all elements along ``dims``, which shrink to size 1."""
        wide = [d for d in dims if self.lo.shape[d] != 1]
        if not wide:
            return self
        return Interval(self.lo.amin(wide, keepdim=True), self.hi.amax(wide, keepdim=True))


def _number(value: torch.Tensor, instead: float = 0.0) -> torch.Tensor:
    return torch.where(value.isnan(), instead, value)


def _fold(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], values: list[torch.Tensor]
) -> torch.Tensor:
    result = values[0]
    for value in values[1:]:
        result = function(result, value)
    return result
