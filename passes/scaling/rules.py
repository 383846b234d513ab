"""What every operator means for factors along an axis: it hands them on, takes them in, or blocks them.

An operator that stands nowhere here blocks what it touches: never wrong, at worst less is scaled.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphprune.axes.terms import leaves, placements
from graphprune.importance.readers import owners
from graphprune.operands import (
    CONVOLUTIONS,
    PRODUCTS,
    argument,
    depends_on_input,
    has_argument,
    reads_shape_only,
)

from ..commute import describe
from .segments import Key, Walk

aten = torch.ops.aten


def visit(walk: Walk, node: fx.Node) -> None:
    """Take one operator in."""
    if not any(walk.keys(value) for value in (node, *node.all_input_nodes)):
        return
    if node in walk.linears:
        _linear(walk, node)
    elif any(source is node.args[0] and reads_shape_only(node, source) for source in node.all_input_nodes):
        walk.block(walk.keys(node), f"{describe(node)} gives numbers of its own")
    else:
        _RULES.get(node.target, _block)(walk, node)
    known = {atom for source in node.all_input_nodes for atom, _ in walk.keys(source)}
    born = [key for key in walk.keys(node) if key[0] not in known]
    walk.block(born, f"{describe(node)} repeats its numbers along it")
    dims = walk.graph.typing.dims[node]
    places = range(len(dims)) if isinstance(dims, tuple) else ()
    held = [key for place in places for key in walk.keys(node, [place])]
    walk.block([k for k in held if held.count(k) > 1], f"{describe(node)} has it in two dimensions")


def _block(walk: Walk, node: fx.Node, why: str = "is not positively homogeneous") -> None:
    for value in (node, *node.all_input_nodes):
        walk.block(walk.keys(value), f"{describe(node)} {why}")


def _blocking(why: str) -> Callable[[Walk, fx.Node], None]:
    return lambda walk, node: _block(walk, node, why)


def _through(walk: Walk, node: fx.Node, *sources: Any) -> None:
    """Every axis of these operands goes on in the result; what ends here is blocked."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and not value.is_floating_point():
        _block(walk, node)
        return
    given = {atom for atom, _ in walk.keys(node)}
    for source in sources:
        for key in walk.keys(source):
            if key[0] not in given:
                walk.block([key], f"{describe(node)} runs over it")
            elif walk.graph.constant(source) is not None:
                walk.takes((key[0], node), source, node, "shift")
            else:
                walk.join((key[0], node), key)


def _first(walk: Walk, node: fx.Node) -> None:
    _through(walk, node, node.args[0])


def _item(walk: Walk, node: fx.Node) -> None:
    """An axis of another item ends here, unread."""
    given = {atom for atom, _ in walk.keys(node)}
    for key in walk.keys(node.args[0]):
        if key[0] in given:
            walk.join((key[0], node), key)


