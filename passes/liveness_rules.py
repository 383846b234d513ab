"""The rules of :mod:`graphprune.passes.liveness`: what an operator's operands owe to the elements that count.

A rule gets the analysis, a node some of whose elements count, and the positions supposed to stay; it says
with ``live.need(operand, elements)`` what counts in turn. An operator without a rule reads everything.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphprune.axes.typing import aten_operators

from .constancy_pointwise import is_pointwise
from .constancy_rules import batch_norm_scale, reduced
from .contractions import CONTRACTIONS, Contraction, bias_of
from .extents import widened
from .liveness import Liveness, Marks, fitted
from .movement import MOVES, moved, pull
from .operands import argument, reads_shape_only
from .products import MAX_TERMS, is_distribution, needed_of_attention, needed_of_product, terms
from .recurrent import needed_of_recurrent

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
        rule = _moving if node.target in MOVES else _pointwise if is_pointwise(node) else _everything
    rule(live, node, keep)


def _register(names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(aten_operators(names), function))
        return function

    return register


def _everything(live: Liveness, node: fx.Node, keep: Marks) -> None:
    for source in node.all_input_nodes:
        if not reads_shape_only(node, source):
            live.need(source)


@_register("sym_size.int sym_numel zeros_like ones_like full_like empty_like new_zeros new_ones new_full")
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


@_register("mul.Tensor multiply.Tensor")
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


@_register("batch_norm")
def _batch_norm(live: Liveness, node: fx.Node, keep: Marks) -> None:
    """A channel with scale 0 does not count. The parameters have the channels of the result."""
    scale = batch_norm_scale(live.values, node)
    if scale is None:
        _everything(live, node, keep)
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


@_register("layer_norm rms_norm")
def _layer_norm(live: Liveness, node: fx.Node, keep: Marks) -> None:
    rank, count = node.meta["val"].dim(), len(argument(node, "normalized_shape"))
    weight, needed = argument(node, "weight"), live.needed(node)
    for name in ("weight", "bias"):
        operand = argument(node, name) if name != "bias" or node.target is aten.layer_norm.default else None
        if operand is not None:
            live.need(operand, needed)
    _over(live, node, list(range(rank - count, rank)), None if weight is None else live.values.of(weight))


@_register("group_norm")
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


@_register("instance_norm")
def _instance_norm(live: Liveness, node: fx.Node, keep: Marks) -> None:
    rest = tuple(range(2, node.meta["val"].dim()))
    live.need(node.args[0], live.needed(node).any(rest, keepdim=True))  # type: ignore[arg-type]
    _per_channel(live, node, node.args[1:5])


@_register("softmax.int _softmax log_softmax.int _log_softmax")
def _softmax(live: Liveness, node: fx.Node, keep: Marks) -> None:
    _over(live, node, [node.args[1] % node.meta["val"].dim()], None)  # type: ignore[operator,list-item]


@_register("mean mean.dim amax amin sum sum.dim_IntList")
def _reduction(live: Liveness, node: fx.Node, keep: Marks) -> None:
    """A sum does not miss a 0 that goes; any other reduction reads it."""
    (places, kept), needed = reduced(node), live.needed(node)
    if not kept:
        for place in places:
            needed = needed.unsqueeze(place)
    source: Any = node.args[0]
    if "sum" in str(node.target):
        needed = needed.expand(torch.broadcast_shapes(needed.shape, live.extents.of(source)))
        gone = needed & live.values.of(source).zero & live.extents.gone(source, keep)
        live.note_zero(source, gone)
        needed = needed & ~gone
    live.need(source, needed)


@_register("embedding")
def _embedding(live: Liveness, node: fx.Node, keep: Marks) -> None:
    table, index = node.args[:2]
    live.need(index)  # type: ignore[arg-type]
    columns = live.needed(node).flatten(0, -2).any(0)
    live.need(table, columns)  # type: ignore[arg-type]


@_register("_weight_norm")
def _weight_norm(live: Liveness, node: fx.Node, keep: Marks) -> None:
    """A row's norm reads the row, but not a 0 that goes."""
    source, length = node.args[:2]
    dim = argument(node, "dim") % node.meta["val"].dim()
    others = tuple(d for d in range(node.meta["val"].dim()) if d != dim)
    rows = live.needed(node).any(others, keepdim=True)
    gone = live.values.of(source).zero & live.extents.gone(source, keep)  # type: ignore[arg-type]
    live.need(source, rows & ~gone)  # type: ignore[arg-type]
    live.need(length, rows)  # type: ignore[arg-type]


# ---- contractions --------------------------------------------------------------------------------


def _contraction(live: Liveness, node: fx.Node, keep: Marks) -> None:
    site = live.values.contraction(node)
    if site is not None and node.all_input_nodes.count(site.source) == 1 and site.source is not site.weight:
        _channels(live, site, keep)
    elif node.target in _MATRIX_PRODUCTS:
        _matrix_product(live, node, keep)
    else:
        _everything(live, node, keep)


