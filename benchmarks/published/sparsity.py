"""Zeros without training: 2:4 and 80 %, by magnitude alone and with the second-order correction.

    python -m benchmarks.published.sparsity [--networks …] [--seeds 0 1 2] [--parts accuracy time]

Every linear and convolution weight of a trained network loses the same share of its entries. The correction
chooses what goes, and refits what stays, by the Gram matrix of each operator's inputs (Frantar and Alistarh,
SparseGPT, 2023), from 128 unlabelled inputs. The score is the network's own, on inputs that nothing saw.
What is stored is
the artifact compressed; a CPU's runtime multiplies with the zeros as with anything else. What they are worth
in time is measured on one layer (:mod:`benchmarks.published.sparse_layer`). The page keeps the figures of a
part that is not run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

import graphprune
from benchmarks.pruning import networks as digits
from benchmarks.pruning import real, training
from benchmarks.pruning.data import split
from benchmarks.published import sparse_layer
from benchmarks.record import RESULTS, conditions, page, table
from graphprune.compact import pack
from graphprune.pipeline import Context, Pipeline
from graphprune.registry import backends
from graphprune.target import get

NAMES = ("resnet20", "vgg", "vit", "crepe-tiny", "minilm-l6", "efficientnet-lite0")
PARTS = ("accuracy", "time")
PAGE = RESULTS / "sparsity.md"
PATTERNS = {"2:4": "pattern=2:4", "80 %": "sparsity=0.8"}


@dataclass(frozen=True)
class Row:
    """One network of one seed.

    Attributes:
        metric: what is scored, 0 to 1.
        dense: that score before.
        plain, corrected: the same with zeros.
        stored: bytes with zeros, corrected, compressed, to those of the dense one, compressed.
        seconds: that the correction took, one thread.
    """

    network: str
    seed: int
    pattern: str
    metric: str
    dense: float
    plain: float
    corrected: float
    stored: float
    seconds: float


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", default=NAMES, choices=NAMES)
    parser.add_argument("--seeds", type=int, nargs="*", default=(0, 1, 2), help="of networks trained here")
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known: dict[str, Any] = json.loads(PAGE.with_suffix(".json").read_text()) if PAGE.exists() else {}
    facts, parts = known.get("conditions", {}), known.get("rows", {})
    if "accuracy" in arguments.parts:
        rows: list[Row] = []
        for name in arguments.networks:
            for seed in arguments.seeds if name in digits.NAMES else (0,):
                for row in compare(name, seed):
                    rows.append(row)
                    print(row, flush=True)
        facts = conditions(("torch", "graphprune", "onnxruntime", "zstandard"))
        parts = {**parts, "accuracy": [asdict(row) for row in rows]}
    if "time" in arguments.parts:
        parts = {**parts, "time": asdict(sparse_layer.measure())}
    write(facts, parts)


def compare(name: str, seed: int) -> Iterator[Row]:
    """The rows of one network."""
    data = split(name)
    model = training.trained(name, seed) if name in digits.NAMES else real.define(name)
    graph = graphprune.trace(model.eval(), data.example, dynamic_batch=True)
    metric, dense = next(iter(data.metrics(graph.module.eval()).items()))
    whole = _stored(graph)
    for label, option in PATTERNS.items():
        scores: dict[bool, float] = {}
        for correct in (False, True):
            steps = f"prune-weights{{{option} correct={str(correct).lower()}}},strip-masks"
            started = time.perf_counter()
            sparse = Pipeline.parse(steps).run(graph, Context(calibration=data.calibration)).graph
            seconds = time.perf_counter() - started
            scores[correct] = data.score(sparse.module.eval())
        yield Row(
            name, seed, label, metric, dense, scores[False], scores[True], _stored(sparse) / whole, seconds
        )


def _stored(graph: Any) -> int:
    """Bytes of the compressed ONNX file."""
    lowered = backends.load("onnxruntime")().lower(graph, get("cpu"))
    return len(pack(lowered.files, level=9))


def write(facts: dict[str, str], parts: dict[str, Any]) -> None:
    """``results/sparsity.md`` and ``.json``, of what was measured now or before."""
    texts = []
    if "accuracy" in parts:
        texts.append(section([Row(**row) for row in parts["accuracy"]]))
    if "time" in parts:
        texts.append(sparse_layer.section(sparse_layer.Layer(**parts["time"])))
    text = "\n\n".join(texts)
    page(PAGE, "published.sparsity", "Zeros without training", text, parts, facts)
    print(text)


def section(rows: list[Row]) -> str:
    """What accuracy and size the zeros leave."""
    head = [
        "network",
        "zeros",
        "score",
        "dense",
        "by magnitude",
        "corrected",
        "points regained",
        "stored",
        "s",
    ]
    body = []
    for name, label in dict.fromkeys((row.network, row.pattern) for row in rows):
        own = [row for row in rows if (row.network, row.pattern) == (name, label)]
        dense, plain, corrected = (
            [100 * getattr(row, what) for row in own] for what in ("dense", "plain", "corrected")
        )
        gained = [c - p for c, p in zip(corrected, plain, strict=True)]
        body.append([
            name, label, f"{own[0].metric}, {len(own)} seed{'s' if len(own) > 1 else ''}", _spread(dense),
            _spread(plain), _spread(corrected), _spread(gained), f"{own[0].stored:.2f}",
            f"{statistics.mean(row.seconds for row in own):.1f}",
        ])  # fmt: skip
    return f"{_ABOUT}{_useless(rows)}\n{table(head, body)}"


def _useless(rows: list[Row]) -> str:
    """A sentence on EfficientNet-Lite0, which no correction saves."""
    own = [row for row in rows if row.network == "efficientnet-lite0"]
    if not own:
        return ""
    said = " and ".join(f"{100 * row.corrected:.1f} % at {row.pattern}" for row in own)
    return f"EfficientNet-Lite0 stays useless without training: it agrees with the original on {said}.\n"


_ABOUT = """\
Scores in percent, the mean over seeds and from the least to the most; 2:4 keeps two of every four
neighbouring inputs. *Stored* is the compressed file to that of the dense network, *s* what the correction
took.
"""


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
