"""Which operators an affine map per channel commutes with, and how it comes out on the other side.

For an operator ``f`` and a map ``(s, t)`` on its result, :func:`carry` finds the map on its operand with
``s f(x) + t = f(s' x + t')``; with ``forward=True`` from operand to result:

* reshapes, permutations, slices, flips: the same numbers, rearranged;
* means, average pooling and interpolation, whose weights sum to one: the same numbers, as long as
  they do not vary along the dimensions averaged over and no padding enters the average;
* max pooling: likewise, where ``s >= 0``;
* ``f(x) = k x + c``: ``s' = s`` and ``t' = (s c + t - c) / k``; forward ``t = k t' + c - s c``;
* dropout in evaluation mode: unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphprune.graph_text import operator_name
from graphprune.operands import argument, has_argument, sizes

from .affine import Affine, Refusal

aten = torch.ops.aten


def carry(node: fx.Node, affine: Affine, *, forward: bool) -> Affine:
    """The map past ``node``: from its result to its first operand, or the other way.

    Raises:
        Refusal: the operator does not commute with it.
    """
    rule = _RULES.get(node.target) if node.op == "call_function" else None
    if rule is None:
        raise Refusal(f"{'feeds' if forward else 'reads'} {describe(node)}")
    return rule(node, affine, forward)


def describe(node: fx.Node) -> str:
    """What a reason calls a node: ``relu (relu_3)``, ``input 'x'``."""
    if node.op == "placeholder":
        return f"input {node.name!r}"
    if node.op == "output":
        return "an output of the network"
    name = operator_name(node)
    return name if name == node.name else f"{name} ({node.name})"


def _source(node: fx.Node) -> fx.Node:
    assert isinstance(node.args[0], fx.Node)
    return node.args[0]


def _reshape(node: fx.Node, affine: Affine, forward: bool) -> Affine:
    old, new = sizes(_source(node)), sizes(node)
    return affine.reshape(old, new) if forward else affine.reshape(new, old)


def _permute(node: fx.Node, affine: Affine, forward: bool) -> Affine:
    # The operator itself says where each dimension goes, on a tensor whose sizes name its dimensions.
    rank = len(sizes(node))
    probe = torch.empty(tuple(range(2, rank + 2)), device="meta")
    order = [s - 2 for s in node.target(probe, *node.args[1:], **node.kwargs).shape]  # type: ignore[operator]
    if not forward:
        order = [order.index(d) for d in range(rank)]
    return affine.map(lambda v: v.permute(order))


def _slice(node: fx.Node, affine: Affine, forward: bool) -> Affine:
    dim = argument(node, "dim") % len(sizes(node))
    if affine.scale.shape[dim] == 1:
        return affine
    if not forward:
        raise Refusal(f"reads {describe(node)}, a part of the channels")
    return affine.map(lambda v: node.target(v, *node.args[1:], **node.kwargs))  # type: ignore[operator]


def _select(node: fx.Node, affine: Affine, forward: bool) -> Affine:
    source = sizes(_source(node))
    dim = argument(node, "dim") % len(source)
    if not forward:
        return affine.map(lambda v: v.unsqueeze(dim))
    return affine.requires_constant([dim], describe(node)).map(lambda v: v.squeeze(dim))


def _flip(node: fx.Node, affine: Affine, forward: bool) -> Affine:
    return affine.map(lambda v: v.flip(argument(node, "dims")))


def _spatial(node: fx.Node, affine: Affine, forward: bool) -> Affine:
    """Dimensions from 2 on are averaged or interpolated over; unbatched: from 1 on."""
    name = operator_name(node)
    extent = next((int(d) for d in "123" if f"{d}d" in name), 1)
    rank = len(sizes(node))
    return affine.requires_constant(range(rank - extent, rank), describe(node))


def _average_pool(node: fx.Node, affine: Affine, forward: bool) -> Affine:
    padding = argument(node, "padding")
    padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    if affine.shifts and padded and argument(node, "count_include_pad"):
        raise Refusal(f"{describe(node)} averages zero padding in, and the shift is not zero")
    if has_argument(node, "divisor_override") and argument(node, "divisor_override") and affine.shifts:
        raise Refusal(f"{describe(node)} overrides its divisor, and the shift is not zero")
    return _spatial(node, affine, forward)


def _max_pool(node: fx.Node, affine: Affine, forward: bool) -> Affine:
    if affine.scale.is_meta or bool((affine.scale < 0).any()):
        raise Refusal(f"{describe(node)}, and a scale is negative: the largest value becomes the smallest")
    return _spatial(node, affine, forward)


def _mean(node: fx.Node, affine: Affine, forward: bool) -> Affine:
    source = sizes(_source(node))
    given = argument(node, "dim")
    dims = sorted(d % len(source) for d in (given or range(len(source))))
    if argument(node, "dtype") is not None:
        raise Refusal(f"{describe(node)} casts")
    kept = bool(argument(node, "keepdim"))
    if forward:
        affine.requires_constant(dims, describe(node))
        return (
            affine
            if kept
            else affine.map(lambda v: v.reshape([s for d, s in enumerate(v.shape) if d not in dims]))
        )
    if kept:
        return affine
    for dim in dims:
        affine = affine.map(lambda v, dim=dim: v.unsqueeze(dim))  # type: ignore[misc]
    return affine


def _pad(node: fx.Node, affine: Affine, forward: bool) -> Affine:
    width = argument(node, "pad")
    if any(w < 0 for w in width):
        raise Refusal(f"{describe(node)} crops")
    rank = len(sizes(node))
    constant = not has_argument(node, "mode") or argument(node, "mode") == "constant"
    if constant and (affine.shifts or argument(node, "value")):
        raise Refusal(f"{describe(node)} pads with a constant that the shift would not reach")
    return affine.requires_constant(range(rank - len(width) // 2, rank), describe(node))


def _line(node: fx.Node, affine: Affine, forward: bool) -> Affine:
    """``k x + c`` with numbers ``k`` and ``c``."""
    number = node.args[1]
    if isinstance(node.args[0], (int, float)) or isinstance(number, fx.Node) or number is None:
        raise Refusal(f"{'feeds' if forward else 'reads'} {describe(node)}")
    amount: Any = number
    amount = amount * node.kwargs.get("alpha", 1)
    k, c = {
        "mul": (amount, 0), "div": (1 / amount if amount else 0, 0), "add": (1, amount), "sub": (1, -amount),
    }[operator_name(node).split(".")[0]]  # fmt: skip
    if k == 0:
        raise Refusal(f"{describe(node)} multiplies with zero")
    s, t = affine.scale, affine.shift
    return Affine(s, k * t + c - s * c if forward else (s * c + t - c) / k)


def _dropout(node: fx.Node, affine: Affine, forward: bool) -> Affine:
    if argument(node, "train"):
        raise Refusal(f"{describe(node)} is on in evaluation mode too")
    return affine


_RULES: dict[Any, Callable[[fx.Node, Affine, bool], Affine]] = {
    **dict.fromkeys((
        aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.reshape_as.default,
        aten.view_as.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default,
        aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.clone.default,
        aten.contiguous.default, aten.alias.default, aten.detach.default), _reshape),
    **dict.fromkeys((
        aten.permute.default, aten.transpose.int, aten.movedim.int, aten.movedim.intlist, aten.t.default,
        aten.mT.default, aten.numpy_T.default, aten.swapaxes.default), _permute),
    **dict.fromkeys((aten.slice.Tensor, aten.narrow.default), _slice),
    aten.select.int: _select,
    aten.flip.default: _flip,
    **dict.fromkeys((
        aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
        aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec,
        aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec,
        aten.upsample_bicubic2d.vec), _spatial),
    **dict.fromkeys((
        aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default), _average_pool),
    **dict.fromkeys((aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default), _max_pool),
    aten.mean.dim: _mean,
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _pad),
    **dict.fromkeys((aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor), _line),
    **dict.fromkeys((aten.dropout.default, aten.feature_dropout.default), _dropout),
}  # fmt: skip
