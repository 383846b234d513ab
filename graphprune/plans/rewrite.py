"""A plan and a graph make a smaller graph; every size is derived again from its axis.

Parameters and buffers are sliced along every dimension that lost positions; operators get the sizes,
groups, split points and constants that their rules derive; then every shape is inferred anew, which
fails loudly if anything was forgotten. The old graph is untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..axes.terms import Atom, Term, children, kept_size, mask, resolve
from ..axes.typing import Dims
from ..errors import AxisError, VerificationError
from ..graph import Graph
from .plan import Plan, keep_masks, make_plan
from .provenance import Provenance, result_shapes
from .removal import Removal


def apply_plan(graph: Graph, plan: Plan) -> Graph:
    """A new graph without the plan's positions.

    Raises:
        AxisError: the plan was made for another network.
        VerificationError: a rule missed something: shapes no longer fit, or an output changed shape.
    """
    masks = keep_masks(graph, plan)
    if not masks:
        return graph.copy()
    small = shrink(graph, masks)
    small.sweep()
    try:
        small.propagate()
    except Exception as error:
        first, *_ = str(error).splitlines() or [type(error).__name__]
        note = "; ".join(getattr(error, "__notes__", []))
        raise VerificationError(f"the plan leaves shapes that do not fit: {first} {note}") from error
    _same_outputs(graph, small)
    small.removal = removal_of(graph, plan, small)
    return small


def removal_of(graph: Graph, plan: Plan, small: Graph) -> Removal:
    """What ``small``, which is ``graph`` without the plan's positions, has lost in all.

    An earlier removal goes on, unless weights were changed since (trained, say) by anything but a repair, or
    the rewritten network's axes are not those of the first: then this one starts with ``graph`` and says why.
    """
    earlier = graph.removal
    if earlier is None:
        return Removal.of(graph, plan)
    changed = _changed_since(earlier, graph)
    if changed:
        why = f"{changed!r} was changed after the removal before, so the target is the network at that point"
        return Removal.of(graph, plan, why)
    try:
        whole = compose(earlier.original, earlier.plan, plan, graph)
        _same_shapes(earlier.original, whole, small)
    except AxisError as error:
        return Removal.of(graph, plan, f"the removal before this one cannot be composed with it: {error}")
    fitted = {name: small.tensors[name].detach() for name in earlier.refitted if name in small.tensors}
    return Removal(earlier.original, whole, fitted, earlier.restarted)


def _changed_since(removal: Removal, graph: Graph) -> str | None:
    """A tensor that is neither the original's, cut by the plan, nor what a repair made of it."""
    if graph.is_meta:
        return None
    original = removal.original
    masks = keep_masks(original, removal.plan)
    for name, value in graph.tensors.items():
        known = removal.refitted.get(name)
        if known is None and name in original.tensors:
            known = _slice(original.tensors[name], original.typing.tensors[name], masks)
        if known is not None and known is not value and not same_tensor(known, value):
            return name
    return None


def same_tensor(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors hold the same values in the same dtype, on one device."""
    return (
        left.dtype == right.dtype
        and left.device == right.device
        and torch.equal(left.detach(), right.detach())
    )


def _same_shapes(original: Graph, plan: Plan, small: Graph) -> None:
    """Raise :class:`AxisError` unless the plan leaves of every operator what ``small`` has of it."""
    sizes = {atom: int(keep.sum()) for atom, keep in keep_masks(original, plan).items()}
    nodes = {node.name: node for node in small.fx.nodes if node.op == "call_function"}
    for node in original.fx.nodes:
        other = nodes.get(node.name)
        if other is None or other.target is not node.target or not isinstance(node.meta["val"], torch.Tensor):
            continue
        wanted = [kept_size(term, sizes) for term in original.typing.dims[node]]  # type: ignore[union-attr]
        (found,) = result_shapes(other.meta["val"])
        if any(isinstance(f, int) and f != w for w, f in zip(wanted, found, strict=True)):
            raise AxisError(f"{node.name!r} would have shape {wanted}, and has {list(found)}")


def shrink(graph: Graph, masks: Mapping[Atom, np.ndarray]) -> Graph:
    """A copy with sliced tensors and re-derived arguments; its shapes are still those of ``graph``.

    Args:
        graph: the original.
        masks: axis → boolean mask of the positions that stay.
    """
    sizes = {atom: int(keep.sum()) for atom, keep in masks.items()}
    typing = graph.typing
    small = graph.copy()
    small.provenance = Provenance.of(graph)
    sliced = {
        name: _as_laid_out(_slice(value, typing.tensors[name], masks), value)
        for name, value in graph.tensors.items()
    }
    small.set_tensors({name: value for name, value in sliced.items() if value is not graph.tensors[name]})

    def kept(term: Term) -> int:
        return kept_size(term, sizes)

    for old, new in zip(graph.fx.nodes, list(small.fx.nodes), strict=True):
        for derivation in typing.derivations.get(old, ()):
            derivation(new, kept)
        for (index, place), value in new.meta.pop("new_constants", ()):
            _replace_constant(small, new, index, place, value)
    return small


def kept_positions(graph: Graph, plan: Plan) -> dict[str, tuple[torch.Tensor | None, ...]]:
    """Tensor name → for every dimension the positions ``[kept]`` that a plan leaves, ``None`` for all.

    Raises:
        AxisError: the plan was made for another network.
    """
    masks = keep_masks(graph, plan)
    return {
        name: tuple(_kept(term, masks) for term in graph.typing.tensors[name])
        for name in graph.tensors
        if name in graph.typing.tensors
    }


def _kept(term: Term, masks: Mapping[Atom, np.ndarray]) -> torch.Tensor | None:
    keep = mask(term, masks) if _touched(term, masks) else None
    return None if keep is None or keep.all() else torch.from_numpy(np.flatnonzero(keep))


def _slice(value: torch.Tensor, dims: Dims, masks: Mapping[Atom, np.ndarray]) -> torch.Tensor:
    for dim, term in enumerate(dims):
        where = _kept(term, masks)
        if where is not None:
            value = value.detach().index_select(dim, where.to(value.device))
    return value


def _as_laid_out(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A slice in its tensor's memory format: operators pass the format on, and views may rest on it."""
    wanted = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.dim())
    if (
        wanted is None
        or value is like
        or like.is_contiguous()
        or not like.is_contiguous(memory_format=wanted)
    ):
        return value
    return value.contiguous(memory_format=wanted)


