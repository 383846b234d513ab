"""Concatenation and its inverses: split, chunk, slice, pad, select, stack.

A slice is a part of ``Concat(before, part, after)``; a strided slice ``x[s::k]`` is one column of
``Product(n/k, k)``. Split points follow their parts, so ``chunk`` and even splits become
``split_with_sizes`` once parts differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..terms import Atom, Reason, Term, concat, freeze, leaves
from ..typing import Dims, Kept, Typed, Typing, aten_operators, rule
from ..unification import Misfit, cut

aten = torch.ops.aten


@rule(*aten_operators("cat concat concatenate"))
def cat(t: Typing, node: fx.Node) -> Typed:
    """Parts along ``dim``; every other dimension is one axis."""
    operands = [dims for dims in (t.of(a) for a in node.args[0]) if not _is_legacy_empty(dims)]
    dim = node.args[1] if len(node.args) > 1 else 0
    result = list(operands[0])
    dim = dim % len(result)
    for dims in operands[1:]:
        for place, term in enumerate(dims):
            if place != dim:
                t.same(result[place], term, node)
    result[dim] = concat(*[dims[dim] if dims[dim].size != 1 else _single(t, node) for dims in operands])
    return tuple(result)


def _is_legacy_empty(dims: Dims) -> bool:
    return len(dims) == 1 and dims[0].size == 0


def _single(t: Typing, node: fx.Node) -> Term:
    return Atom(1, Reason("a single position", node))


@rule(*aten_operators("stack"))
def stack(t: Typing, node: fx.Node) -> Typed:
    """A new dimension that keeps its positions; the others are one axis."""
    operands = [t.of(a) for a in node.args[0]]
    dim: int = node.args[1] if len(node.args) > 1 else 0
    first = operands[0]
    for dims in operands[1:]:
        for ours, theirs in zip(first, dims, strict=True):
            t.same(ours, theirs, node)
    dim %= len(first) + 1
    return (*first[:dim], t.fixed(len(operands), _STACKED), *first[dim:])


_STACKED = Reason("tensors stacked side by side")


@rule(*aten_operators("unbind.int"))
def unbind(t: Typing, node: fx.Node) -> Typed:
    """One result a position, so positions stay."""
    x = t.of(node.args[0])
    dim: int = node.args[1] if len(node.args) > 1 else 0
    dim %= len(x)
    t.freeze(x[dim], "its positions are taken apart", node)
    rest = x[:dim] + x[dim + 1 :]
    return [rest] * x[dim].size


@rule(*aten_operators("select.int"))
def select(t: Typing, node: fx.Node) -> Typed:
    """One position of a dimension, which therefore keeps its positions."""
    x = t.of(node.args[0])
    dim: int = node.args[1] % len(x)
    t.freeze(x[dim], "one of its positions is selected", node)
    return x[:dim] + x[dim + 1 :]


@rule(*aten_operators("split.Tensor split_with_sizes split.sizes chunk tensor_split.sections unsafe_chunk"))
def split(t: Typing, node: fx.Node) -> Typed:
    """Parts of ``Concat``; the split becomes ``split_with_sizes`` with the parts' sizes."""
    x = t.of(node.args[0])
    dim: int = node.args[2] if len(node.args) > 2 else 0
    dim %= len(x)
    value: Sequence[Any] = node.meta["val"]
    sizes = [v.shape[dim] for v in value]
    if not all(isinstance(s, int) for s in sizes):
        t.freeze(x[dim], "is split at computed points", node)
        return t.fixed_like(value, _PIECES)
    pieces = _cut(t, node, x[dim], sizes)
    if pieces is None:
        return [(*x[:dim], t.fixed(s, _PIECES), *x[dim + 1 :]) for s in sizes]

    def write(copy: fx.Node, kept: Kept) -> None:
        new = [kept(p) for p in pieces]
        if new != sizes:
            copy.target = aten.split_with_sizes.default
            copy.args = (copy.args[0], new, dim)

    t.derive(node, write)
    return [(*x[:dim], p, *x[dim + 1 :]) for p in pieces]


def _cut(t: Typing, node: fx.Node, term: Term, sizes: Sequence[int]) -> list[Term] | None:
    try:
        return cut(term, sizes)
    except Misfit as misfit:
        t.misfit(node, misfit, term)
        return None


_PIECES = Reason("a piece that does not follow the axes")


@rule(*aten_operators("slice.Tensor narrow"))
def slice_(t: Typing, node: fx.Node) -> Typed:
    """``before | part | after``; start and end follow. A step takes one column of a grid."""
    x = t.of(node.args[0])
    args = [*node.args[1:], *[None] * 4]
    if not x:
        return x
    dim: int = (args[0] or 0) % len(x)
    term = x[dim]
    out = t.shape(node)[dim]
    start, end = args[1], args[2]
    step = 1
    if node.target is aten.narrow.default:
        end = start + end if isinstance(start, int) and isinstance(end, int) else node
    else:
        step = args[3] or 1
    if isinstance(out, int) and out == term.size and node.target is not aten.narrow.default:
        return x  # whatever its bounds are, they cover a shorter dimension too; a length would not
    if not isinstance(out, int) or any(v is not None and not isinstance(v, int) for v in (start, end)):
        t.freeze(term, "is sliced at computed points", node)
        return (*x[:dim], t.fixed(out, _PIECES), *x[dim + 1 :])
    begin = start or 0
    begin = max(begin + term.size, 0) if begin < 0 else min(begin, term.size)
    if step != 1:
        return _strided(t, node, x, dim, begin, out, step)
    pieces = _cut(t, node, term, [begin, out, term.size - begin - out])
    if pieces is None:
        return (*x[:dim], t.fixed(out, _PIECES), *x[dim + 1 :])
    before, part, _ = pieces

    def write(copy: fx.Node, kept: Kept) -> None:
        if kept(term) == term.size:
            return
        start, length = kept(before), kept(part)
        last = length if copy.target is aten.narrow.default else start + length
        copy.args = (copy.args[0], dim, start, last)

    t.derive(node, write)
    return (*x[:dim], part, *x[dim + 1 :])


