"""How many attention heads a sentence encoder needs: Michel, Levy and Neubig's experiment on MiniLM-L6.

    python -m benchmarks.pruning.heads

The 72 heads are ranked once and removed one share after another, and the embeddings of held-out sentences
compared with the original's. Nothing is masked: the heads leave the graph, as its MACs and parameters show.
Ranked by their importance after Michel et al. (*Are Sixteen Heads Really Better than One?*, 2019, without
labels, see :mod:`graphprune.passes.michel`), by the magnitude of their weights, and in random order (median
of three); the first two at every other share repaired in closed form on calibration sentences, too. Writes
``benchmarks/results/heads.md``, ``.json`` and ``.svg``. Some ten minutes on one free core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from graphprune.passes.attention import attentions
from graphprune.passes.michel import sensitivities
from graphprune.passes.prune_heads import PruneHeads
from graphprune.passes.repair import repair

import graphprune
from benchmarks.pruning import real
from benchmarks.pruning.data import Split
from benchmarks.record import RESULTS, conditions, page, table
from graphprune.graph import Graph
from graphprune.pipeline import Context

NETWORK = "minilm-l6"
SHARES = tuple(i / 10 for i in range(1, 10))
REPAIRED = SHARES[::2]
RANKED = 128  # calibration sentences that rank the heads
FITTED = 512  # that repair fits to
RIDGE = 0.1  # of repair; with 0.001 it fits the calibration sentences too closely
ORDERS = {"Michel": ("michel", (0,)), "magnitude": ("magnitude", (0,)), "random": ("random", (0, 1, 2))}
FIXED = ("Michel", "magnitude")
COLOURS = {"Michel": "#1f6fb4", "magnitude": "#c9701c", "random": "#7a7f87"}


@dataclass(frozen=True)
class Point:
    """One share of the heads removed in one order: what is left, and how near it is to the original.

    ``cosine`` and ``agreement`` are means over held-out sentences, as they are and where it was ``repaired``;
    ``macs`` (of one sentence) and ``parameters`` count the whole network.
    """

    order: str
    seed: int
    share: float
    heads: tuple[int, ...]
    macs: int
    parameters: int
    cosine: float
    agreement: float
    repaired_cosine: float | None = None
    repaired_agreement: float | None = None


def measure(graph: Graph, split: Split) -> list[Point]:
    """Every point of every curve."""
    points = []
    layers = attentions(graph)
    first = first_calls(split.calibration, RANKED)
    # Ranked once, as in the paper: the scores of the whole network serve every share.
    michel = sensitivities(graph, layers, first, probes=4)
    for order, (importance, seeds) in ORDERS.items():
        ranking: Any = (lambda _, axis: michel[axis.name]) if importance == "michel" else importance
        for seed in seeds:
            for share in SHARES:
                started = time.perf_counter()
                step = PruneHeads(heads=share, importance=ranking)
                result = step.run(graph, Context(seed=seed))
                assert result.plan is not None
                found, better = split.metrics(result.graph), {}
                if order in FIXED and share in REPAIRED:
                    fixed = repair(
                        graph, result.graph, result.plan, split.calibration, limit=FITTED, ridge=RIDGE
                    )
                    better = split.metrics(fixed.graph)
                point = Point(
                    order, seed, share, tuple(layer.count for layer in attentions(result.graph)),
                    result.plan.after["macs"] // 2, result.plan.after["parameters"],
                    found["mean cosine"], found["retrieval agreement"],
                    better.get("mean cosine"), better.get("retrieval agreement"),
                )  # fmt: skip
                points.append(point)
                seconds = time.perf_counter() - started
                print(f"{order} {seed}, {share:.0%} ({seconds:.0f} s): {point}", flush=True)
    return points


def first_calls(calibration: Sequence[Any], count: int) -> list[tuple[torch.Tensor, ...]]:
    """The first ``count`` samples of some batches."""
    left, calls = count, []
    for batch in calibration:
        if left > 0:
            calls.append(tuple(t[:left] for t in batch))
            left -= len(calls[-1][0])
    return calls


def of(points: Sequence[Point], order: str, share: float, name: str) -> float:
    """The median over seeds of one figure."""
    return median(getattr(p, name) for p in points if p.order == order and p.share == share)


def report(points: Sequence[Point], whole: Point) -> str:
    """The tables in Markdown."""
    kinds = {"": "", "repaired_": ", repaired"}
    columns = [(o, k) for o in ORDERS for k in kinds if not k or o in FIXED]
    head = ["heads removed", *(order + kinds[kind] for order, kind in columns)]

    def figures(name: str) -> str:
        rows = [["0%", *["1.0000"] * len(columns)]]
        for share in SHARES:
            cells = [
                f"{of(points, order, share, kind + name):.4f}" if not kind or share in REPAIRED else ""
                for order, kind in columns
            ]
            rows.append([f"{share:.0%}", *cells])
        return table(head, rows)

    left = [whole, *(p for p in points if p.order == "Michel")]
    sizes = [
        [f"{p.share:.0%}", sum(p.heads), " ".join(map(str, p.heads)), f"{p.macs:,}", f"{p.parameters:,}"]
        for p in left
    ]
    return "\n\n".join([
        "## Mean cosine to the original's embedding", figures("cosine"),
        "## Retrieval agreement", "Share of held-out sentences whose nearest other one is the original's.",
        figures("agreement"),
        "## What is left (Michel's order)",
        table(["heads removed", "heads", "in each layer", "MACs a sentence", "parameters"], sizes),
        "![Mean cosine over the share of heads removed](heads.svg)",
    ])  # fmt: skip


def draw(points: Sequence[Point], path: Path) -> None:
    """The curves as SVG: cosine and agreement over the share of heads removed."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "heads", "font.size": 9, "svg.fonttype": "none"}):
        figure, plots = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        for plot, name, title in zip(
            plots, ("cosine", "agreement"), ("mean cosine", "retrieval agreement"), strict=True
        ):
            for order, colour in COLOURS.items():
                for kind, style, shares in (("", "o:", SHARES), ("repaired_", "o-", REPAIRED)):
                    if kind and order not in FIXED:
                        continue
                    values = [1.0, *(of(points, order, share, kind + name) for share in shares)]
                    label = f"{order}{', repaired' if kind else ''}"
                    plot.plot([0.0, *shares], values, style, color=colour, label=label, markersize=3)
                    runs = [[getattr(p, kind + name) for p in points if (p.order, p.share) == (order, share)]
                            for share in shares]  # fmt: skip
                    low, high = [min(run) for run in runs], [max(run) for run in runs]
                    plot.fill_between(shares, low, high, color=colour, alpha=0.15, linewidth=0)
            plot.set_xlabel("share of heads removed")
            plot.set_ylabel(title)
            plot.set_ylim(top=1.01)
            plot.grid(alpha=0.3)
        plots[0].legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def main() -> None:
    """Measure, print and write the results."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    split = real.split(NETWORK)
    graph = graphprune.trace(real.define(NETWORK), split.example, dynamic_batch=True)
    totals = graph.plan({}).before
    heads = tuple(layer.count for layer in attentions(graph))
    whole = Point("", 0, 0.0, heads, totals["macs"] // 2, totals["parameters"], 1.0, 1.0)
    points = measure(graph, split)
    facts = {
        "network": "all-MiniLM-L6-v2, 6 layers of 12 heads, sentences of up to 32 tokens",
        "ranked and repaired on": f"{RANKED} and {FITTED} calibration sentences, without labels",
        "ridge of repair": str(RIDGE),
        "random order": "median of 3 seeds; the band is their range",
        **conditions(("torch", "transformers")),
    }
    body = report(points, whole)
    title = "Heads removed from a sentence encoder"
    page(RESULTS / "heads.md", "pruning.heads", title, body, [whole, *points], facts)
    draw(points, RESULTS / "heads.svg")
    print(body)


if __name__ == "__main__":
    main()