def _touched(term: Term, masks: Mapping[Atom, np.ndarray]) -> bool:
    term = resolve(term)
    if isinstance(term, Atom):
        return term in masks
    return any(_touched(child, masks) for child in children(term))


def _replace_constant(graph: Graph, node: Any, index: int, place: int | None, value: torch.Tensor) -> None:
    """Give an argument (or entry ``place`` of a list argument) a constant of its own."""
    old = node.args[index] if place is None else node.args[index][place]
    source = graph.add_tensor(
        str(old.target), value.to(graph.tensor(old).device), before=node, trainable=False
    )
    if place is not None:
        entries = list(node.args[index])
        entries[place] = source
        node.update_arg(index, entries)
    else:
        node.update_arg(index, source)


def _same_outputs(before: Graph, after: Graph) -> None:
    for old, new in zip(before.output.args[0], after.output.args[0], strict=True):  # type: ignore[arg-type]
        ours, theirs = (getattr(n, "meta", {}).get("val") for n in (old, new))
        if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
            continue
        if tuple(ours.shape) != tuple(theirs.shape):
            raise VerificationError(
                f"the plan changes the shape of output {old.name!r} from {tuple(ours.shape)} "
                f"to {tuple(theirs.shape)}"
            )


def compose(graph: Graph, first: Plan, second: Plan, small: Graph | None = None) -> Plan:
    """The one plan that does what ``first`` on ``graph`` and then ``second`` on the result do.

    Args:
        graph: the network before both.
        first: a plan for it.
        second: a plan for what the first leaves.
        small: that, if it is at hand; it may have been rewritten since.

    Raises:
        AxisError: a plan does not belong, or the second one cuts an axis of the smaller network
            where the original has no axis.
    """
    masks = keep_masks(graph, first)
    small = apply_plan(graph, first) if small is None else small
    removed: dict[str, set[int]] = {name: set(p) for name, p in first.removed.items()}
    later = keep_masks(small, second)
    survivors: list[tuple[str, int, np.ndarray]] = []
    for name in graph.tensors:
        if name not in small.tensors:
            continue
        for dim, term in enumerate(graph.typing.tensors[name]):
            stays = np.flatnonzero(mask(term, masks))
            if small.tensors[name].dim() <= dim or small.tensors[name].shape[dim] != len(stays):
                raise AxisError(f"dimension {dim} of {name!r} is not what the first plan leaves of it")
            survives = np.zeros(term.size, bool)
            survives[stays[mask(small.typing.tensors[name][dim], later)]] = True
            survivors.append((name, dim, survives))
            for axis, index in graph.axes.of(name, dim):
                here = index[stays]
                gone = set(here[here >= 0]) - set(index[survives])
                if gone and axis.prunable:
                    removed.setdefault(axis.name, set()).update(int(p) for p in gone)
    both = make_plan(graph, removed)  # type: ignore[arg-type]
    masks = keep_masks(graph, both)
    for name, dim, survives in survivors:
        if not np.array_equal(mask(graph.typing.tensors[name][dim], masks), survives):
            raise AxisError(
                f"the second plan cuts dimension {dim} of {name!r} where the original network has no axis: "
                f"{graph.explain(name)}"
            )
    return both
