"""The rules of :mod:`.dead.liveness` for what sums over channels: layers, products, attention.

This is where positions die: an operand's element counts for those results that its weight takes it to, and
a constant one that goes counts for none, once its share is in the bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphprune.operands import argument

from .contractions import CONTRACTIONS, Contraction, bias_of
from .liveness import Liveness, Marks, fitted
from .liveness_rules import RULES, everything, register
from .products import (
    MAX_TERMS,
    is_distribution,
    letters,
    needed_of_attention,
    needed_of_einsum,
    needed_of_product,
    terms,
)
from .recurrent import needed_of_recurrent

aten = torch.ops.aten


def _contraction(live: Liveness, node: fx.Node, keep: Marks) -> None:
    site = live.values.contraction(node)
    if site is not None and node.all_input_nodes.count(site.source) == 1 and site.source is not site.weight:
        _channels(live, site, keep)
    elif node.target in _MATRIX_PRODUCTS:
        _matrix_product(live, node, keep)
    else:
        everything(live, node, keep)


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
        everything(live, node, keep)
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
        everything(live, node, keep)
        return
    width = live.extents.gone(left, keep)  # type: ignore[arg-type]
    gone = width.flatten(0, -2).all(0) if width.dim() > 1 else width
    for_left, for_right = needed_of_product(live.needed(node), zero_left, zero_right, gone)
    live.need(left, for_left)  # type: ignore[arg-type]
    live.need(right, for_right)  # type: ignore[arg-type]
    live.note_zero(left, known[0].zero & gone)  # type: ignore[arg-type]
    live.note_zero(right, known[1].zero & gone[:, None])  # type: ignore[arg-type]


@register("einsum")
def _einsum(live: Liveness, node: fx.Node, keep: Marks) -> None:
    named, operands = letters(node), node.args[1]
    left: Any = operands[0]  # type: ignore[index]
    right: Any = operands[-1]  # type: ignore[index]
    if named is None:
        everything(live, node, keep)
        return
    zero_left, zero_right = (fitted(live.values.of(n).zero, live.extents.of(n)) for n in (left, right))
    gone = live.extents.gone(left, keep)
    for_left, for_right = needed_of_einsum(named, live.needed(node), zero_left, zero_right, gone)
    live.need(left, for_left)
    live.need(right, for_right)
    live.note_zero(left, zero_left & gone)
    live.note_zero(right, zero_right & live.extents.gone(right, keep))


@register("glu")
def _gated(live: Liveness, node: fx.Node, keep: Marks) -> None:
    needed, dim = live.needed(node), argument(node, "dim")
    live.need(node.args[0], needed if needed.shape[dim] == 1 else torch.cat([needed, needed], dim))  # type: ignore[arg-type]


@register("scaled_dot_product_attention")
def _attention(live: Liveness, node: fx.Node, keep: Marks) -> None:
    query, key, value = node.args[:3]
    if query is key or key is value or query is value:
        everything(live, node, keep)
        return
    width = live.extents.gone(query, keep)  # type: ignore[arg-type]
    gone = width.flatten(0, -2).all(0)
    for source, elements in zip(
        (query, key, value), needed_of_attention(live.values, node, live.needed(node), gone), strict=True
    ):
        live.need(source, elements)  # type: ignore[arg-type]
    for source in (query, key):
        live.note_zero(source, live.values.of(source).zero & gone)  # type: ignore[arg-type]
    mask = argument(node, "attn_mask")
    if mask is not None:
        live.need(mask)


@register("lstm.input gru.input rnn_tanh.input rnn_relu.input")
def _recurrent(live: Liveness, node: fx.Node, keep: Marks) -> None:
    wanted = [live.needed(node, i) for i in range(len(node.meta["val"]))]
    elements = needed_of_recurrent(live.values, node, wanted)
    if elements is None:
        everything(live, node, keep)
        return
    source: Any = node.args[0]
    zero = live.values.of(source).zero & live.extents.gone(source, keep)
    going = fitted(elements[source], live.extents.of(source)) & zero
    live.note_zero(source, going)
    for operand, counts in elements.items():
        live.need(operand, counts & ~going if operand is source else counts)
