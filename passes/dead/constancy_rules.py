"""The rules of :mod:`.dead.constancy`: what bounds an operator gives its result.

What only moves elements moves bounds (:mod:`.dead.movement`); pointwise operators have a file of
their own. What a normalisation gives is bounded by the number of elements it runs over:
``|x - mean| / std <= sqrt(n)``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphprune.cost import size_hint
from graphprune.operands import argument, has_argument

from .constancy import MAX_WEIGHT, Constancy
from .constancy_pointwise import RULES, known, rule
from .contractions import CONTRACTIONS, bias_of
from .extents import is_float
from .intervals import Interval
from .movement import Reduce, is_move, move, moved
from .products import attended, is_distribution, multiplied, summed

aten = torch.ops.aten


def bounds(values: Constancy, node: fx.Node) -> Any:
    """Bounds of an operator's result or results; ``None`` for nothing known."""
    if node.target is operator.getitem:
        return values.results(node.args[0])[node.args[1]]  # type: ignore[arg-type,index]
    rule = RULES.get(node.target)
    if rule is None and is_move(values.extents, node):
        rule = _moving
    found = rule(values, node) if rule is not None else None
    return known(values, node) if found is None else found


def _least(value: torch.Tensor, dims: Any) -> torch.Tensor:
    return value.amin(list(dims), keepdim=True)


def _most(value: torch.Tensor, dims: Any) -> torch.Tensor:
    return value.amax(list(dims), keepdim=True)


def _moving(values: Constancy, node: fx.Node) -> Any:
    operands = [values.of(source) for source in moved(node)]
    if getattr(node.target, "_schema", None) is not None and _is_on(node):
        return None  # dropout that is on in evaluation mode, too
    if not all(is_float(source.meta.get("val")) for source in moved(node)):
        return None  # a cast from integers keeps no bounds

    def side(bound: Callable[[Interval], torch.Tensor], reduce: Reduce) -> list[torch.Tensor]:
        return move(values.extents, node, [bound(o) for o in operands], reduce)

    found = [Interval(lo, hi) for lo, hi in
             zip(side(lambda o: o.lo, _least), side(lambda o: o.hi, _most), strict=True)]  # fmt: skip
    return found if isinstance(node.meta["val"], (tuple, list)) else found[0]


def _is_on(node: fx.Node) -> bool:
    return any(a.name == "train" and argument(node, "train") for a in node.target._schema.arguments)  # type: ignore[union-attr]


@rule("avg_pool1d avg_pool2d avg_pool3d")
def _average(values: Constancy, node: fx.Node) -> Any:
    if node.target is not aten.avg_pool1d.default and argument(node, "divisor_override") is not None:
        return None
    found = _moving(values, node)
    padded = any(argument(node, "padding")) and argument(node, "count_include_pad")
    return found.with_number(0.0) if padded else found


@rule("im2col")
def _patches(values: Constancy, node: fx.Node) -> Any:
    found = _moving(values, node)
    return found.with_number(0.0) if any(argument(node, "padding")) else found


@rule("glu")
def _gated(values: Constancy, node: fx.Node) -> Interval:
    x, dim = values.of(node.args[0]), argument(node, "dim")
    if x.shape[dim] == 1:
        return x * x.map(torch.sigmoid)
    parts = [Interval(*halves) for halves in zip(x.lo.chunk(2, dim), x.hi.chunk(2, dim), strict=True)]
    return parts[0] * parts[1].map(torch.sigmoid)


