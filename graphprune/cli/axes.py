"""The axes of a model as a table and as JSON: what can be pruned, what goes with it, why the rest stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..axes.axis import Axes, Axis
    from ..graph import Graph
    from ..report.sections import Section

MEMBERS = 3  # named in a row of the table; the others are counted


def axes_section(graph: Graph, frozen: bool) -> Section:
    """One row an axis: name, size, kind, members, and the reason why it is not exact."""
    from ..report.sections import Section

    axes = graph.axes
    rows = tuple((a.name, str(a.size), a.kind, _members(a), _reason(a)) for a in _chosen(axes, frozen))
    columns = ("axis", "positions", "kind", "members", "reason")
    return Section("axes", columns, rows, frozenset({1}), caption=_caption(axes))


def axes_json(graph: Graph, frozen: bool) -> dict[str, Any]:
    """The same findings for machines, every member of every axis included."""
    axes = graph.axes
    return {
        "coverage": axes.coverage,
        "unruled": axes.unruled,
        "axes": [
            {
                "name": a.name,
                "size": a.size,
                "kind": a.kind,
                "reason": a.reason,
                "node": a.node,
                "members": [vars(m) for m in a.members],
            }
            for a in _chosen(axes, frozen)
        ],
    }


def _chosen(axes: Axes, frozen: bool) -> list[Axis]:
    return list(axes.values()) if frozen else axes.prunable


def _members(axis: Axis) -> str:
    shown = ", ".join(f"{m.tensor}[{m.dim}] {m.placement}" for m in axis.members[:MEMBERS])
    more = len(axis.members) - MEMBERS
    return f"{len(axis.members)}: {shown}" + (f" and {more} more" if more > 0 else "")


def _reason(axis: Axis) -> str:
    return f"{axis.reason} at {axis.node}" if axis.node else axis.reason


def _caption(axes: Axes) -> str:
    counts = f"{len(axes.exact)} exact, {len(axes.statistical)} statistical, {len(axes.frozen)} frozen"
    unruled = ", ".join(f"{name} ×{count}" for name, count in axes.unruled.items())
    return (
        f"{counts}; prunable axes run through {axes.coverage:.1%} of the parameters"
        + (f"; operators without a rule: {unruled}" if unruled else "")
    )  # fmt: skip
