"""A language model of seven billion parameters, traced, typed and planned without its weights.

``python -m benchmarks.axes.llm`` runs each shape in a process of its own and prints wall time and the peak of
resident memory. Shapes are those of Llama 2 7B (Touvron et al., 2023, table 1) and of the same network with
eight key/value heads. The model is built on the meta device: weights have shapes and no values, so importance
is random.
"""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import record

SHAPES = {"llama_7b": (32, 32), "llama_7b_grouped": (32, 8)}
LIMITS = {"seconds": 60.0, "gigabytes": 4.0}


@dataclass(frozen=True)
class Row:
    """One shape: seconds of wall time from the import of libraries on, peak resident memory in GB."""

    shape: str
    parameters: int
    nodes: int
    building: float
    tracing: float
    typing: float
    planning: float
    applying: float
    seconds: float
    gigabytes: float
    coverage: float
    exact: int
    parameters_after: int
    macs: float


def examine(shape: str, layers: int, heads: int, tokens: int = 128) -> Row:
    """Build, trace, type, plan and apply one shape in this process."""
    start = time.perf_counter()
    marks = [start]
    from tests.zoo import torchvision_schemas

    torchvision_schemas.declare()
    import torch
    import transformers

    import graphprune

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=layers,
        num_key_value_heads=heads, vocab_size=32000, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
        ids = torch.zeros(1, tokens, dtype=torch.long)
    marks.append(time.perf_counter())
    graph = graphprune.trace(model, {"input_ids": ids})
    marks.append(time.perf_counter())
    axes = graph.axes
    marks.append(time.perf_counter())
    plan = graph.plan(ratio=0.5, importance="random")
    marks.append(time.perf_counter())
    graph.apply(plan)
    marks.append(time.perf_counter())
    building, tracing, typing, planning, applying = (b - a for a, b in itertools.pairwise(marks))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Row(
        shape, plan.before["parameters"], len(graph.nodes), building, tracing, typing, planning, applying,
        marks[-1] - start, peak / (2**20 if sys.platform != "darwin" else 2**30), axes.coverage,
        len(axes.exact), plan.after["parameters"], plan.after["macs"] / plan.before["macs"],
    )  # fmt: skip


def in_a_process(shape: str, layers: int, heads: int) -> Row:
    """:func:`examine` in a fresh process, so that its peak of memory is its own."""
    command = [sys.executable, "-m", "benchmarks.axes.llm", shape, str(layers), str(heads)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return Row(**found)


def main() -> int:
    """Every shape; returns how many are over a limit."""
    rows = [in_a_process(shape, *sizes) for shape, sizes in SHAPES.items()]
    head = ["shape", "parameters", "after halving every exact axis", "MACs", "prunable", "nodes", "build, s",
            "trace, s", "type, s", "plan, s", "apply, s", "all, s", "peak memory, GB"]  # fmt: skip
    body = record.table(head, [_cells(r) for r in rows])
    print(body)
    words = (
        "Wall time, one thread; build includes importing the libraries. "
        f"Limits: {LIMITS['seconds']:.0f} s, {LIMITS['gigabytes']:.0f} GB of resident memory."
    )
    facts = record.conditions(("torch", "transformers"))
    title = "A seven-billion-parameter shape without weights"
    print(record.write("llm", title, f"{words}\n\n{body}", rows, facts))
    return sum(r.seconds > LIMITS["seconds"] or r.gigabytes > LIMITS["gigabytes"] for r in rows)


def _cells(r: Row) -> tuple[str, ...]:
    times = (r.building, r.tracing, r.typing, r.planning, r.applying, r.seconds, r.gigabytes)
    return (
        r.shape, f"{r.parameters:,}", f"{r.parameters_after:,}", f"×{r.macs:.2f}", f"{r.coverage:.1%}",
        str(r.nodes), *(f"{value:.2f}" for value in times),
    )  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(asdict(examine(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))))
    else:
        sys.exit(bool(main()))
