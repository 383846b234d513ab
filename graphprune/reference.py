"""What an artifact should answer: its example call and its graph's answers, stored beside the artifact.

With it a directory can be verified alone, on a machine that has neither the model nor its source code. Beside
the graph's own outputs stand the *truth*, which tells rounding from mistakes as :mod:`.rounding` does: the
network without rounding for a quantized graph, the graph in float64 for another.

>>> import graphprune
>>> graph = graphprune.trace(torch.nn.Linear(3, 2), torch.ones(1, 3))
>>> content, reason = make(graph)
>>> stored = read(content, ("tensor",))
>>> [tuple(x.shape) for x in (*stored.inputs, *stored.outputs)], stored.kind
([(1, 3), (1, 2)], 'float64')
>>> print(judge(stored, graph.run()))
exact, relative error 0.0e+00
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .backend import TensorSpec
from .errors import ArtifactError
from .graph import Graph
from .rounding import judged_by_steps, judged_in_float64, widened
from .verify import Certificate, compare, in_float64

REFERENCE = "reference.safetensors"
LIMIT = 16 << 20
"""Bytes of inputs and outputs that are stored at most."""
WIDE = 1 << 30
"""Bytes of weights up to which a graph is run in float64."""


@dataclass(frozen=True)
class Reference:
    """One call and its answers.

    Attributes:
        inputs: flat.
        outputs: the graph's flat outputs, constants among them.
        truth: the same in the arithmetic of ``kind``; empty where there is none.
        kind: ``float`` (without a quantized graph's rounding), ``float64``, or empty.
    """

    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[Any, ...]
    truth: tuple[Any, ...] = ()
    kind: str = ""


def make(graph: Graph) -> tuple[bytes | None, str]:
    """The reference of a graph as a file's bytes, or ``None`` and why there is none."""
    from safetensors.torch import save

    if graph.is_meta:
        return None, "the graph has no weights"
    inputs, outputs = graph.examples, graph.run()
    count = sum(v.nbytes for v in (*inputs, *outputs) if isinstance(v, torch.Tensor))
    if count > LIMIT:
        return None, f"the example call and its result take {count:,} bytes, stored are at most {LIMIT:,}"
    truth, kind = _truth(graph)
    named = {
        f"{part}.{index}": torch.as_tensor(value).detach().cpu().contiguous().clone()
        for part, values in (("input", inputs), ("output", outputs), ("truth", truth))
        for index, value in enumerate(values)
        if isinstance(value, (torch.Tensor, int)) and not isinstance(value, bool)
    }
    return save(named, {"truth": kind}), ""


def _truth(graph: Graph) -> tuple[tuple[Any, ...], str]:
    if graph.floating is not None:
        return graph.floating.run(*graph.examples), "float"
    tensors = [t for t in graph.tensors.values() if t.is_floating_point()]
    wide = any(t.dtype is torch.float64 for t in (*tensors, *graph.examples))
    if wide or sum(t.nbytes for t in tensors) > WIDE:
        return (), ""
    try:
        return in_float64(graph).run(*widened(graph.examples)), "float64"
    except (RuntimeError, TypeError):  # an operator without float64; the tolerance then stands as it is
        return (), ""


def read(content: bytes, outputs: Sequence[Any]) -> Reference:
    """The inverse of :func:`make`.

    Args:
        content: the file.
        outputs: the artifact's outputs: a value that is neither a tensor's specification nor its stand-in
            is a constant, and stands as it is.

    Raises:
        ArtifactError: it does not read as that.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
        kind = _metadata(content).get("truth", "")
    except (SafetensorError, ValueError) as error:
        raise ArtifactError(f"{REFERENCE} does not read: {error}; build the artifact again") from error
    inputs = tuple(tensors[f"input.{i}"] for i in range(sum(name.startswith("input.") for name in tensors)))

    def flat(part: str) -> tuple[Any, ...]:
        return tuple(_value(tensors.get(f"{part}.{i}"), spec) for i, spec in enumerate(outputs))

    try:
        return Reference(inputs, flat("output"), flat("truth") if kind else (), kind)
    except KeyError as error:
        raise ArtifactError(f"{REFERENCE} lacks {error}; build the artifact again") from error


def _value(stored: torch.Tensor | None, spec: Any) -> Any:
    if stored is None:
        if isinstance(spec, TensorSpec):
            raise KeyError(spec.name)
        return spec
    return int(stored) if isinstance(spec, TensorSpec) and spec.dtype == "int" else stored


def _metadata(content: bytes) -> dict[str, str]:
    """The free texts in a safetensors file's header, which begins with its length in eight bytes."""
    import json

    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    return dict(header.get("__metadata__", {}))


def judge(reference: Reference, outputs: Sequence[Any]) -> Certificate:
    """Certificate 3 over what is stored: flat outputs for ``reference.inputs`` against the graph's."""
    certificate = compare("runtime", [outputs], [reference.outputs])
    missed = not certificate.passed and certificate.max_relative > certificate.tolerance
    if not missed or not reference.kind:
        return certificate
    judged = judged_by_steps if reference.kind == "float" else judged_in_float64
    return judged(certificate, outputs, reference.outputs, reference.truth)
