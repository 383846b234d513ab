"""Carrying a per-channel affine map ``y = s x + t`` through operators that commute with it.

An :class:`Affine` holds ``s`` and ``t`` in float64, shaped as the value they belong to with size 1
wherever they do not vary: a batch norm over ``[N, C, H, W]`` is ``[1, C, 1, 1]``. Moving a map past an
operator ``f`` means finding ``(s', t')`` with

    s f(x) + t = f(s' x + t')

which :mod:`graphprune.passes.commute` does operator by operator; this module is the algebra of the
map itself, above all following its channels through a reshape. What does not commute raises
:class:`Refusal` with the reason.

>>> import torch
>>> carrier = Affine(torch.tensor([2.0, 3.0]).view(1, 2, 1), torch.zeros(1, 2, 1))
>>> carrier.reshape((1, 2, 5), (1, 10)).scale.flatten().tolist()
[2.0, 2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch


class Refusal(Exception):
    """An affine map cannot go there; the message is the reason, for the user."""


@dataclass(frozen=True)
class Affine:
    """``y = scale * x + shift``; both float64 and of one shape, size 1 where they do not vary."""

    scale: torch.Tensor
    shift: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Affine:
        """The same change made to scale and shift."""
        return Affine(change(self.scale), change(self.shift))

    @property
    def shifts(self) -> bool:
        """Whether the shift is not zero (on the meta device: assumed)."""
        return self.shift.is_meta or bool(self.shift.count_nonzero())

    def channels(self, dim: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift as vectors ``[size]`` along ``dim``.

        Raises:
            Refusal: they vary along another dimension.
        """
        dim %= self.scale.dim()
        for other, extent in enumerate(self.scale.shape):
            if other != dim and extent != 1:
                raise Refusal(f"the normalised channels become dimension {other} there, not dimension {dim}")
        return self.scale.flatten().expand(size), self.shift.flatten().expand(size)

    def requires_constant(self, dims: Sequence[int], what: str) -> Affine:
        """Self, if it does not vary along ``dims``."""
        if any(self.scale.shape[d] != 1 for d in dims):
            raise Refusal(f"{what} runs over the normalised channels")
        return self

    def reshape(self, old: Sequence[Any], new: Sequence[Any]) -> Affine:
        """The map of a value of shape ``old`` after it was reshaped to ``new`` (row-major)."""
        shape: list[int] = []
        scale, shift = self.scale, self.shift
        widened: list[int] = []
        for left, right in _blocks(old, new):
            block = [self.scale.shape[d] for d in left]
            if all(extent == 1 for extent in block):
                widened += block
                shape += [1] * len(right)
                continue
            if not all(isinstance(s, int) for s in [*(old[d] for d in left), *(new[d] for d in right)]):
                raise Refusal("the normalised channels are merged with a dimension of symbolic size")
            widened += [old[d] for d in left]
            shape += [new[d] for d in right]
        moved = Affine(*(v.expand(widened).reshape(shape) for v in (scale, shift)))
        return moved.compress()

    def compress(self) -> Affine:
        """The same map with size 1 along every dimension it turns out not to vary along."""
        scale, shift = self.scale, self.shift
        if scale.is_meta:
            return self
        for dim in range(scale.dim()):
            if scale.shape[dim] > 1:
                first = scale.narrow(dim, 0, 1), shift.narrow(dim, 0, 1)
                if torch.equal(first[0].expand_as(scale), scale) and torch.equal(
                    first[1].expand_as(shift), shift
                ):
                    scale, shift = first
        return Affine(scale, shift)

    def fit(self, shape: Sequence[Any]) -> Affine:
        """The map for an operand of ``shape`` that was broadcast to this rank."""
        extra = self.scale.dim() - len(shape)
        self.requires_constant(range(extra), "a broadcast")
        scale, shift = (
            self.scale.reshape(self.scale.shape[extra:]),
            self.shift.reshape(self.shift.shape[extra:]),
        )
        narrow = [d for d, s in enumerate(shape) if s == 1]
        return Affine(scale, shift).requires_constant(narrow, "a broadcast")


def _blocks(old: Sequence[Any], new: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions of ``old`` and of ``new`` that hold the same elements."""
    blocks = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [i][: len(old) - i], [j][: len(new) - j]
        while (ratio := _ratio([old[d] for d in left], [new[d] for d in right])) != 1:
            more_left, more_right = i + len(left) < len(old), j + len(right) < len(new)
            if not (more_left or more_right):
                raise Refusal("the normalised channels cannot be followed through a reshape")
            # A ratio that is still symbolic says nothing of which side is behind; either may grow.
            if more_left and (ratio < 1 or not more_right if _is_number(ratio) else True):
                left.append(i + len(left))
            else:
                right.append(j + len(right))
        blocks.append((left, right))
        i, j = i + len(left), j + len(right)
    return blocks


def _ratio(left: Sequence[Any], right: Sequence[Any]) -> Any:
    a, b = math.prod(left), math.prod(right)
    return Fraction(a, b) if isinstance(a, int) and isinstance(b, int) else a / b


def _is_number(ratio: Any) -> bool:
    return isinstance(ratio, Fraction) or bool(ratio.is_number)
