"""Why a pruned graph cannot be written back into a module: the operator, its line, its size, its axis."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from ..axes.terms import leaves
from ..frontend.capture import user_line
from ..graph import Graph
from ..graph_text import operator_name, source_line
from ..plans.provenance import Provenance, operator
from .attributes import changed_arguments

OPEN_END = 2**31  # a slice without an end has a larger one
SHOWN = 3
_PREFIX = "refused to write back: "


def of_error(graph: Graph, before: Provenance, path: str, kind: str, error: Exception) -> str:
    """The copy failed while it ran: what its forward holds at the failing line, or in that module.

    Args:
        graph: the pruned graph.
        before: what it was.
        path, kind: the module that failed, and its class.
        error: what it raised.
    """
    line = user_line(error)
    nodes = _at_fault(graph, before, path, line)
    where = f"module {path!r} ({kind})" if path else f"the model ({kind})"
    held = "; ".join(dict.fromkeys(_sizes(before, n) for n in nodes))
    lines = dict.fromkeys(filter(None, (source_line(n) for n in nodes)))
    at = ", ".join([*lines][:SHOWN]) or line or "an unknown line"
    message = (str(error).strip().splitlines() or [type(error).__name__])[0]
    what = f"at {at} forward holds {held}" if held else f"at {at} forward holds a size"
    advice = _advice(graph, before, nodes)
    return f"{_PREFIX}{what}, which no attribute changes; it fails in {where}: {message}; {advice}"


def of_difference(graph: Graph, before: Provenance, reason: str) -> str:
    """The copy ran, and computed something else."""
    scaled = [
        n
        for n in graph.find(torch.ops.aten.scaled_dot_product_attention.default)
        if n.name in before.operators
        and before.operators[n.name].options.get("scale") is None
        and n.kwargs.get("scale") is not None
    ]
    if scaled:
        places = "; ".join(graph.where(n) for n in scaled[:SHOWN])
        return (
            f"{_PREFIX}forward computes the scale of attention from the width that is left, so no attribute "
            f"keeps it: {places}; {_advice(graph, before, scaled)}"
        )
    nodes = [n for n in graph.fx.nodes if _sizes(before, n) and not _in_layer(n)]
    changed = "; ".join(f"{_sizes(before, n)} at {graph.where(n)}" for n in nodes[:SHOWN])
    return (
        f"{_PREFIX}with every size in place the model still differs from the graph ({reason})"
        + (f"; sizes that changed in forward: {changed}" if changed else "")
        + "; a value that forward computes from such a size (a scale of 1/√width, say) changes with it"
        + "; where passes rewrote the graph besides pruning, apply plans to the captured graph itself, "
        "or use graph.module"
    )


def _at_fault(graph: Graph, before: Provenance, path: str, line: str | None) -> list[fx.Node]:
    """The operators with sizes of their own at the line; else those of the module or, outwards, around it."""
    changed = [n for n in graph.fx.nodes if _sizes(before, n) and not _in_layer(n)]
    here = [n for n in changed if line is not None and source_line(n) == line]
    parts = path.split(".") if path else []
    for depth in range(len(parts), -1, -1):
        if here:
            break
        around = ".".join(parts[:depth])
        here = [n for n in changed if (n.meta.get("module") or "").split("@")[0] == around]
    return here[:SHOWN]


def _sizes(before: Provenance, node: fx.Node) -> str:
    """The sizes among an operator's arguments that are others now, in words; empty for none."""
    was = before.operators.get(node.name)
    if was is None or node.op != "call_function":
        return ""
    now = operator(node)
    found = {
        f"{old} (now {new})": None
        for old, new in changed_arguments(was, now)
        if isinstance(old, int) and 1 < old < OPEN_END
    }
    if len(was.shapes) > 1 and "split" in operator_name(node) and was.shapes != now.shapes:
        parts = [_changed_dims(was.shapes, now.shapes, i) for i in (0, 1)]
        found = {f"pieces of {parts[0]} (now {parts[1]})": None}
    return f"{', '.join(found)} of {operator_name(node)}" if found else ""


def _changed_dims(old: tuple, new: tuple, which: int) -> list[int]:  # type: ignore[type-arg]
    pairs = [(a, b) for ours, theirs in zip(old, new, strict=True) for a, b in zip(ours, theirs, strict=True)]
    places = [i for i, (a, b) in enumerate(pairs) if a != b]
    rank = len(old[0])
    dims = {i % rank for i in places}
    return [shape[d] for shape in (old, new)[which] for d in sorted(dims)]


def _in_layer(node: fx.Node) -> bool:
    return str(node.meta.get("module_type", "")).startswith("torch.nn.modules.")


def _advice(graph: Graph, before: Provenance, nodes: list[fx.Node]) -> str:
    axes = list(dict.fromkeys(name for node in nodes for name in _axes(graph, before, node)))[:SHOWN]
    whole = f"keep axis {', '.join(axes)} whole" if axes else "keep that axis whole"
    return f"{whole}, make the size an attribute, or use graph.module, which has no such limit"


def _axes(graph: Graph, before: Provenance, node: fx.Node) -> Iterator[str]:
    """The axes in the dimensions of a node and its operands that changed."""
    for other in (node, *node.all_input_nodes):
        was = before.operators.get(other.name)
        typed = graph.typing.dims.get(other)
        if was is None or typed.__class__ is not tuple or not was.shapes:
            continue
        for term, old in zip(typed, was.shapes[0], strict=True):  # type: ignore[arg-type]
            if term.size != old:
                for leaf in leaves(term):
                    if leaf in graph.axes.by_atom and leaf.frozen is None:
                        yield graph.axes.by_atom[leaf].name
