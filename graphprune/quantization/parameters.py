"""Scales and zero points, and the way from numbers to integers and back.

>>> import torch
>>> p = of_range(-1.0, 3.0, UINT8)
>>> p.zero_point.item(), round(p.scale.item() * 255, 6)
(64, 4.0)
>>> w = torch.tensor([[0.5, -1.0], [4.0, 2.0]])
>>> q = of_weight(w, INT8, axis=0)
>>> to_integers(w, q)
tensor([[  64, -127],
        [ 127,   64]], dtype=torch.int8)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..integers import INT8, UINT8, Format

__all__ = ["INT8", "UINT8", "Parameters", "of_centred", "of_range", "of_weight", "to_integers", "to_numbers"]

# All 256 integers, which a symmetric format has one less of.
SIGNED = Format(8, symmetric=False)

# The smallest scale: a tensor of zeros has none of its own, and float32 divides by this without overflow.
TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Parameters:
    """How one tensor becomes integers.

    Attributes:
        scale: float32, ``[]`` for the whole tensor or ``[channels]``.
        zero_point: int32, of the same shape.
        format: the integers.
        axis: which dimension the channels are, ``None`` with one scale for all.
    """

    scale: Tensor
    zero_point: Tensor
    format: Format
    axis: int | None = None

    @property
    def low(self) -> float:
        """The smallest number that an integer stands for; of one scale only."""
        return float(self.scale) * (self.format.range[0] - int(self.zero_point))

    @property
    def high(self) -> float:
        """The largest number that an integer stands for; of one scale only."""
        return float(self.scale) * (self.format.range[1] - int(self.zero_point))


def of_range(low: float, high: float, form: Format) -> Parameters:
    """Parameters for numbers between ``low`` and ``high``; zero is always among them, and exact.

    Raises:
        InputError: a bound is not finite.
    """
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise InputError(f"a quantized range must be finite, got {low} to {high}")
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    first, last = form.range
    if form.symmetric:
        scale = max(max(-low, high) / (last - form.middle), TINY)
        zero = form.middle
    else:
        scale = max((high - low) / (last - first), TINY)
        zero = min(max(round(first - low / scale), first), last)
    return Parameters(torch.tensor(scale, dtype=torch.float32), torch.tensor(zero, dtype=torch.int32), form)


def of_centred(low: float, high: float) -> Parameters:
    """Signed eight-bit parameters with all 256 integers whose zero point is 0.

    >>> how = of_centred(-1.0, 0.5)
    >>> how.format.dtype, how.zero_point.item(), how.low
    ('int8', 0, -1.0)

    Raises:
        InputError: a bound is not finite.
    """
    first, last = SIGNED.range
    scale = max(low / first, high / last, TINY)
    return of_range(first * scale, last * scale, SIGNED)


def of_weight(weight: Tensor, form: Format, axis: int | None) -> Parameters:
    """Parameters that hold the largest magnitude of every channel.

    Args:
        weight: any shape.
        form: symmetric.
        axis: the dimension of the channels; ``None`` for one scale.

    Raises:
        InputError: the format is not symmetric, or the weight not finite.
    """
    if not form.symmetric:
        raise InputError(f"weights take a symmetric format, got {form}")
    if not bool(torch.isfinite(weight).all()):
        raise InputError("a weight holds values that are not finite, and cannot be quantized")
    weight = weight.detach().float()
    if axis is None:
        largest = weight.abs().amax() if weight.numel() else weight.new_zeros(())
    else:
        axis = axis % weight.dim()
        others = [d for d in range(weight.dim()) if d != axis]
        largest = weight.abs().amax(others) if others else weight.abs()
    scale = (largest / (form.range[1] - form.middle)).clamp_min(TINY)
    return Parameters(scale, torch.full_like(scale, form.middle, dtype=torch.int32), form, axis)


def to_integers(values: Tensor, how: Parameters) -> Tensor:
    """``clamp(round(values / scale) + zero_point)``, half to even, in the format's dtype."""
    scale, zero = _spread(how, values)
    first, last = how.format.range
    integers = torch.round(values.detach().float() / scale) + zero
    return integers.clamp(first, last).to(getattr(torch, how.format.dtype))


def to_numbers(integers: Tensor, how: Parameters) -> Tensor:
    """``scale * (integers - zero_point)`` in float32."""
    scale, zero = _spread(how, integers)
    return (integers.to(torch.int32) - zero).float() * scale


def _spread(how: Parameters, like: Tensor) -> tuple[Tensor, Tensor]:
    if how.axis is None:
        return how.scale, how.zero_point
    shape = [1] * like.dim()
    shape[how.axis] = -1
    return how.scale.reshape(shape), how.zero_point.reshape(shape)
