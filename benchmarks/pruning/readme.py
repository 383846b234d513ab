"""The summary of `results/pruning.json` that stands in the readme."""

from __future__ import annotations

from benchmarks.pruning.comparison import ALONE, OURS, RECALIBRATED, REPAIRED
from benchmarks.pruning.table import LIBRARIES, Method, Rows, load
from benchmarks.readme import marked
from benchmarks.record import RESULTS, table

_ABOUT = """\
Per cent on unseen inputs (accuracy; CREPE: pitch; EfficientNet: agreement with the original; MiniLM:
mean cosine to the original), without training, medians of three networks where they are trained here. The
others are torch-pruning and torch-kirigami at their best, with batch norms recalibrated
([every method](benchmarks/results/pruning.md))."""


def section() -> str:
    """The marks and what belongs between them."""
    rows = load(RESULTS / "pruning.json")[0]
    head = (
        "network",
        "unpruned",
        "MACs left",
        "graphprune",
        "best other library",
        "the same with our repair",
    )
    lines = [
        (
            network, _score(rows, network, 1.0, rows.original(network)), f"{share:.1%}".replace(".0%", "%"),
            _score(rows, network, share, (OURS, "", "")),
            _score(rows, network, share, rows.best(network, share, LIBRARIES, (ALONE, RECALIBRATED))),
            _score(rows, network, share, rows.best(network, share, LIBRARIES, (REPAIRED,))),
        )
        for network in rows.networks
        for share in rows.shares(network)
    ]  # fmt: skip
    return marked("pruning", f"{_ABOUT}\n\n{table(head, lines)}")


def _score(rows: Rows, network: str, share: float, method: Method | None) -> str:
    found = None if method is None else rows.median(network, share, method)
    return "–" if found is None else f"{100 * found:.1f}"
