"""The rules of :mod:`.dead.liveness`: what an operator's operands owe to the elements that count.

A rule gets the analysis, a node some of whose elements count, and the positions supposed to stay; it says
with ``live.need(operand, elements)`` what counts in turn. An operator without a rule reads everything.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphprune.axes.typing import aten_operators
from graphprune.operands import argument, reads_shape_only

from .constancy_pointwise import is_pointwise
from .constancy_rules import batch_norm_scale, reduced
from .extents import widened
from .liveness import Liveness, Marks
from .movement import is_move, moved, pull

aten = torch.ops.aten
Rule = Callable[[Liveness, fx.Node, Marks], None]
RULES: dict[Any, Rule] = {}


def flow(live: Liveness, node: fx.Node, keep: Marks) -> None:
    """Say what counts among the operands of a node that counts."""
    if node.target is operator.getitem:
        live.need(node.args[0], live.needed(node), index=node.args[1])  # type: ignore[arg-type]
        return
    rule = RULES.get(node.target)
    if rule is None:
        rule = _moving if is_move(live.extents, node) else _pointwise if is_pointwise(node) else everything
    rule(live, node, keep)


def register(names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(aten_operators(names), function))
        return function

    return register


def everything(live: Liveness, node: fx.Node, keep: Marks) -> None:
    for source in node.all_input_nodes:
        if not reads_shape_only(node, source):
            live.need(source)


@register("sym_size.int sym_numel zeros_like ones_like full_like empty_like new_zeros new_ones new_full")
def _nothing(live: Liveness, node: fx.Node, keep: Marks) -> None:
    """Only shapes are read."""


def _moving(live: Liveness, node: fx.Node, keep: Marks) -> None:
    wanted = [live.needed(node, i) for i in range(len(live.extents.types(node)))]
    sources = moved(node)
    for source, elements in zip(sources, pull(live.extents, node, [w.double() for w in wanted]), strict=True):
        live.need(source, elements)
    for source in node.all_input_nodes:
        if source not in sources and not reads_shape_only(node, source):
            live.need(source)


def _pointwise(live: Liveness, node: fx.Node, keep: Marks) -> None:
    needed = live.needed(node)
    for source in node.all_input_nodes:
        live.need(
            source, needed if source.meta.get("val") is not None and live.extents.types(source) else None
        )


@register("mul.Tensor multiply.Tensor")
def _product(live: Liveness, node: fx.Node, keep: Marks) -> None:
    """What is multiplied by a 0 that stays does not count; of two zeros, the first stays."""
    left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        (source,) = node.all_input_nodes
        factor = right if isinstance(left, fx.Node) else left
        if factor != 0:
            live.need(source, live.needed(node))
        return
    needed = live.needed(node)
    zero_left, zero_right = live.values.of(left).zero, live.values.of(right).zero
    live.need(left, needed & ~(zero_right & ~zero_left))
    live.need(right, needed & ~zero_left)


@register("batch_norm")
def _batch_norm(live: Liveness, node: fx.Node, keep: Marks) -> None:
    """A channel with scale 0 does not count. The parameters have the channels of the result."""
    scale = batch_norm_scale(live.values, node)
    if scale is None:
        everything(live, node, keep)
        return
    shape = [1] * node.meta["val"].dim()
    shape[1] = -1
    live.need(node.args[0], live.needed(node) & (scale[0] != 0).view(shape))  # type: ignore[arg-type]
    _per_channel(live, node, node.args[1:5])


def _per_channel(live: Liveness, node: fx.Node, parameters: Any) -> None:
    """Parameters ``[C]`` of the result's channels count as those do."""
    channels = live.needed(node).transpose(0, 1).flatten(1).any(1)
    for parameter in parameters:
        if isinstance(parameter, fx.Node):
            live.need(parameter, channels)


