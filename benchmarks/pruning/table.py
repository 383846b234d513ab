"""Results as tables, JSON and a plot of accuracy over multiply-accumulates."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.pruning.comparison import ALONE, OURS, RECALIBRATED, REPAIRED, Result
from benchmarks.record import table

Method = tuple[str, str, str]
"""Library, variant, treatment."""
LIBRARIES = ("torch-pruning", "torch-kirigami")


class Rows:
    """The results of all seeds, to be asked for medians."""

    def __init__(self, results: Iterable[Result]):
        self.results = list(results)
        self.networks = list(dict.fromkeys(r.network for r in self.results))

    def shares(self, network: str) -> list[float]:
        """Budgets of a network, largest first, without the original."""
        found = {r.share for r in self.results if r.network == network and r.share < 1}
        return sorted(found, reverse=True)

    def of(self, network: str, share: float, method: Method) -> list[Result]:
        """One result a seed."""
        wanted = (network, share, *method)
        return [r for r in self.results if (r.network, r.share, r.library, r.variant, r.treatment) == wanted]

    def methods(self, network: str) -> list[Method]:
        """All that were tried on a network."""
        found = [(r.library, r.variant, r.treatment) for r in self.results if r.network == network]
        return [method for method in dict.fromkeys(found) if method[0]]

    def median(self, network: str, share: float, method: Method) -> float | None:
        """The median score over seeds; ``None`` where a seed failed."""
        scores = [r.score for r in self.of(network, share, method)]
        if not scores or any(score is None for score in scores):
            return None
        return statistics.median(s for s in scores if s is not None)

    def best(
        self, network: str, share: float, libraries: Sequence[str], treatments: Sequence[str]
    ) -> Method | None:
        """The method of the highest median."""
        found = [
            (score, method)
            for method in self.methods(network)
            if method[0] in libraries and method[2] in treatments
            for score in (self.median(network, share, method),)
            if score is not None
        ]
        return max(found, key=lambda pair: pair[0])[1] if found else None

    def original(self, network: str) -> Method:
        """The method of the unpruned network."""
        return ("", "", "")


def cell(results: Sequence[Result]) -> str:
    """Median and range of the scores in per cent; why there is none."""
    if not results:
        return "–"
    scores = [100 * r.score for r in results if r.score is not None]
    if len(scores) < len(results):
        return next(f"fails: {r.failure}" for r in results if r.failure)[:80]
    text = f"{statistics.median(scores):.1f}"
    return text if len(scores) == 1 else f"{text} ({min(scores):.1f}–{max(scores):.1f})"


def summary(rows: Rows) -> str:
    """One row a network and budget: ours, the best of each library, and the differences."""
    head = ["network", "MACs left", "unpruned", "ours"]
    head += [
        f"{library}, {what}" for library in LIBRARIES for what in ("alone", "BN recalibrated", "our repair")
    ]
    head += ["ours − best peer", "ours − best peer with our repair"]
    lines = []
    for network in rows.networks:
        for share in rows.shares(network):
            ours = (OURS, "", "")
            line = [network, f"{share:.1%}".replace(".0%", "%")]
            line += [cell(rows.of(network, 1.0, rows.original(network))), cell(rows.of(network, share, ours))]
            top = rows.best(network, share, LIBRARIES, (ALONE, RECALIBRATED))
            for library in LIBRARIES:
                line += [
                    _peer(rows, network, share, library, what, top)
                    for what in (ALONE, RECALIBRATED, REPAIRED)
                ]
            line.append(_ahead(rows, network, share, top))
            line.append(_ahead(rows, network, share, rows.best(network, share, LIBRARIES, (REPAIRED,))))
            lines.append(line)
    return table(head, lines)


def _peer(rows: Rows, network: str, share: float, library: str, treatment: str, top: Method | None) -> str:
    method = rows.best(network, share, (library,), (treatment,))
    if method is None:
        tried = [m for m in rows.methods(network) if m[0] == library and m[2] == treatment]
        return "fails" if any(rows.of(network, share, m) for m in tried) else "–"
    text = f"{cell(rows.of(network, share, method))} {method[1]}"
    return f"**{text}**" if method == top else text


def _ahead(rows: Rows, network: str, share: float, other: Method | None) -> str:
    ours = rows.median(network, share, (OURS, "", ""))
    theirs = None if other is None else rows.median(network, share, other)
    if ours is None or theirs is None:
        return "–"
    return f"{100 * (ours - theirs):+.1f}"


def details(rows: Rows, network: str) -> str:
    """Every method on one network: score and, behind it, the share of MACs that was left."""
    shares = rows.shares(network)
    lines = []
    for method in rows.methods(network):
        line = [", ".join(part for part in method if part)]
        for share in shares:
            results = rows.of(network, share, method)
            left = [r.reached for r in results if r.reached is not None]
            line.append(cell(results) + (f" at {statistics.median(left):.1%}" if left else ""))
        lines.append(line)
    return table(["method", *(f"{share:.1%} of MACs" for share in shares)], lines)


def others(rows: Rows) -> str:
    """Further metrics of our results, where a network has more than one."""
    lines = [
        [r.network, f"{r.share:.1%}", *(f"{name} {value:.3f}" for name, value in r.metrics.items())]
        for r in rows.results
        if len(r.metrics) > 1 and r.library in ("", OURS)
    ]
    return table(["network", "MACs", "", "", ""], lines) if lines else ""


def write(rows: Rows, facts: dict[str, str], folder: Path, name: str = "pruning") -> Path:
    """Write ``NAME.json``, ``NAME.md`` and ``NAME.svg``; returns the path of the Markdown file."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"conditions": facts, "rows": [asdict(r) for r in rows.results]}
    (folder / f"{name}.json").write_text(json.dumps(plain, indent=1) + "\n")
    plot(rows, folder / f"{name}.svg")
    about = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    parts = [
        "# Pruning without training", "Written by `python -m benchmarks.pruning`.", about,
        "Scores are per cent on inputs that no method saw: medians over the seeds, and their range. Each "
        "library's best variant is shown, chosen by that score; of the libraries without our repair, the "
        "best is bold. No method has more multiply-accumulates than the budget, by one counter.",
        summary(rows), f"![Score over multiply-accumulates]({name}.svg)", "## Every method",
    ]  # fmt: skip
    for network in rows.networks:
        parts += [f"### {network}", details(rows, network)]
    extra = others(rows)
    parts += ["## Further figures of ours", extra] if extra else []
    path = folder / f"{name}.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def load(path: Path) -> tuple[Rows, dict[str, str]]:
    """Results and conditions from :func:`write`'s JSON."""
    data: Any = json.loads(path.read_text())
    return Rows(Result(**row) for row in data["rows"]), data["conditions"]


