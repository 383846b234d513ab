r"""Gram matrices of what convolutions and matrix products read, summed while batches stream by.

For an operator that multiplies rows ``x`` (for a convolution, patches of its input) with a matrix, one
group of channels at a time, ``H = sum x'x`` is all that the squared error of a changed weight depends on. It
is as large as the row is wide, whatever the number of samples.

>>> import graphprune
>>> graph = graphprune.trace(torch.nn.Conv1d(2, 4, 3, groups=2), torch.zeros(1, 2, 8))
>>> gram = InputGram(graph.nodes[-2])
>>> gram.add(torch.ones(1, 2, 8))
>>> gram.matrix.shape, gram.rows, gram.matrix[0].unique().tolist()
(torch.Size([2, 3, 3]), 6, [6.0])
"""

from __future__ import annotations

import torch
from graphprune.passes.repair.rows import Draw, form
from torch import Tensor, fx

from graphprune.operands import argument
from graphprune.quantization.blocks import Blocks
from graphprune.quantization.parameters import Parameters
from graphprune.quantization.rounding import rounded

BLOCK = 1024  # only blocks of columns on and above the diagonal are summed


class InputGram:
    """``sum x'x`` of one operator's rows.

    Args:
        node: a convolution, linear or product, as :func:`graphprune.passes.repair.rows.form` takes them.
        positions: how many output positions of an image, or tokens of a sequence, are taken; all by default.
        seed: of the choice of positions.

    Attributes:
        rows: how many there were.

    Raises:
        Refusal: the operator is not a product of its input with a matrix.
    """

    def __init__(self, node: fx.Node, positions: int | None = None, seed: int = 0):
        self.rows = 0
        self._form = form(node)
        convolves = self._form.kind in ("convolution", "transposed")
        self._kernel = tuple(argument(node, "weight").meta["val"].shape[2:]) if convolves else ()
        self._draw = Draw(positions, seed)
        self._sum: Tensor | None = None

    def add(self, value: Tensor) -> None:
        """Take in what the operator reads in one call."""
        for x, *_ in self._form.rows(value.detach(), [], self._kernel, self._draw):
            if x.dtype not in (torch.float32, torch.float64):
                x = x.float()
            width = x.shape[2]
            if self._sum is None:
                self._sum = x.new_zeros(x.shape[0], width, width, dtype=torch.float64)
            self.rows += x.shape[1]
            for start in range(0, width, BLOCK):
                block = slice(start, start + BLOCK)
                self._sum[:, block, start:] += x[:, :, block].mT @ x[:, :, start:]

    @property
    def matrix(self) -> Tensor:
        """``[groups, columns, columns]`` in float64; at least one value must have been added."""
        assert self._sum is not None
        upper = self._sum.triu()
        return upper + upper.triu(1).mT

    @property
    def finite(self) -> bool:
        """Whether nothing infinite or NaN was added."""
        return self._sum is not None and bool(torch.isfinite(self._sum).all())


def rounded_weight(
    node: fx.Node, weight: Tensor, how: Parameters, gram: Tensor | None, method: str
) -> Tensor:
    """The weight of a convolution, linear or product as integers in its own shape.

    Args:
        node: the operator.
        weight: in its layout: ``[out, in/groups, *k]``, ``[in, out/groups, *k]`` of a transposed convolution,
            ``[out, in]`` of a linear, ``[in, out]`` of a product.
        how: one scale, or one an output channel; of a transposed convolution with groups also one for each
            of ``out/groups``.
        gram: ``[groups, columns, columns]``, :attr:`InputGram.matrix`; ``nearest`` does without.
        method: of :func:`graphprune.quantization.rounding.rounded`.

    Raises:
        Refusal: the operator is not a product of its input with a matrix.
        InputError: the scales or the Gram matrix do not fit.
    """
    shape = form(node)
    groups = shape.matrix(weight.detach()).mT  # [groups, out/groups, columns]
    count, outputs, columns = groups.shape
    scale, zero = how.scale.reshape(-1), how.zero_point.reshape(-1)
    found = []
    for group in range(count):
        own = slice(group * outputs, (group + 1) * outputs) if len(scale) == count * outputs else slice(None)
        part = Blocks.of(Parameters(scale[own], zero[own], how.format, 0), outputs, max(columns, 1))
        found.append(rounded(groups[group], part, None if gram is None else gram[group], method))
    return shape.weight(torch.stack(found).mT, weight)