@rule("constant_pad_nd pad")
def _padded(values: Constancy, node: fx.Node) -> Any:
    if node.target is aten.pad.default and argument(node, "mode") != "constant":
        return _moving(values, node)
    value, amounts = float(argument(node, "value") or 0.0), argument(node, "pad")
    extent = values.extents.of(node)
    moved_ = _moving(values, node)
    beside = [
        len(extent) - 1 - pair for pair in range(len(amounts) // 2) if any(amounts[2 * pair : 2 * pair + 2])
    ]
    if any(extent[place] != 1 for place in beside) and value != 0:
        return None
    return moved_.with_number(value) if any(extent[place] == 1 for place in beside) else moved_


# ---- reductions ----------------------------------------------------------------------------------


@rule("mean mean.dim amax amin")
def _average_over(values: Constancy, node: fx.Node) -> Interval:
    x = values.of(node.args[0])
    places, keep = reduced(node)
    found = x.over(places)
    return found if keep else found.map(lambda bound: bound.squeeze(places) if places else bound)


@rule("sum sum.dim_IntList")
def _total(values: Constancy, node: fx.Node) -> Interval | None:
    x, (places, keep) = values.of(node.args[0]), reduced(node)
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    for place in places:
        x = total(x, place, shape[place])
    return x if keep else x.map(lambda bound: bound.squeeze(places) if places else bound)


def total(x: Interval, place: int, size: Any) -> Interval:
    """The sum over one dimension of ``size`` elements (symbolic: any number)."""
    if x.shape[place] != 1:
        return Interval(x.lo.sum(place, keepdim=True), x.hi.sum(place, keepdim=True))
    count = (
        Interval.between(float(size), float(size), 0)
        if isinstance(size, int)
        else Interval.between(0.0, math.inf, 0)
    )
    return x * count


@rule("linalg_vector_norm")
def _norm(values: Constancy, node: fx.Node) -> Interval | None:
    """At least 0, and 0 for what is 0."""
    x, (places, keep) = values.of(node.args[0]), reduced(node)
    found = Interval.between(0.0, math.inf, x.lo.dim()) * Interval.of((~x.zero).double())
    found = found.over(places)
    return found if keep else found.map(lambda bound: bound.squeeze(places) if places else bound)


def reduced(node: fx.Node) -> tuple[list[int], bool]:
    """The dimensions a reduction takes together (all where it names none), and whether they stay."""
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    dims = argument(node, "dim") if has_argument(node, "dim") else None
    keep = bool(argument(node, "keepdim")) if has_argument(node, "keepdim") else False
    if dims is None or dims == []:
        return list(range(rank)), keep
    return sorted(d % rank for d in ([dims] if isinstance(dims, int) else dims)), keep


# ---- normalisations ------------------------------------------------------------------------------


@rule("batch_norm")
def _batch_norm(values: Constancy, node: fx.Node) -> Interval | None:
    scale = batch_norm_scale(values, node)
    if scale is None:
        return None
    weight, shift = scale
    shape = [1] * node.meta["val"].dim()
    shape[1] = -1
    return values.of(node.args[0]) * Interval.of(weight.view(shape)) + Interval.of(shift.view(shape))


def batch_norm_scale(values: Constancy, node: fx.Node) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Scale and shift ``[C]`` of a batch norm in evaluation mode, where they are known."""
    given = [values.weights.of(node.args[i]) for i in (1, 2, 3, 4)]
    mean, variance = given[2:]
    if argument(node, "training") or mean is None or variance is None:
        return None
    if any(a is not None and g is None for a, g in zip(node.args[1:3], given[:2], strict=True)):
        return None
    weight, bias, mean, variance = (None if g is None else g.detach().to("cpu", torch.float64) for g in given)
    assert mean is not None
    assert variance is not None
    scale = (variance + argument(node, "eps")).rsqrt() * (1.0 if weight is None else weight)
    return scale, (0.0 if bias is None else bias) - mean * scale


@rule("layer_norm rms_norm group_norm instance_norm")
def _normalised(values: Constancy, node: fx.Node) -> Interval:
    rank = node.meta["val"].dim()
    count, weight, bias = math.inf, argument(node, "weight"), None
    if node.target in (aten.layer_norm.default, getattr(aten.rms_norm, "default", None)):
        count = float(math.prod(map(size_hint, argument(node, "normalized_shape"))))
    if node.target is not getattr(aten.rms_norm, "default", None):
        bias = argument(node, "bias")
    found = Interval.between(-math.sqrt(count), math.sqrt(count), rank)
    for affine, apply in ((weight, Interval.__mul__), (bias, Interval.__add__)):
        if affine is not None:
            found = apply(found, _along_channels(values.of(affine), node))
    return found


def _along_channels(value: Interval, node: fx.Node) -> Interval:
    if node.target in (aten.layer_norm.default, getattr(aten.rms_norm, "default", None)):
        return value
    return value.map(lambda bound: bound.view((1, -1, *[1] * (node.meta["val"].dim() - 2))))


@rule("softmax.int _softmax")
def _softmax(values: Constancy, node: fx.Node) -> Interval:
    return Interval.between(0.0, 1.0, node.meta["val"].dim())


@rule("log_softmax.int _log_softmax")
def _log_softmax(values: Constancy, node: fx.Node) -> Interval:
    return Interval.between(-math.inf, 0.0, node.meta["val"].dim())


# ---- contractions --------------------------------------------------------------------------------


def _contracted(values: Constancy, node: fx.Node) -> Interval | None:
    site = values.contraction(node)
    if site is None:
        return None if node.target not in _MATRIX_PRODUCTS else _matrix_product(values, node)
    if node.target is aten.addmm.default and site.fixed_bias.endswith("factors of its own"):
        return None
    if site.matrix.numel() > MAX_WEIGHT:
        return None
    bias, rank = bias_of(node), node.meta["val"].dim()
    added = None
    if bias is not None:
        shape = [1] * rank
        shape[site.channel] = -1
        added = values.of(bias)
        added = added.map(lambda bound: bound.view(shape)) if added.lo.dim() == 1 else added
    return site.bounds(values.of(site.source), added)


_MATRIX_PRODUCTS = frozenset({aten.mm.default, aten.matmul.default, aten.bmm.default})
RULES.update(dict.fromkeys(CONTRACTIONS | _MATRIX_PRODUCTS, _contracted))


def _matrix_product(values: Constancy, node: fx.Node) -> Interval | None:
    left, right = node.args[:2]
    if min(left.meta["val"].dim(), right.meta["val"].dim()) < 2:  # type: ignore[union-attr]
        return None
    if is_distribution(left):  # type: ignore[arg-type]
        found = values.of(right).over([values.of(right).lo.dim() - 2])
        batch = values.of(left).lo[..., :1, :1]
        return Interval(*(torch.broadcast_tensors(b, batch * 0)[0] for b in (found.lo, found.hi)))
    return multiplied(values.of(left), values.of(right), left.meta["val"].shape[-1])  # type: ignore[union-attr]


@rule("scaled_dot_product_attention")
def _attention(values: Constancy, node: fx.Node) -> Interval:
    return attended(values, node)


@rule("einsum")
def _einsum(values: Constancy, node: fx.Node) -> Interval | None:
    return summed(values, node)


@rule("embedding")
def _looked_up(values: Constancy, node: fx.Node) -> Interval:
    table = values.of(node.args[0]).over([0])
    return table.map(lambda bound: bound.view((*[1] * (node.meta["val"].dim() - 1), -1)))


@rule("lstm.input")
def _lstm(values: Constancy, node: fx.Node) -> list[Interval]:
    """The state is a gate times a tanh; what a projection makes of it is not known."""
    found = values.unknown(node)
    gates, width = node.args[2][1].meta["val"].shape  # type: ignore[index,union-attr]
    if gates == 4 * width:
        found[:2] = [Interval.between(-1.0, 1.0, v.dim()) for v in node.meta["val"][:2]]
    return found
