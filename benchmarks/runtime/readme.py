"""The summary of `results/runtime.json` that stands in the readme, between two marks.

`tests/test_docs.py` holds the readme to it, so no figure there is older than the results.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.axes.record import RESULTS, table

README = Path(__file__).parents[2] / "README.md"
_SECTION = re.compile(r"<!-- runtime -->\n.*?<!-- end of runtime -->\n", re.DOTALL)


def section() -> str:
    """The marks and what belongs between them."""
    results = json.loads((RESULTS / "runtime.json").read_text())
    facts = results["conditions"]
    head = ("network", "eager, ms", "artifact, ms", "eager / artifact", "plain export / artifact", "noise")
    rows = [
        (row["network"], f"{row['eager_ms']:.1f}", f"{row['artifact_ms']:.1f}",
         *(_ratio(row[key]) for key in ("eager_to_artifact", "plain_to_artifact", "noise")))
        for row in results["rows"]
    ]  # fmt: skip
    about = (
        f"Batch 1, float32, lossless passes, {facts['threads']} thread(s), {facts['rounds']} rounds, "
        f"{facts['host']}, load {facts['load average over 1, 5 and 15 minutes'].partition(',')[0]}, "
        f"onnxruntime {facts['onnxruntime']}, {facts['date'][:10]}."
    )
    return f"<!-- runtime -->\n{about}\n\n{table(head, rows)}\n<!-- end of runtime -->\n"


def _ratio(values: dict[str, Any]) -> str:
    return f"{values['median']:.2f} ({values['low']:.2f} to {values['high']:.2f})"


def find(text: str) -> str:
    """The section as it stands in a text, or nothing."""
    match = _SECTION.search(text)
    return match[0] if match else ""


def update() -> None:
    """Put the section of the results in place of the readme's."""
    text = README.read_text()
    if not find(text):
        raise ValueError(f"{README} has no line '<!-- runtime -->' with its end; add both where it belongs")
    README.write_text(_SECTION.sub(lambda _: section(), text, count=1))
