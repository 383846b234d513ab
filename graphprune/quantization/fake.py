"""Rounding that gradients go through: one operator, for training with integers in mind.

Forward ``s (clamp(round(x / s + z), low, high) - z)``. Backward, with ``v = x / s + z`` (Esser et al.,
*Learned Step Size Quantization*, ICLR 2020, eq. 3 and 5): to ``x`` the gradient as it comes where ``v`` is in
range and nothing elsewhere; to ``s`` ``round(v) - v`` in range and ``clamp(v) - z`` elsewhere, times a factor
that keeps the steps of scales in proportion to those of weights.

PyTorch's own learnable fake quantizers do the same, but have no shape function, so that neither export nor
``torch.compile`` takes a network with them.

>>> x, s = torch.tensor([0.2, 0.6, 9.0], requires_grad=True), torch.tensor([0.5], requires_grad=True)
>>> y = fake_quantize(x, s, torch.zeros(1), -1, -4, 3, 1.0)
>>> y.tolist()
[0.0, 0.5, 1.5]
>>> y.sum().backward()
>>> x.grad.tolist(), [round(g, 3) for g in s.grad.tolist()]                      # -0.4 - 0.2 + 3
([1.0, 1.0, 0.0], [2.4])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("graphprune::fake_quantize", mutates_args=())
def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, low: int, high: int, factor: float
) -> Tensor:
    """Numbers that integers of a scale stand for.

    Args:
        x: any shape.
        scale, zero_point: ``[1]``, or ``[channels]``.
        axis: the dimension of the channels; -1 where there is one scale.
        low, high: the integers.
        factor: on the gradient of the scale.
    """
    step, zero = _spread(scale, x, axis), _spread(zero_point, x, axis)
    return (torch.round(x / step + zero).clamp(low, high) - zero) * step


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, low: int, high: int, factor: float) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, *ctx.numbers = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    axis, low, high, factor = ctx.numbers
    step, zero = _spread(scale, x, axis), _spread(zero_point, x, axis)
    place = x / step + zero
    inside = (place >= low) & (place <= high)
    share = torch.where(inside, torch.round(place) - place, place.clamp(low, high) - zero) * grad
    others = [d for d in range(x.dim()) if d != axis] if axis >= 0 else [*range(x.dim())]
    return grad * inside, (share.sum(others) * factor).reshape(scale.shape), None, None, None, None, None


fake_quantize.register_autograd(_backward, setup_context=_keep)

FAKE = torch.ops.graphprune.fake_quantize.default


def _spread(values: Tensor, like: Tensor, axis: int) -> Tensor:
    if axis < 0:
        return values
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.reshape(shape)
