"""Our side of the comparison: all that decides how well it does is here.

`optimize` does the same for a caller; the pieces are called one by one so that no measurement of its own
comes between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import graphprune
from graphprune.graph import Graph
from graphprune.pipeline import LOSSLESS, Context, Pass, Pipeline
from graphprune.registry import backends
from graphprune.target import get

TARGET = "cpu"
Samples = Sequence[tuple[Tensor, ...]]


def unquantized(model: nn.Module, samples: Samples) -> bytes:
    """The float artifact: the lossless passes only."""
    return _lowered(_folded(model, samples))


def int8(model: nn.Module, samples: Samples, **options: Any) -> bytes:
    """Static quantization with these calibration samples, as an ONNX file."""
    from graphprune.passes.quantize import Quantize

    return _lowered(_with(Quantize(**options), model, samples))


def weights_only(model: nn.Module, samples: Samples, **options: Any) -> bytes:
    """Integers for weights alone."""
    from graphprune.passes.quantize_weights import QuantizeWeights

    return _lowered(_with(QuantizeWeights(**options), model, samples))


def _with(what: Pass, model: nn.Module, samples: Samples) -> Graph:
    done = what.run(_folded(model, samples), Context(target=get(TARGET), calibration=list(samples)))
    if not done.changed:
        raise ValueError("; ".join(note.message for note in done.notes if not note.where))
    return done.graph


def _folded(model: nn.Module, samples: Samples) -> Graph:
    return Pipeline.parse(LOSSLESS).run(graphprune.trace(model, samples[0])).graph


def _lowered(graph: Graph) -> bytes:
    lowered = backends.load("onnxruntime")().lower(graph, get(TARGET))
    (content,) = lowered.files.values()
    found: bytes = content
    return found
