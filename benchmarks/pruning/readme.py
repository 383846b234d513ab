"""The summary of `results/pruning.json` that stands in the readme, between two marks.

`tests/test_docs.py` holds the readme to it, so no figure there is older than the results.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.axes.record import RESULTS, table
from benchmarks.pruning.comparison import ALONE, OURS, RECALIBRATED, REPAIRED
from benchmarks.pruning.table import LIBRARIES, Method, Rows, load

README = Path(__file__).parents[2] / "README.md"
_SECTION = re.compile(r"<!-- pruning -->\n.*?<!-- end of pruning -->\n", re.DOTALL)
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
    return f"<!-- pruning -->\n{_ABOUT}\n\n{table(head, lines)}\n<!-- end of pruning -->\n"


def _score(rows: Rows, network: str, share: float, method: Method | None) -> str:
    found = None if method is None else rows.median(network, share, method)
    return "–" if found is None else f"{100 * found:.1f}"


def find(text: str) -> str:
    """The section as it stands in a text, or nothing."""
    match = _SECTION.search(text)
    return match[0] if match else ""


def update() -> None:
    """Put the section of the results in place of the readme's."""
    text = README.read_text()
    if not find(text):
        raise ValueError(f"{README} has no line '<!-- pruning -->' with its end; add both where it belongs")
    README.write_text(_SECTION.sub(lambda _: section(), text, count=1))