def _strided(t: Typing, node: fx.Node, x: Dims, dim: int, begin: int, out: int, step: int) -> Typed:
    term = x[dim]
    if begin >= step or out * step != term.size:
        t.freeze(term, "is sliced with a step", node)
        return (*x[:dim], t.fixed(out, _PIECES), *x[dim + 1 :])
    rows, column = t.regroup(node, [term], [out, step])
    t.freeze(column, "is sliced with a step", node)

    def write(copy: fx.Node, kept: Kept) -> None:
        if kept(term) != term.size:
            copy.args = (copy.args[0], dim, begin, kept(term), step)

    t.derive(node, write)
    return (*x[:dim], rows, *x[dim + 1 :])


@rule(*aten_operators("slice_scatter select_scatter"))
def scatter_slice(t: Typing, node: fx.Node) -> Typed:
    """A part is overwritten; the dimension it lies along keeps its positions, the others are one axis."""
    base, source = t.of(node.args[0]), t.of(node.args[1])
    dim: int = node.args[2] if len(node.args) > 2 else 0
    dim %= len(base)
    t.freeze(base[dim], "a part of it is overwritten", node)
    if node.target is aten.slice_scatter.default:
        t.freeze(source[dim], "it overwrites a part", node)
        source = source[:dim] + source[dim + 1 :]
    for ours, theirs in zip(base[:dim] + base[dim + 1 :], source, strict=True):
        t.same(ours, theirs, node)
    return base


@rule(*aten_operators("constant_pad_nd pad reflection_pad1d reflection_pad2d reflection_pad3d "
                      "replication_pad1d replication_pad2d replication_pad3d"))  # fmt: skip
def pad(t: Typing, node: fx.Node) -> Typed:
    """A constant before and after is ``Concat(new, axis, new)``; any other padding reads its neighbours."""
    x = list(t.of(node.args[0]))
    amounts: Sequence[Any] = node.args[1]
    mode = node.args[2] if node.target is aten.pad.default and len(node.args) > 2 else "constant"
    constant = mode == "constant" and node.target in (aten.constant_pad_nd.default, aten.pad.default)
    shape = t.shape(node)
    written: dict[int, Term] = {}
    for pair in range(len(amounts) // 2):
        place = len(x) - 1 - pair
        before, after = amounts[2 * pair : 2 * pair + 2]
        if before == 0 and after == 0:
            continue
        whole = all(isinstance(a, int) and a >= 0 for a in (before, after)) and x[place].size > 1
        if not constant or not whole or all(f.frozen for f in leaves(x[place])):
            t.freeze(x[place], "its border is padded", node)
            x[place] = t.fixed(shape[place], _PADDED)
            continue
        sides = [Atom(a) if a else None for a in (before, after)]
        for offset, side in enumerate(sides):
            if side is not None:
                written[2 * pair + offset] = side
        x[place] = concat(*[s for s in (sides[0], x[place], sides[1]) if s is not None])
    if written:

        def write(copy: fx.Node, kept: Kept) -> None:
            new = list(copy.args[1])
            for index, side in written.items():
                new[index] = kept(side)
            copy.update_arg(1, new)

        t.derive(node, write)
    return tuple(x)


_PADDED = Reason("spatial extent with padding")


@rule(aten.glu.default)
def glu(t: Typing, node: fx.Node) -> Typed:
    """``Concat(a, a)``: a value half and a gate half."""
    x = t.of(node.args[0])
    dim: int = node.args[1] if len(node.args) > 1 else -1
    dim %= len(x)
    half = x[dim].size // 2
    pieces = _cut(t, node, x[dim], [half, half])
    if pieces is None:
        return (*x[:dim], t.fixed(half, _PIECES), *x[dim + 1 :])
    t.same(pieces[0], pieces[1], node)
    return (*x[:dim], pieces[0], *x[dim + 1 :])


@rule(*aten_operators("flip roll tril triu rot90 cumsum cumprod sort sort.stable argsort topk msort diff "
                      "logcumsumexp fft_fft fft_ifft"))  # fmt: skip
def ordered(t: Typing, node: fx.Node) -> Typed:
    """Operators for which the order along a dimension matters: that dimension keeps its positions."""
    x = t.of(node.args[0])
    for place in _ordered_places(node, len(x)):
        freeze(x[place], Reason("the order of its positions matters", node))
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        return tuple(_keep(t, term, s) for term, s in zip(x, value.shape, strict=True))
    return [tuple(_keep(t, term, s) for term, s in zip(x, v.shape, strict=True)) for v in value]


def _keep(t: Typing, term: Term, size: Any) -> Term:
    return term if term.size == size or not isinstance(size, int) else t.fixed(size, _PIECES)


def _ordered_places(node: fx.Node, rank: int) -> list[int]:
    name = node.target._schema.name.removeprefix("aten::")
    args = list(node.args[1:])
    if name in ("tril", "triu"):
        return [-2, -1]
    if name in ("cumsum", "cumprod", "logcumsumexp"):
        return [args[0]]
    if name == "flip":
        return list(args[0])
    if name == "roll" and len(args) > 1 and args[1]:
        return list(args[1])
    return list(range(rank))
