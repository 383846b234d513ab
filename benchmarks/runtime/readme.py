"""The summary of `results/runtime.json` that stands in the readme."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.readme import marked
from benchmarks.record import RESULTS, table


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
    return marked("runtime", f"{about}\n\n{table(head, rows)}")


def _ratio(values: dict[str, Any]) -> str:
    return f"{values['median']:.2f} ({values['low']:.2f} to {values['high']:.2f})"