def _channels(live: Liveness, site: Contraction, keep: Marks) -> None:
    needed = site.outputs(live.needed(site.node))
    counts = site.counting(needed)
    bounds = live.values.of(site.source)
    gone = site.inputs(live.extents.gone(site.source, keep)) & counts
    lo, hi = site.inputs(bounds.lo), site.inputs(bounds.hi)
    low, high = lo.flatten(0, -3).amin(0), hi.flatten(0, -3).amax(0)
    alike = (low == high) & low.isfinite() & (low != 0)  # [g, in/g]: a bias is the same at every place
    zero = gone & (lo == 0) & (hi == 0)
    other = gone & alike
    if site.refusal:
        live.block(site.refusal, site.source, site.back(counts & alike))
        other = other & live.lenient
    gone = zero | other
    shared = other.flatten(0, -3).any(0)
    live.discharge(site, torch.where(shared, low, 0.0).flatten(), site.back(zero), site.back(other))
    live.need(site.source, site.back(counts & ~gone))
    if site.weight.op != "get_attr":
        _computed_weight(live, site, needed, counts & ~gone, keep)
    bias = bias_of(site.node)
    if bias is not None:
        per_channel = bias.meta["val"].dim() < 2
        live.need(bias, needed.flatten(0, -3).any(0).flatten() if per_channel else live.needed(site.node))


def _computed_weight(
    live: Liveness, site: Contraction, needed: torch.Tensor, counts: torch.Tensor, keep: Marks
) -> None:
    """What a computed weight owes: entries that are read, and zeros that stay, which have to stay 0."""
    rows, columns = needed.flatten(0, -3).any(0), counts.flatten(0, -3).any(0)
    stays = ~site.inputs(live.extents.gone(site.source, keep)).flatten(0, -3).any(0)
    entries = rows[:, :, None] & (columns[:, None, :] | stays[:, None, :])  # [g, out/g, in/g]
    if site.node.target in (aten.linear.default, *_MATRIX_PRODUCTS, aten.addmm.default):
        entries = entries[0] if site.node.target is aten.linear.default else entries[0].mT
        live.need(site.weight, entries)
        return
    if "transpose" in str(site.node.target):
        entries = entries.transpose(1, 2)
    kernel = [1] * (site.weight.meta["val"].dim() - 2)
    live.need(site.weight, entries.flatten(0, 1).view((*entries.flatten(0, 1).shape, *kernel)))


_MATRIX_PRODUCTS = frozenset({aten.mm.default, aten.matmul.default, aten.bmm.default})
RULES.update(dict.fromkeys(CONTRACTIONS | _MATRIX_PRODUCTS, _contraction))


def _matrix_product(live: Liveness, node: fx.Node, keep: Marks) -> None:
    left, right = node.args[:2]
    if left is right or min(n.meta["val"].dim() for n in (left, right)) < 2:  # type: ignore[union-attr]
        _everything(live, node, keep)
        return
    known = [live.values.of(n) for n in (left, right)]
    zero_left = known[0].zero
    # Weights that add up to 1 leave a constant alone, whatever they are.
    zero_right = known[1].zero
    if is_distribution(left):  # type: ignore[arg-type]
        fixed = known[1].over([known[1].lo.dim() - 2]).constant
        zero_right = zero_right | fixed
        zero_left = torch.zeros_like(zero_left)
    if terms(live.needed(node)[..., :1], zero_right) * zero_left.shape[-2] > MAX_TERMS:
        _everything(live, node, keep)
        return
    width = live.extents.gone(left, keep)  # type: ignore[arg-type]
    gone = width.flatten(0, -2).all(0) if width.dim() > 1 else width
    for_left, for_right = needed_of_product(live.needed(node), zero_left, zero_right, gone)
    live.need(left, for_left)  # type: ignore[arg-type]
    live.need(right, for_right)  # type: ignore[arg-type]


@_register("scaled_dot_product_attention")
def _attention(live: Liveness, node: fx.Node, keep: Marks) -> None:
    query, key, value = node.args[:3]
    if query is key or key is value or query is value:
        _everything(live, node, keep)
        return
    width = live.extents.gone(query, keep)  # type: ignore[arg-type]
    gone = width.flatten(0, -2).all(0)
    for source, elements in zip(
        (query, key, value), needed_of_attention(live.values, node, live.needed(node), gone), strict=True
    ):
        live.need(source, elements)  # type: ignore[arg-type]
    mask = argument(node, "attn_mask")
    if mask is not None:
        live.need(mask)


@_register("lstm.input gru.input rnn_tanh.input rnn_relu.input")
def _recurrent(live: Liveness, node: fx.Node, keep: Marks) -> None:
    wanted = [live.needed(node, i) for i in range(len(node.meta["val"]))]
    elements = needed_of_recurrent(live.values, node, wanted)
    if elements is None:
        _everything(live, node, keep)
        return
    source: Any = node.args[0]
    zero = live.values.of(source).zero & live.extents.gone(source, keep)
    going = fitted(elements[source], live.extents.of(source)) & zero
    live.note_zero(source, going)
    for operand, counts in elements.items():
        live.need(operand, counts & ~going if operand is source else counts)