def _slice(walk: Walk, node: fx.Node) -> None:
    """An axis ends here, unread, where none of its positions is among those taken."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dims = walk.graph.typing.dims[source]
    dim = argument(node, "dim") % len(dims)  # type: ignore[arg-type]
    size = source.meta["val"].shape[dim]
    bounds = [argument(node, name) for name in ("start", "end", "step")]
    if not isinstance(size, int) or not all(b is None or isinstance(b, int) for b in bounds):
        _first(walk, node)
        return
    elsewhere = {atom for place, term in enumerate(dims) if place != dim for atom in leaves(term)}  # type: ignore[arg-type]
    along = placements(dims[dim])  # type: ignore[index]
    taken = {atom for atom, _ in along if (owners(along, atom)[slice(*bounds)] >= 0).any()}
    given = {atom for atom, _ in walk.keys(node)}
    for key in walk.keys(source):
        if key[0] in given:
            walk.join((key[0], node), key)
        elif key[0] in taken | elsewhere:
            walk.block([key], f"{describe(node)} runs over it")


def _linear(walk: Walk, node: fx.Node) -> None:
    linear = walk.linears[node]
    inputs = {atom for atom, _ in linear.inputs}
    outputs = {atom for atom, _ in linear.outputs}
    rank = len(walk.graph.typing.dims[node])  # type: ignore[arg-type]
    others = [d for d in range(-rank, 0) if d != linear.channels]
    for source in (linear.source, node):
        beside = walk.keys(source, [d for d in others if d >= -source.meta["val"].dim()])
        walk.block(beside, f"{describe(node)} has it beside its channels")
    for key in walk.keys(linear.source):
        if key[0] in inputs:
            walk.reads(linear, key[0])
        else:
            walk.block([key], f"{describe(node)} has it beside its channels")
    for key in walk.keys(node):
        if key[0] in outputs:
            walk.writes(linear, key[0])


def _sum(walk: Walk, node: fx.Node) -> None:
    """All operands scaled alike; a parameter among them takes the factors in."""
    for key in walk.keys(node):
        for operand in node.args[:2]:
            own = [other for other in walk.keys(operand) if other[0] is key[0]]
            if not own:
                what = "a number" if not isinstance(operand, fx.Node) else describe(operand)
                walk.block([key], f"{describe(node)} adds {what} that has no axis to scale")
            elif walk.graph.constant(operand) is not None:
                walk.takes(key, operand, node, "shift")
            else:
                walk.join(key, own[0])
    given = {atom for atom, _ in walk.keys(node)}
    for operand in node.args[:2]:
        walk.block([k for k in walk.keys(operand) if k[0] not in given], f"{describe(node)} runs over it")


def _concat(walk: Walk, node: fx.Node) -> None:
    _through(walk, node, *argument(node, "tensors"))


def _factor(walk: Walk, node: fx.Node) -> None:
    """One operand is scaled; the other one is a number, a gate that is not, or a gain that takes it in."""
    left, right = node.args[:2]
    if left is right:
        _block(walk, node, "squares it")
        return
    divides = node.target is aten.div.Tensor
    given = {atom for atom, _ in walk.keys(node)}
    for operand in (left, right):
        walk.block([k for k in walk.keys(operand) if k[0] not in given], f"{describe(node)} runs over it")
    for key in walk.keys(node):
        sides = [(o, k) for o in (left, right) for k in walk.keys(o) if k[0] is key[0]]
        if divides:
            walk.block([k for o, k in sides if o is right], f"{describe(node)} divides by it")
        open_ = [(o, k) for o, k in sides if not walk.blocked(k)]
        gains = [o for o, _ in open_ if walk.graph.constant(o) is not None]
        values = [k for o, k in open_ if o not in gains]
        if len(values) == 1:
            walk.join(key, values[0])
            walk.block([k for o, k in open_ if o in gains], f"{describe(node)} multiplies with it")
        elif not values and len(gains) == 1:
            walk.takes(key, gains[0], node, "gain")
        else:
            walk.block([key, *values], f"{describe(node)} multiplies two values along it")


def _product(walk: Walk, node: fx.Node) -> None:
    """A product of two values: rows of the left one, columns of the right one, batches of either."""
    if _is_linear(node):
        _block(walk, node, "multiplies with a weight that is computed; fold-parameters may help")
        return
    left, right = node.args[:2]
    short = any(not isinstance(o, fx.Node) or o.meta["val"].dim() < 2 for o in (left, right))
    if short or node.target is aten.addmm.default:
        _block(walk, node)
        return
    rows, columns = walk.keys(left, [-2]), walk.keys(right, [-1])
    for side in (walk.keys(left, [-1]), walk.keys(right, [-2])):
        walk.block(side, f"{describe(node)} sums over it")
    _batched(walk, node, [(left, rows), (right, columns)])


def _attention(walk: Walk, node: fx.Node) -> None:
    """Linear in the values alone."""
    query, key, value = node.args[:3]
    for operand in (query, key, *node.args[3:4], node.kwargs.get("attn_mask")):
        walk.block(walk.keys(operand), f"{describe(node)} takes a softmax of it")
    _batched(walk, node, [(value, walk.keys(value, [-1]))])


def _batched(walk: Walk, node: fx.Node, sides: list[tuple[Any, list[Key]]]) -> None:
    """Each side's own axes go on; an axis of several sides does where one of them alone is scaled."""
    own = {atom for _, keys in sides for atom, _ in keys}
    given = {atom for atom, _ in walk.keys(node)}
    for key in walk.keys(node):
        held = [k for operand, _ in sides for k in walk.keys(operand) if k[0] is key[0]]
        open_ = [k for k in held if not walk.blocked(k)]
        if len(open_) == 1 and (key[0] in own or len(held) <= len(sides)):
            walk.join(key, open_[0])
        else:
            walk.block([key, *open_], f"{describe(node)} multiplies two values along it")
    for operand, _ in sides:
        walk.block([k for k in walk.keys(operand) if k[0] not in given], f"{describe(node)} sums over it")


