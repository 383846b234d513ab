"""Latency of each tool's fastest file, a line a network; hollow where its error is far above the least."""

from __future__ import annotations

from pathlib import Path

from benchmarks.quantization.methods import OURS
from benchmarks.quantization.results import OUTSIDE, PEERS, Results
from benchmarks.quantization.speed import Row

FAR = 3.0  # times the least error of a network's int8 files
COLOURS = {OURS: "black", "onnxruntime": "tab:orange", "nncf": "tab:green", "neural-compressor": "tab:blue",
           OUTSIDE: "tab:gray"}  # fmt: skip


def fastest(results: Results, network: str, threads: int, tool: str) -> Row | None:
    """The fastest int8 file of a tool."""
    found = [row for row in results.rows(network, threads, tool) if row.variant != "float"]
    return found[0] if found else None


def draw(results: Results, path: Path) -> None:
    """Write the drawing as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    lines = results.timed()
    tools = (OURS, *PEERS, OUTSIDE)
    with matplotlib.rc_context({"svg.hashsalt": "graphprune", "font.size": 8, "svg.fonttype": "none"}):
        figure, panel = pyplot.subplots(figsize=(7.5, 0.6 + 0.55 * len(lines)))
        for line, (network, threads) in enumerate(lines):
            rows = {tool: fastest(results, network, threads, tool) for tool in tools}
            errors = [row.error for row in rows.values() if row is not None and row.error is not None]
            for place, tool in enumerate(tools):
                row = rows[tool]
                if row is None or row.to_float is None:
                    continue
                ratio, height = row.to_float, line + 0.14 * (place - (len(tools) - 1) / 2)
                colour, far = COLOURS[tool], row.error is not None and row.error > FAR * min(errors)
                panel.plot([ratio.low, ratio.high], [height] * 2, color=colour, linewidth=1)
                panel.plot([ratio.median], [height], "o", color=colour, markersize=4,
                           markerfacecolor="white" if far else colour)  # fmt: skip
        for tool in tools:
            panel.plot([], [], "o", color=COLOURS[tool], markersize=4, label=tool)
        panel.axvline(1.0, color="black", linewidth=0.6)
        names = [name if threads == 1 else f"{name}, {threads} threads" for name, threads in lines]
        panel.set_yticks(range(len(lines)), names)
        panel.invert_yaxis()
        panel.set_xscale("log")
        ticks = (0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
        panel.set_xlabel("latency to fp32 on ONNX Runtime, median and quartiles")
        panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
