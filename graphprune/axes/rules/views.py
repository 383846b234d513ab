"""Reshapes and permutations: the same positions under other dimensions.

A reshape splits into runs of dimensions with equal products; inside a run the factors of the operand are
regrouped row-major. Where they do not divide along, that run freezes and the others do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import fx

from ...cost import size_hint
from ..terms import UNIT, Atom, Reason, Term, factors, leaves, product
from ..typing import SYMBOLIC, Dims, Kept, Typed, Typing, aten_operators, rule

aten = torch.ops.aten


def reshape(t: Typing, node: fx.Node, dims: Dims, shape: Sequence[object]) -> Dims:
    """The dimensions ``dims`` seen as ``shape``."""
    sizes = [s if s.__class__ is int else size_hint(s) for s in shape]
    if 0 in sizes:
        t.freeze(dims, "is seen as a shape without elements", node)
        return tuple([t.fixed(s, _MISFIT) for s in shape])
    result: list[Term] = []
    i = j = 0
    while i < len(dims) or j < len(sizes):
        ours = theirs = 1
        start, begin = i, j
        if i < len(dims):
            ours, i = dims[i].size, i + 1
        if j < len(sizes):
            theirs, j = sizes[j], j + 1
        while ours != theirs:
            if ours < theirs:
                ours, i = ours * dims[i].size, i + 1
            else:
                theirs, j = theirs * sizes[j], j + 1
        if (
            i - start == 1
            and j - begin == 1
            and _is_symbolic(dims[start]) == (shape[begin].__class__ is not int)
        ):
            result.append(dims[start])
            continue
        result.extend(_run(t, node, dims[start:i], shape[begin:j]))
    return tuple(result)


def _is_symbolic(term: Term) -> bool:
    return any(leaf.frozen is SYMBOLIC for leaf in leaves(term))


def _run(t: Typing, node: fx.Node, terms: Dims, shape: Sequence[object]) -> list[Term]:
    """Dimensions as others of the same product.

    A symbolic size is at its captured value here, which may divide where others do not. So it stays
    whole: what lies before it in the one shape lies before it in the other, or all of it freezes.
    """
    flat = [f for term in terms for f in factors(term)]
    ours = [place for place, factor in enumerate(flat) if _is_symbolic(factor)]
    theirs = [place for place, size in enumerate(shape) if size.__class__ is not int]
    if not ours and not theirs:
        return t.regroup(node, flat, list(shape))  # type: ignore[arg-type]
    if len(shape) == 1 and theirs:
        return [product(*flat)]
    if len(ours) == len(theirs) == 1:
        before, after = shape[: theirs[0]], shape[theirs[0] + 1 :]
        left, right = flat[: ours[0]], flat[ours[0] + 1 :]
        some, over = divmod(prod(f.size for f in left), prod(before))  # type: ignore[arg-type]
        rest, odd = divmod(prod(f.size for f in right), prod(after))  # type: ignore[arg-type]
        if not over and not odd:
            *first, inner = t.regroup(node, left, [*before, some])  # type: ignore[list-item]
            outer, *last = t.regroup(node, right, [rest, *after])  # type: ignore[list-item]
            return [*first, product(inner, flat[ours[0]], outer), *last]
    t.freeze(terms, "is reshaped together with a symbolic size", node)
    return [t.fixed(s, _MISFIT) for s in shape]


_MISFIT = Reason("comes out of a reshape that does not follow the axes")


@rule(*aten_operators("view reshape _unsafe_view"))
def view(t: Typing, node: fx.Node) -> Typed:
    """Row-major regrouping; the sizes follow."""
    result = reshape(t, node, t.of(node.args[0]), t.shape(node))
    t.derive_sizes(node, 1, result)
    return result


@rule(*aten_operators("view_as reshape_as"))
def view_as(t: Typing, node: fx.Node) -> Typed:
    """Row-major regrouping to the shape of another tensor."""
    result = reshape(t, node, t.of(node.args[0]), t.shape(node))
    for ours, theirs in zip(result, t.of(node.args[1]), strict=True):
        t.same(ours, theirs, node)
    return result


@rule(*aten_operators("squeeze squeeze.dim squeeze.dims"))
def squeeze(t: Typing, node: fx.Node) -> Typed:
    """Dimensions of one position go; one that only shrinks to a single position stays."""
    x = t.of(node.args[0])
    shape = t.shape(node.args[0])
    named = node.args[1] if len(node.args) > 1 else range(len(shape))
    places = {d % len(shape) for d in ([named] if isinstance(named, int) else named)} if len(shape) else set()
    gone = [d for d in sorted(places) if isinstance(shape[d], int) and shape[d] == 1]

    def write(copy: fx.Node, kept: Kept) -> None:
        if any(kept(x[d]) == 1 for d in places.difference(gone)):
            copy.target, copy.args = aten.squeeze.dims, (copy.args[0], gone)

    t.derive(node, write)
    return tuple(term for d, term in enumerate(x) if d not in gone)


@rule(*aten_operators("flatten.using_ints unsqueeze ravel"))
def reshape_without_sizes(t: Typing, node: fx.Node) -> Typed:
    """Row-major regrouping that names no size."""
    return reshape(t, node, t.of(node.args[0]), t.shape(node))


@rule(aten.unflatten.int)
def unflatten(t: Typing, node: fx.Node) -> Typed:
    """One dimension as several; the sizes follow."""
    x = t.of(node.args[0])
    result = reshape(t, node, x, t.shape(node))
    dim: int = node.args[1] % len(x)
    t.derive_sizes(node, 2, result[dim : dim + len(node.args[2])])
    return result


@rule(aten.permute.default)
def permute(t: Typing, node: fx.Node) -> Typed:
    """Dimensions in another order."""
    x = t.of(node.args[0])
    return tuple([x[d] for d in node.args[1]])


@rule(*aten_operators("transpose.int swapaxes swapdims"))
def transpose(t: Typing, node: fx.Node) -> Typed:
    """Two dimensions change places."""
    x = list(t.of(node.args[0]))
    if x:
        a, b = node.args[1:3]
        x[a], x[b] = x[b], x[a]
    return tuple(x)


@rule(*aten_operators("t numpy_T mT matrix_H adjoint"))
def transpose_last(t: Typing, node: fx.Node) -> Typed:
    """The last two dimensions change places (``numpy_T``: all of them turn round)."""
    x = t.of(node.args[0])
    if node.target is aten.numpy_T.default or len(x) < 2:
        return x[::-1]
    return (*x[:-2], x[-1], x[-2])


@rule(*aten_operators("movedim.int movedim.intlist moveaxis.int moveaxis.intlist"))
def movedim(t: Typing, node: fx.Node) -> Typed:
    """Dimensions move to other places."""
    x = t.of(node.args[0])
    source, target = ([d] if isinstance(d, int) else list(d) for d in node.args[1:3])
    moved = {d % len(x): s % len(x) for s, d in zip(source, target, strict=True)}
    rest = iter(i for i in range(len(x)) if i not in moved.values())
    return tuple(x[moved[i]] if i in moved else x[next(rest)] for i in range(len(x)))


@rule(*aten_operators("expand broadcast_to expand_copy"))
def expand(t: Typing, node: fx.Node) -> Typed:
    """Dimensions of size one become axes of their own, whose sizes follow."""
    x = t.of(node.args[0])
    shape = t.shape(node)
    padded = (UNIT,) * (len(shape) - len(x)) + x
    result = tuple([old if old.size != 1 else t.fresh(s, node) for old, s in zip(padded, shape, strict=True)])
    t.derive_sizes(node, 1, result)
    return result


@rule(aten.expand_as.default)
def expand_as(t: Typing, node: fx.Node) -> Typed:
    """Broadcast to another tensor's shape."""
    from .elementwise import broadcast

    return broadcast(t, node, [t.of(node.args[1]), t.of(node.args[0])])


