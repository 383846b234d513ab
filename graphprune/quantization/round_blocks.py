"""Rounding of what a linear reads, block by block, as runtimes do it that multiply blocks of integers.

Every block of so many neighbouring columns of a row is rounded to 255 integers around zero, with the scale
that its largest magnitude asks for, each time anew (ONNX Runtime's MatMulNBits at ``accuracy_level`` 4).
As an operator, so that a graph can say it: ``graphprune::round_blocks``.

>>> round_blocks(torch.tensor([[1.27, 0.004, 100.0, 0.3]]), 2)
tensor([[  1.2700,   0.0000, 100.0000,   0.0000]])
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.library.custom_op("graphprune::round_blocks", mutates_args=())
def round_blocks(x: Tensor, size: int) -> Tensor:
    """Float32 ``[…, columns]``, each block of ``size`` columns rounded to 8 bits and back."""
    columns = x.shape[-1]
    parted = F.pad(x, (0, -columns % size)).unflatten(-1, (-1, size))
    scale = parted.abs().amax(-1, keepdim=True) / 127
    whole = torch.round(parted / scale.masked_fill(scale == 0, 1.0)) * scale
    return whole.flatten(-2)[..., :columns].contiguous()


@round_blocks.register_fake
def _(x: Tensor, size: int) -> Tensor:
    return torch.empty_like(x)