def plot(rows: Rows, path: Path) -> None:
    """Score over the share of multiply-accumulates, a panel a network."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    columns = min(4, max(1, len(rows.networks)))
    height = -(-len(rows.networks) // columns)
    with matplotlib.rc_context({"svg.hashsalt": "graphprune", "font.size": 8, "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(height, columns, figsize=(3 * columns, 2.6 * height), squeeze=False)
        for panel, network in zip(axes.flat, rows.networks, strict=False):
            _panel(panel, rows, network)
        for panel in list(axes.flat)[len(rows.networks) :]:
            panel.set_visible(False)
        handles: dict[str, Any] = {}
        for panel in axes.flat:
            handles.update(dict(zip(*panel.get_legend_handles_labels()[::-1], strict=True)))
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, frameon=False)
        figure.tight_layout(rect=(0, 0.09 if height > 1 else 0.17, 1, 1))
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _panel(panel: Any, rows: Rows, network: str) -> None:
    styles = {ALONE: ":", RECALIBRATED: "--", REPAIRED: "-."}
    colours = dict(zip((OURS, *LIBRARIES), ("black", "tab:orange", "tab:blue"), strict=True))
    shares = rows.shares(network)
    start = rows.median(network, 1.0, rows.original(network))
    lines = [(OURS, "", "-", OURS)]
    lines += [(lib, what, styles[what], f"{lib}, {what}") for lib in LIBRARIES for what in styles]
    for library, treatment, style, label in lines:
        points = []
        for share in shares:
            method = (
                (OURS, "", "") if library == OURS else rows.best(network, share, (library,), (treatment,))
            )
            score = None if method is None else rows.median(network, share, method)
            if score is not None:
                points.append((100 * share, 100 * score))
        if points:
            points = [(100.0, 100 * start), *points] if start is not None else points
            width = 1.8 if library == OURS else 1.0
            panel.plot(*zip(*points, strict=True), style, color=colours[library], label=label,
                       linewidth=width, marker="o", markersize=2.5)  # fmt: skip
    panel.set_title(network)
    panel.set_xscale("log")
    ticks = [100.0, *(100 * share for share in shares)]
    panel.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel("MACs left, %")
    panel.set_ylabel("score, %")
    panel.grid(alpha=0.3)
