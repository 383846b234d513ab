"""Look-ups: the dimension an index points into keeps its positions, the others pass through."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from ..terms import Reason, Term, concat
from ..typing import Dims, Kept, Typed, Typing, aten_operators, rule
from ..unification import Misfit, cut
from .elementwise import broadcast

aten = torch.ops.aten
LOOKED_UP = "its positions are looked up by an index"
# A constant selection of more separate runs than this freezes its axis: one axis a run would be noise.
MAX_RUNS = 16


@rule(aten.embedding.default)
def embedding(t: Typing, node: fx.Node) -> Typed:
    """``table [V, E]`` at ``index […]`` is ``[…, E]``."""
    table, index = t.of(node.args[0]), t.of(node.args[1])
    t.freeze(table[0], LOOKED_UP, node)
    t.freeze(index, "it holds positions", node)
    return (*index, table[1])


@rule(*aten_operators("index.Tensor _unsafe_index.Tensor"))
def index(t: Typing, node: fx.Node) -> Typed:
    """Advanced indexing: indexed dimensions are replaced by the broadcast indices."""
    x = t.of(node.args[0])
    indices: list[Any] = list(node.args[1])
    places = [i for i, a in enumerate(indices) if a is not None]
    if any(a.meta["val"].dtype in (torch.bool, torch.uint8) for a in indices if a is not None):
        return t.unknown(node)
    if len(places) == 1 and len(t.of(indices[places[0]])) == 1:
        chosen = _constant_selection(t, node, x[places[0]], indices[places[0]], (1, places[0]))
        if chosen is not None:
            return (*x[: places[0]], chosen, *x[places[0] + 1 :])
    t.freeze([x[p] for p in places], LOOKED_UP, node)
    t.freeze([term for p in places for term in t.of(indices[p])], "it holds positions", node)
    looked_up = broadcast(t, node, [t.of(indices[p]) for p in places])
    rest = [term for i, term in enumerate(x) if i not in places]
    adjacent = places == list(range(places[0], places[-1] + 1))
    at = places[0] if adjacent else 0
    return (*rest[:at], *looked_up, *rest[at:])


@rule(*aten_operators("index_put"))
def index_put(t: Typing, node: fx.Node) -> Typed:
    """Values written where indices say: indexed dimensions keep their positions, the others are one axis."""
    x, values = t.of(node.args[0]), t.of(node.args[2])
    indices: list[Any] = list(node.args[1])
    places = [i for i, a in enumerate(indices) if a is not None]
    if any(a.meta["val"].dtype in (torch.bool, torch.uint8) for a in indices if a is not None):
        return t.unknown(node)
    t.freeze([x[p] for p in places], LOOKED_UP, node)
    t.freeze([term for p in places for term in t.of(indices[p])], "it holds positions", node)
    written = broadcast(t, node, [t.of(indices[p]) for p in places])
    rest = [term for i, term in enumerate(x) if i not in places]
    adjacent = places == list(range(places[0], places[-1] + 1))
    at = places[0] if adjacent else 0
    broadcast(t, node, [(*rest[:at], *written, *rest[at:]), values])
    return x


@rule(aten.index_select.default)
def index_select(t: Typing, node: fx.Node) -> Typed:
    """Chosen positions of one dimension; a constant choice is a ``Concat`` of runs and follows its axis."""
    x = t.of(node.args[0])
    dim: int = node.args[1] % len(x)
    chosen = _constant_selection(t, node, x[dim], node.args[2], (2, None))
    if chosen is not None:
        return (*x[:dim], chosen, *x[dim + 1 :])
    t.freeze(x[dim], LOOKED_UP, node)
    picked = t.of(node.args[2])
    t.freeze(picked, "it holds positions", node)
    return (*x[:dim], *(picked or (t.fixed(1, _SELECTED),)), *x[dim + 1 :])


_SELECTED = Reason("positions selected by an index")


def _constant_selection(
    t: Typing, node: fx.Node, term: Term, argument: Any, where: tuple[int, int | None]
) -> Term | None:
    """The type of a constant choice of positions, as a concatenation of ascending runs, or ``None``."""
    positions = t.graph.constant(argument)
    if positions is None or positions.is_meta or positions.dim() != 1 or not positions.numel():
        return None
    chosen = positions.numpy().astype(np.int64) % term.size
    starts = np.flatnonzero(np.diff(chosen) != 1) + 1
    if len(starts) >= MAX_RUNS:
        return None
    runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(chosen, starts)]
    seams = sorted({0, term.size, *(edge for run in runs for edge in run)})
    try:
        pieces = cut(term, np.diff(seams).tolist())
    except Misfit:
        return None
    at = dict(zip(seams, range(len(seams)), strict=True))
    order = [piece for low, high in runs for piece in range(at[low], at[high])]

    def write(copy: fx.Node, kept: Kept) -> None:
        if kept(term) == term.size:
            return
        sizes = [kept(p) for p in pieces]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        new = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in order])
        write_constant(copy, where, torch.from_numpy(new).to(positions.dtype))

    t.derive(node, write)
    return concat(*[pieces[i] for i in order])


def write_constant(copy: fx.Node, where: tuple[int, int | None], value: torch.Tensor) -> None:
    """Leave a new constant for an argument in the node's metadata; the rewrite gives it a buffer."""
    copy.meta.setdefault("new_constants", []).append((where, value))


@rule(*aten_operators("gather take_along_dim"))
def gather(t: Typing, node: fx.Node) -> Typed:
    """``out[i, j] = x[index[i, j], j]``: pointwise in every dimension but the indexed one.

    ``gather`` reads a shorter index's positions from the front, ``take_along_dim`` broadcasts.
    """
    x, picked = t.of(node.args[0]), t.of(node.args[2] if node.target is aten.gather.default else node.args[1])
    dim: Any = node.args[1] if node.target is aten.gather.default else node.args[2]
    if dim is None:
        return t.unknown(node)
    dim %= len(x)
    t.freeze((x[dim], picked[dim]), LOOKED_UP, node)
    result: list[Term] = []
    for place, (ours, theirs) in enumerate(zip(x, picked, strict=True)):
        if place != dim and ours.size == theirs.size:
            t.same(ours, theirs, node)
        elif place != dim and node.target is aten.gather.default:
            t.freeze((ours, theirs), LOOKED_UP, node)
        elif place != dim and theirs.size == 1:
            theirs = ours
        result.append(theirs)
    return tuple(result)


@rule(*aten_operators("one_hot"))
def one_hot(t: Typing, node: fx.Node) -> Typed:
    """Positions become a dimension."""
    x: Dims = t.of(node.args[0])
    t.freeze(x, "it holds positions", node)
    return (*x, t.fixed(t.shape(node)[-1], _SELECTED))
