"""The coupling of axes as a graph: which axis runs through which parameter, in which dimension and how.

Nodes are axes and parameters (buffers among them), and an edge says that an axis stands in one dimension
of a parameter. Two parameters that share an axis shrink together; an axis without a neighbour in common
with another one can go alone. The graph is a :class:`networkx.MultiGraph`, so every algorithm of networkx
works on it, and it leaves as JSON (node-link data), DOT or an SVG drawing.

>>> import torch, graphprune
>>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> dependencies = graphprune.trace(model, torch.zeros(1, 3)).dependencies
>>> for _, parameter, where in dependencies.edges("0.weight[0]", data=True):
...     print(parameter, where["dim"], where["placement"])
0.weight 0 [8]
0.bias 0 [8]
2.weight 1 [8]
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx

from ..errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from ..graph import Graph

COLOURS = {"exact": "#2a78b8", "statistical": "#d98a1f", "frozen": "#8a8f98", "parameter": "#3f7f4f"}
"""Colour of an axis by its status, and of a parameter."""


def dependencies(graph: Graph) -> nx.MultiGraph:
    """The axes and parameters of a graph and how they are coupled; the result is frozen.

    Axis nodes have ``kind="axis"``, ``size``, ``status`` (``exact``, ``statistical`` or ``frozen``),
    ``reason`` and ``node`` (the operator that decided it; both empty for an exact axis). Parameter nodes
    have ``kind="parameter"``, ``shape`` and ``trainable``. Edges have ``dim`` and ``placement`` (see
    :class:`graphprune.axes.axis.Member`); a square weight may have two edges to one axis.
    """
    found = nx.MultiGraph()
    for axis in graph.axes.values():
        found.add_node(
            axis.name, kind="axis", size=axis.size, status=axis.kind, reason=axis.reason, node=axis.node
        )
    parameters = graph.parameters
    for name in graph.typing.tensors:
        shape = list(graph.tensors[name].shape)
        found.add_node(name, kind="parameter", shape=shape, trainable=name in parameters)
    for axis in graph.axes.values():
        for member in axis.members:
            found.add_edge(axis.name, member.tensor, dim=member.dim, placement=member.placement)
    return nx.freeze(found)


def selection(graph: nx.MultiGraph, *, frozen: bool = False) -> nx.MultiGraph:
    """The prunable axes and the parameters they run through; ``frozen=True`` keeps everything."""
    if frozen:
        return graph
    axes = [n for n, d in graph.nodes(data=True) if d["kind"] == "axis" and d["status"] != "frozen"]
    kept = {*axes, *(other for axis in axes for other in graph[axis])}
    return graph.subgraph(kept)


def to_json(graph: nx.MultiGraph) -> str:
    """Node-link JSON: ``networkx.node_link_graph(json.loads(text), edges="edges")`` reads it back."""
    return json.dumps(nx.node_link_data(graph, edges="edges"), indent=1)


def to_dot(graph: nx.MultiGraph) -> str:
    """Graphviz DOT text with labels and colours.

    Raises:
        MissingExtraError: pydot is not installed (extra ``draw``).
    """
    try:
        import pydot  # noqa: F401 - networkx imports it; asked here to say which extra brings it
    except ImportError as error:
        raise MissingExtraError("pydot", "draw", "a DOT export") from error
    dressed = nx.MultiGraph(name="axes")
    dressed.graph["graph"] = {"rankdir": "LR"}
    for name, data in graph.nodes(data=True):
        shape = "ellipse" if data["kind"] == "axis" else "box"
        dressed.add_node(
            _quoted(name), label=_quoted(label(name, data)), color=_quoted(colour(data)), shape=shape,
            tooltip=_quoted(data.get("reason", "")),
        )  # fmt: skip
    for axis, parameter, data in graph.edges(data=True):
        if graph.nodes[axis]["kind"] != "axis":
            axis, parameter = parameter, axis
        dressed.add_edge(
            _quoted(axis), _quoted(parameter), label=_quoted(f"{data['dim']}: {data['placement']}")
        )
    return str(nx.nx_pydot.to_pydot(dressed).to_string())


def to_svg(graph: nx.MultiGraph) -> str:
    """A drawing in two columns, axes on the left, parameters on the right.

    Raises:
        MissingExtraError: matplotlib is not installed (extra ``draw``).
    """
    from .drawing import svg

    return svg(graph)


WRITERS: dict[str, Callable[[nx.MultiGraph], str]] = {".json": to_json, ".dot": to_dot, ".svg": to_svg}
"""File suffix → how a dependency graph is written."""


def write(graph: nx.MultiGraph, path: str | Path) -> None:
    """Write a dependency graph as the file's suffix says: ``.json``, ``.dot`` or ``.svg``.

    Raises:
        InputError: another suffix.
        MissingExtraError: a package for it is not installed.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise InputError(f"cannot draw to {path.name!r}: its name must end in {', '.join(WRITERS)}")
    path.write_text(WRITERS[path.suffix](graph), encoding="utf-8")


def label(name: str, data: dict[str, Any]) -> str:
    """A node in words: ``conv1.weight[0] · 64`` or ``conv1.weight [64, 3, 7, 7]``."""
    return f"{name} · {data['size']}" if data["kind"] == "axis" else f"{name} {data['shape']}"


def colour(data: dict[str, Any]) -> str:
    """The colour of a node."""
    return COLOURS[data["status"] if data["kind"] == "axis" else "parameter"]


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