@rule(*aten_operators("repeat tile"))
def repeat(t: Typing, node: fx.Node) -> Typed:
    """Copies one after another: ``Product(copies, axis)``; the counts follow."""
    x = t.of(node.args[0])
    counts: Sequence[object] = node.args[1]
    rank = max(len(counts), len(x))
    padded = (UNIT,) * (rank - len(x)) + x
    filled = [1] * (rank - len(counts)) + list(counts)
    copies = [t.fresh(c if isinstance(c, int) else c.meta["val"], node) for c in filled]
    t.derive_sizes(node, 1, copies[rank - len(counts) :])
    return tuple(product(c, term) for c, term in zip(copies, padded, strict=True))


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(t: Typing, node: fx.Node) -> Typed:
    """Every position several times in a row: ``Product(axis, copies)``."""
    x = list(t.of(node.args[0]))
    count = node.args[1]
    dim = node.args[2] if len(node.args) > 2 else None
    if dim is None:
        x, dim = [product(*x)], 0
    if not isinstance(count, int):
        return t.unknown(node)
    copies = t.fresh(count, node)
    t.derive_argument(node, 1, copies)
    if "output_size" in node.kwargs and node.kwargs["output_size"] is not None:
        t.freeze((x[dim], copies), "its result has a fixed size", node)
    x[dim] = product(x[dim], copies)
    return tuple(x)


@rule(*aten_operators("pixel_shuffle pixel_unshuffle"))
def pixel_shuffle(t: Typing, node: fx.Node) -> Typed:
    """``[…, C·r², H, W] ↔ […, C, H·r, W·r]`` with ``C·r² = Product(C, r, r)``."""
    x = t.of(node.args[0])
    factor: int = node.args[1]
    shape = t.shape(node)
    extents = [t.fixed(s, _PIXELS) for s in shape[-2:]]
    t.freeze(x[-2:], "pixels are moved", node)
    grid = Atom(factor * factor, _PIXELS)
    if node.target is aten.pixel_unshuffle.default:
        return (*x[:-3], product(x[-3], grid), *extents)
    channels, square = t.regroup(node, [x[-3]], [x[-3].size // factor**2, factor**2])
    t.freeze(square, "pixels are moved", node)
    return (*x[:-3], channels, *extents)


_PIXELS = Reason("pixels are moved into or out of channels")


@rule(*aten_operators("channel_shuffle native_channel_shuffle"))
def channel_shuffle(t: Typing, node: fx.Node) -> Typed:
    """``Product(groups, c)`` becomes ``Product(c, groups)``; the group count follows."""
    x = t.of(node.args[0])
    groups: int = node.args[1]
    group, inner = t.regroup(node, [x[1]], [groups, x[1].size // groups])
    t.derive_argument(node, 1, group)
    return (x[0], product(inner, group), *x[2:])


@rule(*aten_operators("view_as_real view_as_complex"))
def complex_view(t: Typing, node: fx.Node) -> Typed:
    """Pairs of real and imaginary parts."""
    x = t.of(node.args[0])
    if node.target is aten.view_as_real.default:
        return (*x, t.fixed(2, _COMPLEX))
    t.freeze(x[-1], "real and imaginary parts", node)
    return x[:-1]


_COMPLEX = Reason("real and imaginary parts")
