"""A network with half of every exact axis: is it really smaller, and faster?

``python -m benchmarks.axes.half [NAME …]``. Each network, at its usual size, is pruned with ``ratio=0.5`` and
widths that stay multiples of ``ALIGN`` where an axis has as many; original and half go through ``optimize``
(lossless passes) to ONNX Runtime. The two artifacts are timed in turns, each in a process of its own
(:func:`graphprune.measure.isolated`); the original runs a second time as the measure of noise. Weights are
random: sizes and speed do not depend on them, and accuracy is not the question here.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import graphprune
from benchmarks import record
from graphprune import measure, verify
from graphprune.cost import cost
from tests.zoo import torchvision_schemas

ALIGN = 16
THREADS = 1
ROUNDS = 20
IMAGE = (1, 3, 224, 224)
VISION = ("resnet18", "resnet50", "mobilenet_v2", "densenet121", "vit_b_16", "swin_t", "convnext_tiny")


@dataclass(frozen=True)
class Row:
    """Original and half, as pairs; bytes are of the ONNX files, latencies ms with quartiles."""

    network: str
    parameters: tuple[int, int]
    macs: tuple[int, int]
    bytes: tuple[int, int]
    latency: tuple[tuple[float, float, float], tuple[float, float, float]]
    faster: tuple[float, float, float]
    noise: tuple[float, float, float]
    error: float


def _vision(name: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    torchvision_schemas.declare()
    from torchvision import models

    return getattr(models, name)(weights=None).eval(), (torch.randn(IMAGE),)


def _bert_mini() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """Four layers of width 256 (Turc et al., 2019) with a classifier: the caller sees no hidden width."""
    torchvision_schemas.declare()
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
                        return_dict=False)  # fmt: skip
    return BertForSequenceClassification(config).eval(), (torch.randint(0, 30522, (1, 128)),)


NETWORKS: dict[str, Callable[[], tuple[torch.nn.Module, tuple[torch.Tensor, ...]]]] = {
    **{name: partial(_vision, name) for name in VISION},
    "bert_mini": _bert_mini,
}


def opened(directory: str, inputs: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    """A saved artifact as a call without arguments; runs in the process that measures."""
    runner = graphprune.load(directory, threads=THREADS)
    return partial(runner, *inputs)


def examine(name: str) -> Row:
    """Prune, prove, build both artifacts and measure them."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    graph = graphprune.trace(model, inputs)
    plan = graph.plan(ratio=0.5, align=ALIGN)
    half = graph.apply(plan)
    certificate = verify.require(verify.mask_equivalence(graph, plan, pruned=half), name)
    with tempfile.TemporaryDirectory() as folder:
        sizes = []
        for label, module in (("original", model), ("half", half.module)):
            result = graphprune.optimize(module, inputs, target="cpu", backend="onnxruntime", measure=False)
            path = result.save(Path(folder) / label)
            sizes.append(sum(f.stat().st_size for f in path.iterdir() if ".onnx" in f.name))
        labels = {"original": "original", "half": "half", "original again": "original"}
        factories = {key: partial(opened, str(Path(folder) / label), inputs) for key, label in labels.items()}
        timings = measure.isolated(factories, rounds=ROUNDS, threads=THREADS)
    first, second = cost(graph), cost(half)
    faster = measure.ratio(timings["original"], timings["half"])
    noise = measure.ratio(timings["original"], timings["original again"])
    latency = [(t.median_ms, t.low_ms, t.high_ms) for t in (timings["original"], timings["half"])]
    return Row(
        name, (first.parameters, second.parameters), (first.macs, second.macs), (sizes[0], sizes[1]),
        (latency[0], latency[1]), (faster.median, faster.low, faster.high),
        (noise.median, noise.low, noise.high), certificate.max_relative,
    )  # fmt: skip


def main(wanted: list[str]) -> None:
    """Measure, print and write."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    rows = []
    for name in wanted or NETWORKS:
        rows.append(examine(name))
        print(*_cells(rows[-1]), sep="  ", flush=True)
    head = ["network", "parameters, M", "MACs, G", "ONNX file, MB", "latency, ms", "faster",
            "same artifact twice", "error to zeroed original"]  # fmt: skip
    words = (
        f"Original → half. `ratio=0.5`, widths multiples of {ALIGN}, ONNX Runtime on the CPU with {THREADS} "
        f"thread, {ROUNDS} rounds in turns; medians with quartiles. *Same artifact twice* is the noise: a "
        "ratio within it is none. Weights are random; nothing is said about accuracy."
    )
    body = f"{words}\n\n{record.table(head, [_cells(r) for r in rows])}"
    facts = record.conditions(("torch", "torchvision", "transformers", "onnxruntime")) | {
        "threads": str(THREADS)
    }
    if not wanted:
        print(record.write("half", "Half-size networks", body, rows, facts))


def _cells(row: Row) -> tuple[str, ...]:
    def share(pair: tuple[int, int], unit: float) -> str:
        return f"{pair[0] / unit:.2f} → {pair[1] / unit:.2f} (×{pair[1] / pair[0]:.2f})"

    def spread(values: tuple[float, float, float], mark: str = "") -> str:
        return f"{mark}{values[0]:.3g} ({values[1]:.3g} to {values[2]:.3g})"

    return (
        row.network, share(row.parameters, 1e6), share(row.macs, 1e9), share(row.bytes, 1e6),
        f"{spread(row.latency[0])} → {spread(row.latency[1])}", spread(row.faster, "×"),
        spread(row.noise, "×"), f"{row.error:.1e}",
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
