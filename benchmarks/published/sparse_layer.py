"""What zeros are worth in time, on one linear layer: a sparse format, or rows that are gone.

Dense in ONNX Runtime, the same layer as a compressed sparse row (CSR) matrix in torch with 80, 90 and 95 % of
its entries zero, and in ONNX Runtime with as many of its rows removed. Each contestant runs in a process of
its own, they take turns, and ratios are of one round each (:func:`graphprune.measure.isolated`). This part
of :mod:`benchmarks.published.sparsity` takes about a minute.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphprune
from benchmarks.record import conditions, table
from graphprune.measure import Timing, isolated, ratio
from graphprune.sittings import one_turn
from graphprune.sparsity.patterns import Anywhere

FOLDER = Path(__file__).parents[2] / "build" / "published" / "sparse-layer"
INPUTS, OUTPUTS = 1024, 4096
BATCHES = (1, 32)
SHARES = (0.8, 0.9, 0.95)
ROUNDS, PAUSE = 60, 0.01
CALLS = 20  # of a turn: the first finds its weights driven out of the caches
DENSE, AGAIN = "dense, ONNX Runtime", "dense, again"


@dataclass(frozen=True)
class Layer:
    """One measurement.

    Attributes:
        conditions: when and where.
        ms: batch → contestant → milliseconds of a call in every round.
    """

    conditions: dict[str, str]
    ms: dict[str, dict[str, list[float]]]


def measure() -> Layer:
    """Every contestant, at every batch size, with one thread."""
    built = {share: build(share) for share in (0.0, *SHARES)}
    found: dict[str, dict[str, list[float]]] = {}
    for batch in BATCHES:
        calls: dict[str, Callable[[], Callable[[], Any]]] = {
            name: partial(opened, built[0.0], batch) for name in (DENSE, AGAIN)
        }
        for share in SHARES:
            calls[_csr(share)] = partial(compressed, share, batch)
            calls[_rows(share)] = partial(opened, built[share], batch)
        turns = {name: partial(turn, call) for name, call in calls.items()}
        timings = isolated(turns, rounds=ROUNDS, warmup=1, threads=1, pause=PAUSE)
        found[str(batch)] = {name: [ms / CALLS for ms in one.samples] for name, one in timings.items()}
    return Layer(conditions(("torch", "onnxruntime")), found)


def turn(opening: Callable[[], Callable[[], Any]]) -> Callable[[], None]:
    """What a process runs in its turn."""
    return partial(one_turn, opening(), CALLS)


def layer(share: float = 0.0) -> nn.Linear:
    """The layer with a share of its rows removed."""
    torch.manual_seed(0)
    return nn.Linear(INPUTS, round((1 - share) * OUTPUTS)).eval()


def build(share: float) -> Path:
    """An artifact of :func:`layer`."""
    result = graphprune.optimize(
        layer(share), torch.zeros(1, INPUTS), dynamic_batch=True, backend="onnxruntime", measure=False,
        threads=1,
    )  # fmt: skip
    return result.save(FOLDER / f"{share:.2f}", overwrite=True)


def opened(path: Path, batch: int) -> Callable[[], Any]:
    """A call of an artifact."""
    return partial(graphprune.load(path, threads=1), inputs(batch))


def compressed(share: float, batch: int) -> Callable[[], Any]:
    """A call of the layer in CSR, without its smallest entries; its answer is the dense product's."""
    dense = layer()
    weight, bias, x = dense.weight.detach(), dense.bias.detach()[:, None], inputs(batch).T.contiguous()
    weight = weight * Anywhere(share).mask(weight.abs())
    call = partial(torch.addmm, bias, weight.to_sparse_csr(), x)
    torch.testing.assert_close(call(), torch.addmm(bias, weight, x), atol=1e-4, rtol=1e-4)
    return call


def inputs(batch: int) -> torch.Tensor:
    """``[batch, inputs]``."""
    return torch.randn(batch, INPUTS, generator=torch.Generator().manual_seed(1))


def section(found: Layer) -> str:
    """The part of the page."""
    head = ["", *(text for batch in found.ms for text in (f"batch {batch}, ms", "times as fast as dense"))]
    body = []
    for name in next(iter(found.ms.values())):
        row = [name]
        for ms in found.ms.values():
            own, dense = _timing(ms[name]), _timing(ms[DENSE])
            row += [f"{own.median_ms:.3f}", str(ratio(dense, own))]
        body.append(row)
    rounds = len(next(iter(found.ms.values()))[DENSE])
    facts = "\n".join(f"- {key}: {value}" for key, value in found.conditions.items())
    text = _ABOUT.format(inputs=INPUTS, outputs=OUTPUTS, rounds=rounds, calls=CALLS, facts=facts)
    return f"{text}\n{table(head, body)}"


_ABOUT = """\
## Time

One linear layer of {inputs:,} inputs and {outputs:,} outputs, 1 thread, {rounds} rounds in turns of {calls}
calls, each contestant in a process of its own. The ratio is how many times as fast as dense in ONNX Runtime,
the median of the rounds and the quartiles; *dense, again* is noise. CSR is torch's product with a compressed
sparse row matrix; *rows removed* is a layer with as many outputs fewer.

{facts}
"""


def _timing(samples: list[float]) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples), 1, tuple(samples))


def _csr(share: float) -> str:
    return f"{share:.0%} zeros, torch CSR"


def _rows(share: float) -> str:
    return f"{share:.0%} of the rows removed, ONNX Runtime"
