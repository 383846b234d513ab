"""Our side of the comparison: `optimize` as anyone would call it, proofs included, by its defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import graphprune
from graphprune.pipeline import LOSSLESS

Samples = Sequence[tuple[Tensor, ...]]


def unquantized(model: nn.Module, samples: Samples) -> bytes:
    """The float artifact: the lossless passes only."""
    return _file(model, samples)


def int8(model: nn.Module, samples: Samples, precision: str = "int8") -> bytes:
    """A precision by its name, with these calibration samples, as an ONNX file."""
    return _file(model, samples, precision=precision)


def by_pass(model: nn.Module, samples: Samples, step: str) -> bytes:
    """One more pass behind the lossless ones, as text."""
    return _file(model, samples, pipeline=f"{LOSSLESS},{step}")


def _file(model: nn.Module, samples: Samples, **options: Any) -> bytes:
    """Of one `optimize` call, without the manifest and the report beside it."""
    calibration = list(samples) if options else None
    result = graphprune.optimize(
        model, samples[0], target="cpu", calibration=calibration, measure=False, threads=1, **options
    )
    return content(result)


def content(result: graphprune.Result) -> bytes:
    """The one file that the runtime is given."""
    (found,) = result.deployment.lowered.files.values()
    return found