def _norm(walk: Walk, node: fx.Node) -> None:
    """What it reads is blocked; what it gives starts anew with a gain and a shift."""
    source = node.args[0]
    hint = "; fold-batch-norm comes first" if node.target is aten.batch_norm.default else ""
    walk.block(walk.keys(source), f"{describe(node)} normalises it{hint}")
    weight = argument(node, "weight")
    bias = argument(node, "bias") if has_argument(node, "bias") else None
    for key in walk.keys(node):
        along = [k[0] for k in walk.keys(weight)]
        if key[0] not in along:
            walk.block([key], f"{describe(node)} has no weight along it")
            continue
        walk.takes(key, weight, node, "gain")
        if bias is not None:
            walk.takes(key, bias, node, "shift")


def _embedding(walk: Walk, node: fx.Node) -> None:
    for key in walk.keys(node):
        walk.takes(key, node.args[0], node, "gain")


def _clamp(walk: Walk, node: fx.Node) -> None:
    """A ReLU where zero is its only bound."""
    bounds = [argument(node, name) for name in ("min", "max") if has_argument(node, name)]
    if any(bound not in (None, 0) for bound in bounds):
        _block(walk, node, "has a bound that would not follow")
    else:
        _first(walk, node)


def _pad(walk: Walk, node: fx.Node) -> None:
    constant = not has_argument(node, "mode") or argument(node, "mode") == "constant"
    if constant and argument(node, "value"):
        _block(walk, node, "pads with a number other than zero")
    else:
        _first(walk, node)


def _is_linear(node: fx.Node) -> bool:
    """Whether a product has an operand that only parameters go into."""
    return any(not depends_on_input(source) for source in node.all_input_nodes)


_COMPUTED = _blocking("has a weight that is computed or not a matrix; fold-parameters may help")

_RULES: dict[Any, Callable[[Walk, fx.Node], None]] = {
    operator.getitem: _item,
    aten.slice.Tensor: _slice,
    **dict.fromkeys((
        aten.relu.default, aten.leaky_relu.default, aten.prelu.default, aten.abs.default, aten.neg.default,
        aten.dropout.default, aten.feature_dropout.default,
        aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default,
        aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default,
        aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default,
        aten.adaptive_avg_pool3d.default, aten.mean.dim, aten.sum.dim_IntList, aten.amax.default,
        aten.amin.default, aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec,
        aten.upsample_nearest3d.vec, aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec,
        aten.upsample_trilinear3d.vec, aten.upsample_bicubic2d.vec, aten.pixel_shuffle.default,
        aten.pixel_unshuffle.default, aten.channel_shuffle.default,
        aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints,
        aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
        aten.unsqueeze.default, aten.clone.default, aten.contiguous.default, aten.alias.default,
        aten.detach.default, aten.permute.default, aten.transpose.int, aten.movedim.int,
        aten.movedim.intlist, aten.t.default, aten.mT.default, aten.numpy_T.default, aten.swapaxes.default,
        aten.select.int, aten.unbind.int, aten.flip.default, aten.roll.default, aten.expand.default,
        aten.repeat.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes,
        aten.chunk.default, aten.narrow.default, aten.reshape_as.default, aten.view_as.default,
        aten.expand_as.default, aten.type_as.default, aten.to.other, aten.to.dtype, aten.to.dtype_layout,
        aten.to.device, aten._to_copy.default), _first),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _sum),
    **dict.fromkeys((aten.cat.default, aten.stack.default), _concat),
    **dict.fromkeys((aten.mul.Tensor, aten.div.Tensor), _factor),
    **dict.fromkeys((aten.mul.Scalar, aten.div.Scalar), _first),
    **dict.fromkeys((aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default), _clamp),
    **dict.fromkeys((aten.hardtanh.default, aten.relu6.default),
                    _blocking("has a bound that would not follow; replace-relu6 may help")),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _pad),
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default,
                     aten.batch_norm.default, aten.instance_norm.default), _norm),
    aten.embedding.default: _embedding,
    aten.scaled_dot_product_attention.default: _attention,
    **dict.fromkeys((*PRODUCTS, aten.bmm.default), _product),
    **dict.fromkeys((*CONVOLUTIONS, aten.linear.default), _COMPUTED),
}  # fmt: skip
