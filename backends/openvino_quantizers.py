"""Quantizers that round what is rounded already, taken out before OpenVINO sees them.

ONNX Runtime wants every operator between quantizers, those that only move numbers included::

    dequantize(q) -> reshape -> quantize(same scale) -> dequantize

A number that was rounded rounds to itself, so what stands behind the reshape is the identity. ONNX Runtime
merges it into an integer reshape; OpenVINO finds such reshapes by itself, and each quantizer that is left
costs it a pass over the tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphprune.graph import Graph

aten = torch.ops.aten

_PER_TENSOR = "quantized_decomposed::{}quantize_per_tensor"

# Each number of the result is one of the first argument's.
_MOVES = {
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.transpose.int, aten.permute.default, aten.t.default, aten.select.int, aten.slice.Tensor,
    aten.expand.default, aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.max_pool2d.default,
}  # fmt: skip


def rounded_once(graph: Graph) -> Graph:
    """A copy without quantizers whose input another one has rounded to the same scale."""
    graph = graph.copy()
    for node in graph.nodes:
        if not _is(node, "de") or not _is(node.args[0], ""):
            continue
        quantizer: Any = node.args[0]
        if quantizer.args[1:] == node.args[1:] == _scale_of(quantizer.args[0]):
            node.replace_all_uses_with(quantizer.args[0])
    graph.sweep()
    return graph


def _is(node: Any, which: str) -> bool:
    name: str = getattr(getattr(node, "target", None), "_name", "")
    return isinstance(node, fx.Node) and name.startswith(_PER_TENSOR.format(which)) and not node.kwargs


def _scale_of(value: Any) -> tuple[Any, ...] | None:
    """Scale, zero point, range and dtype that every number of ``value`` is rounded to, where one is known."""
    while isinstance(value, fx.Node) and value.target in _MOVES:
        value = value.args[0]
    return tuple(value.args[1:]) if _is(value, "de") else None
