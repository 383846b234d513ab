"""The curves of :mod:`benchmarks.backends.tvm_curve` as tables and a drawing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.backends.tvm_curve import Curve


def write(curves: Sequence[Curve], facts: Mapping[str, str], folder: Path) -> Path:
    """``tvm.json``, ``tvm.md`` and ``tvm.svg``; returns the path of the Markdown file."""
    plain = {"conditions": dict(facts), "curves": [asdict(curve) for curve in curves]}
    (folder / "tvm.json").write_text(json.dumps(plain, indent=1) + "\n")
    draw(curves, folder / "tvm.svg")
    about = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    parts = [
        "# TVM: latency over tuning time",
        "Written by `python -m benchmarks.backends.tvm_curve`.",
        about,
        "Tuned on one thread, in a process that was killed with SIGKILL at half of the time and started "
        "again on the same database. Every ratio is to ONNX Runtime's latency on the same graph, in turns, "
        "each in a process of its own: median and quartiles of the ratios of rounds. `products` is the sum "
        "of the best times of the products, each measured alone, by processor time.",
        "![Latency over tuning time](tvm.svg)",
        *(_section(curve) for curve in curves),
    ]
    path = folder / "tvm.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _section(curve: Curve) -> str:
    threads = list(curve.reference_ms)
    head = "| tuned for | products | " + " | ".join(f"{t} thread(s), ratio | ms" for t in threads) + " |"
    lines = [f"## {curve.network}", "", head, "|---" * (2 + 2 * len(threads)) + "|"]
    for point in curve.points:
        cells = [f"{point.seconds:g} s" if point.seconds else "untuned",
                 f"{point.products:.1f} ms" if point.products else ""]  # fmt: skip
        for t in threads:
            cells += [
                f"{point.ratio[t]:.2f} ({point.low[t]:.2f} to {point.high[t]:.2f})",
                f"{point.ms[t]:.1f}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    reference = ", ".join(f"{ms:.1f} ms on {t}" for t, ms in curve.reference_ms.items())
    lines += [
        "",
        f"ONNX Runtime: {reference} thread(s). Killed after {curve.killed:.0f} s with {curve.lines_at_kill} "
        f"results on the disk; {curve.tried} candidates in all.",
        "",
        "| product | output | sums over | calls | measured | ms | GFLOP/s | oneDNN ms | oneDNN GFLOP/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(curve.products, key=lambda r: -r["ms"] * r["calls"]):
        lines.append(
            f"| {row['kind']} | {_text(row['output'])} | {_text(row['sums'])} | {row['calls']} | "
            f"{row['measured']} | {row['ms']:.3f} | {row['gflops']:.0f} | {row['onednn_ms']:.3f} | "
            f"{row['onednn_gflops']:.0f} |"
        )
    return "\n".join(lines)


def _text(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))


def draw(curves: Sequence[Curve], path: Path) -> None:
    """The ratio to ONNX Runtime over the time tuned, a line for each network and number of threads."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "tvm", "font.size": 9, "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(6, 3.5))
        for curve in curves:
            for t in curve.reference_ms:
                x = [point.seconds for point in curve.points]
                middle: list[Any] = [point.ratio[t] for point in curve.points]
                below = [point.ratio[t] - point.low[t] for point in curve.points]
                above = [point.high[t] - point.ratio[t] for point in curve.points]
                label = f"{curve.network}, {t} thread{'s' if t != '1' else ''}"
                axes.errorbar(x, middle, [below, above], marker="o", ms=3, lw=1, capsize=2, label=label)
        axes.axhline(1, color="grey", lw=0.8, ls="--")
        axes.set(xlabel="seconds tuned", ylabel="latency / ONNX Runtime's", ylim=(0, None))
        axes.legend(frameon=False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
