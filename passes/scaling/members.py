"""The tensors that take the factors of a segment in: weights by row or column, biases, gains.

>>> import torch
>>> columns = Member("w", None, "reader", torch.tensor([[0, 1, -1]]))  # the third column is of another axis
>>> columns.scaled(torch.ones(2, 3), torch.tensor([2.0, 4.0]))
tensor([[2., 4., 1.],
        [2., 4., 1.]])
>>> columns.peaks(torch.tensor([[1.0, 2.0, 9.0], [-3.0, 0.5, 9.0]]), 2)
tensor([3., 2.], dtype=torch.float64)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.axes.terms import Atom
from graphprune.errors import PassError
from graphprune.importance.readers import Linear, owners

ROLES = ("writer", "reader", "gain", "shift")


@dataclass(frozen=True, eq=False)
class Member:
    """A tensor along which a segment runs.

    Attributes:
        tensor: its name.
        node: the operator that reads it.
        role: ``writer`` and ``reader`` are weights of convolutions and matrix products; ``gain`` is another
            factor of the segment's values (of a layer norm, an embedding table), ``shift`` is added to
            them. All but readers take the factor itself, readers its inverse.
        index: for every element, by broadcasting, the position of the axis that it belongs to; -1 for none.
        linear: the operator, of a ``writer`` or ``reader``.
    """

    tensor: str
    node: fx.Node | None
    role: str
    index: Tensor = field(repr=False)
    linear: Linear | None = None

    def scaled(self, value: Tensor, factor: Tensor) -> Tensor:
        """The tensor times ``factor [positions]``."""
        extended = torch.cat([factor, factor.new_ones(1)])  # -1 is the last one
        return value * extended[self.index].to(value.dtype)

    def peaks(self, value: Tensor, positions: int) -> Tensor:
        """The largest magnitude at every position of the axis, float64 ``[positions]``."""
        index = torch.where(self.index < 0, positions, self.index)
        largest = value.detach().abs().double()
        along = [dim for dim, size in enumerate(index.shape) if size == 1]
        largest = largest.amax(along, keepdim=True) if along else largest
        found = torch.zeros(positions + 1, dtype=torch.float64)
        return found.scatter_reduce_(0, index.flatten(), largest.flatten(), "amax")[:positions]


def of_linear(linear: Linear, atom: Atom, *, writes: bool) -> Member:
    """The rows or columns of an operator's weight that belong to an axis."""
    owner = torch.from_numpy(owners(linear.outputs if writes else linear.inputs, atom))
    shape = linear.graph.tensors[linear.weight].shape
    tail = [1] * (len(shape) - 2)
    if writes is linear.transposed:  # along dimension 1, where channels are numbered group by group
        blocks = owner.reshape(linear.groups, 1, -1)
        index = blocks.expand(linear.groups, shape[0] // linear.groups, shape[1])
        index = index.reshape(shape[0], shape[1], *tail)
    else:
        index = owner.reshape(-1, 1, *tail)
    return Member(linear.weight, linear.node, "writer" if writes else "reader", index, linear)


def along(name: str, node: fx.Node, role: str, dim: int, rank: int, owner: Tensor) -> Member:
    """One dimension of a tensor, of which every place belongs to ``owner[place]``."""
    shape: list[Any] = [1] * rank
    shape[dim] = -1
    return Member(name, node, role, owner.reshape(shape))


def cast(pass_name: str, tensor: str, value: Tensor, like: Tensor) -> Tensor:
    """A rescaled tensor in the dtype it had.

    Raises:
        PassError: it would not be finite there.
    """
    result = value.to(like.dtype).contiguous()
    if not bool(torch.isfinite(result).all()):
        raise PassError(pass_name, f"{tensor!r} would not be finite in {like.dtype}")
    return result