def _over(live: Liveness, node: fx.Node, dims: list[int], affine: Any) -> None:
    """Elements along ``dims`` are read together, unless what could go if they were not is asked for."""
    needed = live.needed(node)
    if not live.lenient:
        wide = [d for d in dims if needed.shape[d] > 1]
        needed = needed.any(tuple(wide), keepdim=True) if wide else needed
    elif affine is not None:
        needed = needed & ~affine.zero
    live.need(node.args[0], needed)  # type: ignore[arg-type]


@register("layer_norm rms_norm")
def _layer_norm(live: Liveness, node: fx.Node, keep: Marks) -> None:
    rank, count = node.meta["val"].dim(), len(argument(node, "normalized_shape"))
    weight, needed = argument(node, "weight"), live.needed(node)
    for name in ("weight", "bias"):
        operand = argument(node, name) if name != "bias" or node.target is aten.layer_norm.default else None
        if operand is not None:
            live.need(operand, needed)
    _over(live, node, list(range(rank - count, rank)), None if weight is None else live.values.of(weight))


@register("group_norm")
def _group_norm(live: Liveness, node: fx.Node, keep: Marks) -> None:
    """Channels of a group are read together."""
    needed, groups, wide = live.needed(node), argument(node, "num_groups"), live.extents.full(node)[1]
    if not live.lenient:
        rest = tuple(range(2, needed.dim()))
        channels = widened(needed.any(rest, keepdim=True) if rest else needed, 1, wide)
        blocks = channels.unflatten(1, (groups, -1))
        needed = blocks.any(2, keepdim=True).expand(blocks.shape).flatten(1, 2)
    live.need(node.args[0], needed)  # type: ignore[arg-type]
    _per_channel(live, node, node.args[2:4])


@register("instance_norm")
def _instance_norm(live: Liveness, node: fx.Node, keep: Marks) -> None:
    rest = tuple(range(2, node.meta["val"].dim()))
    live.need(node.args[0], live.needed(node).any(rest, keepdim=True))  # type: ignore[arg-type]
    _per_channel(live, node, node.args[1:5])


@register("softmax.int _softmax log_softmax.int _log_softmax")
def _softmax(live: Liveness, node: fx.Node, keep: Marks) -> None:
    _over(live, node, [node.args[1] % node.meta["val"].dim()], None)  # type: ignore[operator,list-item]


_SUMS = frozenset({aten.sum.default, aten.sum.dim_IntList, aten.linalg_vector_norm.default})


@register("mean mean.dim amax amin sum sum.dim_IntList linalg_vector_norm")
def _reduction(live: Liveness, node: fx.Node, keep: Marks) -> None:
    """A sum (of powers) does not miss a 0 that goes; any other reduction reads it."""
    (places, kept), needed = reduced(node), live.needed(node)
    if not kept:
        for place in places:
            needed = needed.unsqueeze(place)
    source: Any = node.args[0]
    order = argument(node, "ord") if node.target is aten.linalg_vector_norm.default else 1
    if node.target in _SUMS and 0 < order < math.inf:
        needed = needed.expand(torch.broadcast_shapes(needed.shape, live.extents.of(source)))
        gone = needed & live.values.of(source).zero & live.extents.gone(source, keep)
        live.note_zero(source, gone)
        needed = needed & ~gone
    live.need(source, needed)


@register("embedding")
def _embedding(live: Liveness, node: fx.Node, keep: Marks) -> None:
    table, index = node.args[:2]
    live.need(index)  # type: ignore[arg-type]
    columns = live.needed(node).flatten(0, -2).any(0)
    live.need(table, columns)  # type: ignore[arg-type]


@register("_weight_norm")
def _weight_norm(live: Liveness, node: fx.Node, keep: Marks) -> None:
    """A row's norm reads the row, but not a 0 that goes."""
    source, length = node.args[:2]
    dim = argument(node, "dim") % node.meta["val"].dim()
    others = tuple(d for d in range(node.meta["val"].dim()) if d != dim)
    rows = live.needed(node).any(others, keepdim=True)
    gone = live.values.of(source).zero & live.extents.gone(source, keep)  # type: ignore[arg-type]
    live.need(source, rows & ~gone)  # type: ignore[arg-type]
    live.need(length, rows)  # type: ignore[arg-type]
