"""The dependency graph as an SVG: axes in a column on the left, parameters on the right, lines between.

Parameters stand in the order of the network. Every axis stands at the mean height of its parameters (the
barycentre heuristic of Sugiyama, Tagawa and Toda, 1981), moved apart just enough that labels do not
overlap: the drawing grows in height with the network and stays legible. Text stays text, so that a
browser's search finds a parameter by its name.
"""

from __future__ import annotations

import io

import networkx as nx
import numpy as np

from ..errors import MissingExtraError
from .dependency import COLOURS, colour, label

ROW = 0.17  # inches a label needs
CHARACTER = 0.062  # inches of a character at the font size below
FONT = 7.0
GAP = 3.2  # inches between the columns


def svg(graph: nx.MultiGraph) -> str:
    """The drawing as SVG text; the same graph gives the same text.

    Raises:
        MissingExtraError: matplotlib is not installed (extra ``draw``).
    """
    try:
        import matplotlib as mpl
        from matplotlib.collections import LineCollection
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise MissingExtraError("matplotlib", "draw", "a drawing") from error
    axes, parameters = _names(graph, "axis"), _by_module(_names(graph, "parameter"))
    places = layout(graph, axes, parameters)
    left, right = (
        max((len(label(n, graph.nodes[n])) for n in names), default=1) * CHARACTER
        for names in (axes, parameters)
    )
    rows = max([2.0, *(-y for _, y in places.values())]) + 1
    width, height = max(left + GAP + right + 0.4, 7.0), (rows + 4) * ROW
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "graphprune", "font.size": FONT}):
        figure = Figure(figsize=(width, height))
        canvas = figure.add_axes((0, 0, 1, 1))
        canvas.set_axis_off()
        canvas.set_xlim(-left - 0.2, width - left - 0.2)
        canvas.set_ylim(-rows - 1, 3)
        lines, line_colours = [], []
        for name in axes:
            for parameter in graph[name]:
                lines.append([(0.06, places[name][1]), (GAP - 0.06, places[parameter][1])])
                line_colours.append(colour(graph.nodes[name]))
        canvas.add_collection(LineCollection(lines, colors=line_colours, linewidths=0.7, alpha=0.7, zorder=1))
        for names, marker, side in ((axes, "o", -1), (parameters, "s", 1)):
            shown = [places[n] for n in names]
            canvas.scatter(
                [x for x, _ in shown], [y for _, y in shown], s=16, marker=marker, zorder=2,
                c=[colour(graph.nodes[n]) for n in names],
            )  # fmt: skip
            for name, (x, y) in zip(names, shown, strict=True):
                canvas.text(
                    x + side * 0.1, y, label(name, graph.nodes[name]), va="center", parse_math=False,
                    ha="left" if side > 0 else "right",
                )  # fmt: skip
        present = {graph.nodes[n]["status"] for n in axes}
        words = {"exact": "exact axis", "statistical": "statistical axis", "frozen": "frozen axis"}
        handles = [
            Line2D([], [], color=COLOURS[k], marker="o", linewidth=0.8, markersize=4, label=words[k])
            for k in words
            if k in present
        ]
        handles.append(
            Line2D([], [], color=COLOURS["parameter"], marker="s", linewidth=0, markersize=4,
                   label="parameter")
        )  # fmt: skip
        figure.legend(handles=handles, loc="upper left", ncols=len(handles), frameon=False, fontsize=FONT)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def layout(graph: nx.MultiGraph, axes: list[str], parameters: list[str]) -> dict[str, tuple[float, float]]:
    """Node → (x in inches, y in rows, downwards negative); rows of a column are at least one apart."""
    scale = max(1.0, len(axes) / max(len(parameters), 1))
    heights = {name: row * scale for row, name in enumerate(parameters)}
    wanted = {a: float(np.mean([heights[p] for p in graph[a]] or [0.0])) for a in axes}
    order = sorted(axes, key=lambda a: wanted[a])
    settled = _apart([wanted[a] for a in order])
    places = {name: (GAP, -height) for name, height in heights.items()}
    return places | {name: (0.0, -height) for name, height in zip(order, settled, strict=True)}


def _apart(wanted: list[float]) -> list[float]:
    """Ascending heights, moved as little as possible (least squares) to lie at least one apart, from 0 on.

    With ``z[i] = y[i] - i`` this is isotonic regression, solved by pooling adjacent violators.
    """
    pools: list[tuple[float, int]] = []
    for index, height in enumerate(wanted):
        mean, count = height - index, 1
        while pools and pools[-1][0] > mean:
            before, number = pools.pop()
            mean, count = (mean * count + before * number) / (count + number), count + number
        pools.append((mean, count))
    flat = [mean for mean, count in pools for _ in range(count)]
    placed = [mean + index for index, mean in enumerate(flat)]
    low = min([0.0, *placed])
    return [height - low for height in placed]


def _names(graph: nx.MultiGraph, kind: str) -> list[str]:
    return [name for name, data in graph.nodes(data=True) if data["kind"] == kind]


def _by_module(names: list[str]) -> list[str]:
    """Parameters beside the buffers of their module, modules in the order they first appear."""
    first: dict[str, int] = {}
    for name in names:
        first.setdefault(name.rpartition(".")[0], len(first))
    return sorted(names, key=lambda name: first[name.rpartition(".")[0]])
