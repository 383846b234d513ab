"""Operators that only move, copy or drop elements, done on extents instead of whole values.

Each function takes operands shaped as their extents (size 1 along what is not followed, see
:mod:`.dead.extents`) and gives the result the same way. Where followed and other dimensions
meet in a reshape, the run they share is spread out first; the caller's ``reduce`` then takes several
elements together: a minimum or maximum for bounds, a sum for :func:`pull`.

All of them are linear, so what flows backwards, *which operand elements does a set of result elements
come from*, is their transpose, and autograd computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from graphprune.axes.typing import aten_operators
from graphprune.cost import size_hint
from graphprune.operands import argument

from .extents import Extent, Extents, widened

aten = torch.ops.aten

Reduce = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
"""Takes elements along some dimensions together; the dimensions stay, with size 1."""
Move = Callable[[Extents, fx.Node, list[torch.Tensor], Reduce], Any]

MOVES: dict[Any, Move] = {}


def move(extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce) -> list[torch.Tensor]:
    """The results of a moving operator, each collapsed to its extent.

    Args:
        extents: of the graph.
        node: an operator in :data:`MOVES`.
        operands: the tensors it moves, in order, shaped as extents (or broadcast against them).
        reduce: how to take elements together.
    """
    results = MOVES[node.target](extents, node, operands, reduce)
    results = results if isinstance(results, list) else [results]
    return [_collapsed(r, extents.of(node, i), reduce) for i, r in enumerate(results)]


def pull(extents: Extents, node: fx.Node, wanted: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """For each operand, which elements the wanted elements of the results come from (booleans)."""
    with torch.enable_grad():
        operands = [
            torch.zeros(extents.of(source), dtype=torch.float64, requires_grad=True) for source in moved(node)
        ]
        results = move(extents, node, operands, lambda value, dims: value.sum(list(dims), keepdim=True))
        total = sum(
            (r * w).sum() for r, w in zip(results, wanted, strict=True) if w is not None and bool(w.any())
        )
        if not isinstance(total, torch.Tensor) or not total.requires_grad:
            return [torch.zeros(o.shape, dtype=torch.bool) for o in operands]
        gradients = torch.autograd.grad(total, operands, allow_unused=True)
    return [
        torch.zeros(o.shape, dtype=torch.bool) if g is None else g > 0
        for o, g in zip(operands, gradients, strict=True)
    ]


def moved(node: fx.Node) -> list[fx.Node]:
    """The operands whose elements a moving operator moves."""
    first: Any = node.args[0]
    return list(first) if isinstance(first, (list, tuple)) else [first]  # type: ignore[list-item]


def _collapsed(value: torch.Tensor, extent: Extent, reduce: Reduce) -> torch.Tensor:
    wide = [d for d, size in enumerate(extent) if size == 1 and value.shape[d] > 1]
    return reduce(value, wide) if wide else value


def _moves(names: str) -> Callable[[Move], Move]:
    def register(function: Move) -> Move:
        MOVES.update(dict.fromkeys(aten_operators(names), function))
        return function

    return register


@_moves("permute transpose.int swapaxes swapdims t numpy_T mT adjoint movedim.int movedim.intlist "
        "moveaxis.int unsqueeze flip")  # fmt: skip
def _same_call(extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce) -> torch.Tensor:
    return node.target(operands[0], *node.args[1:])  # type: ignore[operator]


@_moves("clone contiguous alias detach detach_copy lift_fresh lift_fresh_copy dropout feature_dropout "
        "alpha_dropout feature_alpha_dropout to.dtype to.dtype_layout to.device to.other _to_copy type_as "
        "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
        "replication_pad3d")  # fmt: skip
def _identity(extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce) -> torch.Tensor:
    return operands[0]


@_moves("max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d _adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d "
        "upsample_nearest3d upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec "
        "upsample_linear1d upsample_linear1d.vec upsample_bilinear2d upsample_bilinear2d.vec "
        "upsample_trilinear3d upsample_trilinear3d.vec _upsample_nearest_exact1d.vec "
        "_upsample_nearest_exact2d.vec")  # fmt: skip
def _window(extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce) -> Any:
    """Averages and extrema stay between the bounds of what they are taken over."""
    value = node.meta["val"]
    name = str(node.target)
    rank = next(count for count in (1, 2, 3) if f"{count}d" in name)
    x = _collapsed(operands[0], (*operands[0].shape[:-rank], *[1] * rank), reduce)
    return x if isinstance(value, torch.Tensor) else [x] * len(value)


@_moves("squeeze squeeze.dim squeeze.dims")
def _squeeze(extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce) -> torch.Tensor:
    shape = moved(node)[0].meta["val"].shape
    named: Any = node.args[1] if len(node.args) > 1 else list(range(len(shape)))
    places = {d % len(shape) for d in ([named] if isinstance(named, int) else named)} if len(shape) else set()
    gone = [d for d in sorted(places) if isinstance(shape[d], int) and shape[d] == 1]
    return operands[0].squeeze(gone) if gone else operands[0]


@_moves("view reshape _unsafe_view flatten.using_ints unflatten.int view_as reshape_as ravel")
def _reshape(extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce) -> torch.Tensor:
    (source,) = moved(node)
    return regroup(operands[0], extents.full(source), extents.full(node), reduce)


def regroup(value: torch.Tensor, before: Extent, after: Extent, reduce: Reduce) -> torch.Tensor:
    """Row-major reshape of ``before`` to ``after``, for a value that has size 1 along some dimensions."""
    pieces: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        start, begin, ours, theirs = i, j, 1, 1
        while i == start or j == begin or ours != theirs:
            if i < len(before) and (ours <= theirs or j == len(after)):
                ours, i = ours * before[i], i + 1
            elif j < len(after):
                theirs, j = theirs * after[j], j + 1
            else:
                break
        pieces.append((list(range(start, i)), list(range(begin, j))))
    sizes: list[int] = []
    for ours_, theirs_ in pieces:
        if all(value.shape[d] == 1 for d in ours_):
            sizes += [1] * len(theirs_)
            continue
        for d in ours_:
            value = widened(value, d, before[d])
        sizes += [after[d] for d in theirs_]
    return value.reshape(sizes)


@_moves("expand broadcast_to expand_copy expand_as")
def _expand(extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce) -> torch.Tensor:
    (x,) = operands
    return x.reshape((*[1] * (len(extents.of(node)) - x.dim()), *x.shape))


@_moves("select.int")
def _select(extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce) -> torch.Tensor:
    dim, index = node.args[1:3]
    single = operands[0].shape[dim] == 1  # type: ignore[index]
    index = 0 if single else index
    if not isinstance(index, int):
        return reduce(operands[0], [dim]).select(dim, 0)  # type: ignore[arg-type,list-item]
    return operands[0].select(dim, index)  # type: ignore[arg-type]


@_moves("unbind.int")
def _unbind(extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce) -> Any:
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    (source,) = moved(node)
    return list(widened(operands[0], dim, extents.full(source)[dim]).unbind(dim))


@_moves("slice.Tensor narrow")
def _slice(extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce) -> torch.Tensor:
    dim: Any = argument(node, "dim")
    if operands[0].shape[dim] == 1:
        return operands[0]
    if not all(a is None or isinstance(a, int) for a in node.args[1:]):
        return reduce(operands[0], [dim])
    return node.target(operands[0], *node.args[1:])  # type: ignore[operator]


@_moves("split.Tensor split_with_sizes split.sizes chunk tensor_split.sections unsafe_chunk")
def _split(extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce) -> Any:
    dim: Any = argument(node, "dim")
    sizes = [size_hint(v.shape[dim]) for v in node.meta["val"]]
    if operands[0].shape[dim] == 1:
        return [operands[0]] * len(sizes)
    return list(operands[0].split(sizes, dim))


@_moves("cat concat concatenate")
def _cat(extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce) -> torch.Tensor:
    rank = len(extents.of(node))
    dim: Any = argument(node, "dim") % rank
    sources = moved(node)
    present = [i for i, s in enumerate(sources) if len(extents.full(s)) == rank]
    parts = [widened(operands[i], dim, extents.full(sources[i])[dim]) for i in present]
    if extents.of(node)[dim] == 1:
        parts = [p if p.shape[dim] == 1 else reduce(p, [dim]) for p in parts if p.shape[dim]]
    shape = torch.broadcast_shapes(*[(*p.shape[:dim], 1, *p.shape[dim + 1 :]) for p in parts])
    return torch.cat([p.expand((*shape[:dim], p.shape[dim], *shape[dim + 1 :])) for p in parts], dim)


@_moves("stack")
def _stack(extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce) -> torch.Tensor:
    return torch.stack(torch.broadcast_tensors(*operands), argument(node, "dim"))


@_moves("repeat tile")
def _repeat(extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce) -> torch.Tensor:
    counts: Any = node.args[1]
    rank = max(len(counts), operands[0].dim())
    x = operands[0].reshape((*[1] * (rank - operands[0].dim()), *operands[0].shape))
    copies = [1] * (rank - len(counts)) + [
        size_hint(c.meta["val"] if isinstance(c, fx.Node) else c) for c in counts
    ]
    return x.repeat([c if x.shape[d] > 1 else 1 for d, c in enumerate(copies)])


@_moves("repeat_interleave.self_int")
def _repeat_interleave(
    extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce
) -> torch.Tensor:
    count, dim = node.args[1], argument(node, "dim")
    (x,) = operands
    if dim is None:
        size = math.prod(extents.full(moved(node)[0]))
        x, dim = regroup(x, extents.full(moved(node)[0]), (size,), reduce), 0
    if x.shape[dim] == 1:
        return x
    return x.repeat_interleave(count, dim) if isinstance(count, int) else reduce(x, [dim])


@_moves("pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle")
def _shuffle(extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce) -> torch.Tensor:
    (x,) = operands
    factor: Any = node.args[1]
    if "channel" in str(node.target):
        return x if x.shape[1] == 1 else x.unflatten(1, (factor, -1)).transpose(1, 2).flatten(1, 2)
    x = _collapsed(x, (*x.shape[:-2], 1, 1), reduce)
    if x.shape[-3] == 1:
        return x
    if node.target is aten.pixel_unshuffle.default:
        return x.repeat_interleave(factor**2, -3)
    blocks = x.unflatten(-3, (-1, factor**2))
    return reduce(blocks, [blocks.dim() - 3]).squeeze(-3)


@_moves("index_select index.Tensor")
def _chosen(extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce) -> torch.Tensor:
    """Positions that a constant names, along one dimension."""
    place, positions = _selection(extents, node)
    assert positions is not None
    if operands[0].shape[place] == 1:
        return operands[0]
    return operands[0].index_select(place, positions.reshape(-1).long().cpu())


def _selection(extents: Extents, node: fx.Node) -> tuple[int, torch.Tensor | None]:
    given: Any = node.args[1] if node.target is aten.index.Tensor else [*[None] * node.args[1], node.args[2]]  # type: ignore[operator]
    places = [i for i, index in enumerate(given) if index is not None]
    positions = extents.graph.constant(given[places[0]]) if len(places) == 1 else None
    usable = positions is not None and positions.dim() == 1 and positions.dtype in (torch.int64, torch.int32)
    return places[0], positions if usable else None


def is_move(extents: Extents, node: fx.Node) -> bool:
    """Whether an operator only moves elements, and to places that are known."""
    if node.target in (aten.index.Tensor, aten.index_select.default):
        return _selection(extents, node)[1] is not None
    return node.target in MOVES


@_moves("im2col")
def _patches(extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce) -> torch.Tensor:
    """Every channel as often as the kernel has places."""
    (x,) = operands
    x = _collapsed(x, (*x.shape[:-2], 1, 1), reduce).squeeze(-1)
    kernel = extents.full(node)[-2] // extents.full(moved(node)[0])[-3]
    return x if x.shape[-2] == 1 else x.repeat_interleave(kernel, -2)


@_moves("constant_pad_nd pad")
def _pad(extents: Extents, node: fx.Node, operands: list[torch.Tensor], reduce: Reduce) -> torch.Tensor:
    """Zeros around dimensions that are followed; the caller sees to the others."""
    (x,) = operands
    full, extent = extents.full(moved(node)[0]), extents.of(node)
    given: Any = node.args[1]
    amounts: list[Any] = []
    for pair in range(len(given) // 2):  # type: ignore[arg-type]
        place = len(extent) - 1 - pair
        follow = extent[place] != 1
        amounts += given[2 * pair : 2 * pair + 2] if follow else [0, 0]  # type: ignore[index]
        if follow:
            x = widened(x, place, full[place])
    return torch.nn.functional.pad(x, amounts)
