"""A convolution or matrix product as what least squares wants: rows of a matrix, per group.

With ``g`` groups the operator is ``g`` products ``[rows, columns] · [columns, outputs]``. For a
convolution a row is the patch of the input under the kernel (im2col), ``columns = in/g · kernel``, one
row an image and output position. A transposed convolution is one with stride 1 over its input spread out
by the stride, the kernel mirrored. For a linear, one row is one vector of the input.

Of many positions in an image (or tokens in a sequence) only some are taken, drawn for every image anew.

>>> weight = torch.arange(6.0).view(2, 3, 1)                       # [out, in, k]
>>> Form("convolution", groups=1).matrix(weight).tolist()
[[[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graphprune.passes.affine import Refusal
from graphprune.passes.commute import describe
from torch import fx
from torch.nn import functional as F

from graphprune.graph import Graph
from graphprune.operands import PRODUCTS, argument, depends_on_input, is_transposed, spread_out

aten = torch.ops.aten

CHUNK = 1 << 23  # elements of a patch matrix at a time, 64 MiB in float64


@dataclass(frozen=True)
class Form:
    """How an operator is linear in its weight.

    Attributes:
        kind: ``convolution`` (weight ``[out, in/g, *k]``), ``transposed`` (``[in, out/g, *k]``), ``linear``
            (``[out, in]``) or ``product`` (``[in, out]``).
        groups, stride, padding (before and after, each dimension), dilation: of a convolution.
    """

    kind: str
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as ``[groups, columns, outputs]``."""
        if self.kind == "product":
            return weight.unsqueeze(0)
        if self.kind == "transposed":
            return weight.unflatten(0, (self.groups, -1)).movedim(2, -1).flatten(1, -2)
        return weight.unflatten(0, (self.groups, -1)).flatten(2).mT

    def weight(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`matrix`, in the shape of ``like``."""
        if self.kind == "product":
            return matrix.squeeze(0)
        if self.kind == "transposed":
            moved = like.unflatten(0, (self.groups, -1)).movedim(2, -1)
            return matrix.reshape(moved.shape).movedim(-1, 2).flatten(0, 1)
        return matrix.mT.reshape(like.shape)

    def rows(
        self, x: torch.Tensor, values: Sequence[torch.Tensor], kernel: tuple[int, ...], draw: Draw
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """The input as ``[groups, rows, columns]`` and each value as ``[groups, rows, outputs]``, in chunks.

        Args:
            x: what the operator reads.
            values: tensors shaped as the operator's result.
            kernel: the kernel's extents, of a convolution.
            draw: which positions are taken.
        """
        if self.kind in ("linear", "product"):
            yield from self._vectors(x, values, draw)
            return
        rank = len(kernel)
        if x.dim() == rank + 1:
            x, values = x.unsqueeze(0), [v.unsqueeze(0) for v in values]
        windows = self._windows(x, kernel)  # [N, C, *out, *k], a view
        out = windows.shape[2 : 2 + rank]
        picked = draw(x.shape[0], math.prod(out))  # [N, S]
        step = max(1, CHUNK // max(1, picked.shape[1] * x.shape[1] * math.prod(kernel)))
        values = [v.flatten(2).mT for v in values]  # [N, L, out]
        for start in range(0, x.shape[0], step):
            chosen = picked[start : start + step].to(x.device)
            places = torch.unravel_index(chosen, out)
            image = torch.arange(start, start + chosen.shape[0], device=x.device).unsqueeze(1)
            patches = windows[(image, slice(None), *places)]  # type: ignore[index]  # [n, S, C, *k]
            yield (
                self._grouped(patches.flatten(0, 1).flatten(1)),
                *(self._grouped(v[image, chosen].flatten(0, 1)) for v in values),
            )

    def _grouped(self, rows: torch.Tensor) -> torch.Tensor:
        """``[rows, groups · width]`` as ``[groups, rows, width]``."""
        return rows.unflatten(1, (self.groups, -1)).transpose(0, 1)

    def _vectors(
        self, x: torch.Tensor, values: Sequence[torch.Tensor], draw: Draw
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        size = x.shape[0] if x.dim() > 1 else 1
        x, *values = (v.reshape(size, -1, v.shape[-1]) for v in (x, *values))  # [N, tokens, width]
        picked = draw(x.shape[0], x.shape[1]).to(x.device)
        step = max(1, CHUNK // max(1, picked.shape[1] * x.shape[2]))
        for start in range(0, x.shape[0], step):
            chosen = picked[start : start + step]
            sample = torch.arange(start, start + chosen.shape[0], device=x.device).unsqueeze(1)
            yield tuple(v[sample, chosen].flatten(0, 1).unsqueeze(0) for v in (x, *values))

    def _windows(self, x: torch.Tensor, kernel: tuple[int, ...]) -> torch.Tensor:
        stride = self.stride
        if self.kind == "transposed":
            for dim, step in enumerate(stride, 2):
                x = _spread(x, dim, step)
            stride = (1,) * len(kernel)
        x = F.pad(x, [width for pair in reversed(self.padding) for width in pair])
        for dim, (extent, step, gap) in enumerate(zip(kernel, stride, self.dilation, strict=True), 2):
            x = x.unfold(dim, gap * (extent - 1) + 1, step)[..., ::gap]
        return x.flip(tuple(range(-len(kernel), 0))) if self.kind == "transposed" else x


class Draw:
    """Which positions of every image are taken: all where they are few, else ``count`` drawn at random.

    The draws of an image depend on the seed and on how many images came before it, not on how those were
    batched.
    """

    def __init__(self, count: int | None, seed: int):
        self.count = count
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, images: int, positions: int) -> torch.Tensor:
        """``[images, taken]``: ascending flat positions."""
        if self.count is None or positions <= self.count:
            return torch.arange(positions).expand(images, positions)
        drawn = torch.rand(images, positions, generator=self._generator, dtype=torch.float64)
        return drawn.topk(self.count, dim=1).indices.sort(dim=1).values


def form(node: fx.Node) -> Form:
    """How an operator of ``LINEAR`` is linear in its weight.

    Raises:
        Refusal: it is not, as it stands.
    """
    if node.target is aten.linear.default:
        return Form("linear")
    if node.target in PRODUCTS:
        if node.target is aten.addmm.default and (
            argument(node, "alpha") != 1 or argument(node, "beta") != 1
        ):
            raise Refusal("it has factors of its own")
        return Form("product")
    kernel = tuple(argument(node, "weight").meta["val"].shape[2:])
    rank = len(kernel)
    stride, dilation = (spread_out(argument(node, name), rank) for name in ("stride", "dilation"))
    groups, padding = argument(node, "groups"), argument(node, "padding")
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [gap * (extent - 1) for extent, gap in zip(kernel, dilation, strict=True)]
        return Form("convolution", groups, stride, tuple((t // 2, t - t // 2) for t in total), dilation)
    around = spread_out(padding, rank)
    if not is_transposed(node):
        return Form("convolution", groups, stride, tuple((p, p) for p in around), dilation)
    more = spread_out(argument(node, "output_padding"), rank)
    widths = [
        (gap * (extent - 1) - p, gap * (extent - 1) - p + extra)
        for extent, gap, p, extra in zip(kernel, dilation, around, more, strict=True)
    ]
    return Form("transposed", groups, stride, tuple(widths), dilation)


def operands(node: fx.Node) -> tuple[Any, Any, Any]:
    """Input, weight and bias of an operator of ``LINEAR``; ``None`` for what it does not have."""
    if node.target is aten.addmm.default:
        return node.args[1], node.args[2], node.args[0]
    bias = None if node.target in PRODUCTS else argument(node, "bias")
    return node.args[0], node.args[1], bias


def parameter(graph: Graph, value: Any, what: str) -> str:
    """The name of the tensor behind an operand.

    Raises:
        Refusal: it is computed.
    """
    if graph.constant(value) is None:
        hint = "" if isinstance(value, fx.Node) and depends_on_input(value) else "; fold-parameters may help"
        made_by = describe(value) if isinstance(value, fx.Node) else repr(value)
        raise Refusal(f"its {what} is computed, by {made_by}{hint}")
    return str(value.target)


def _spread(x: torch.Tensor, dim: int, step: int) -> torch.Tensor:
    """``step - 1`` zeros between neighbours along ``dim``."""
    if step == 1:
        return x
    size = x.shape[dim]
    wide = F.pad(x.unsqueeze(dim + 1), [0, 0] * (x.dim() - dim - 1) + [0, step - 1])
    return wide.flatten(dim, dim + 1).narrow(dim, 0, (size - 1) * step + 1)
