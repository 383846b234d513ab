"""Which precision a graph computes in under ONNX Runtime.

Its CPU provider has hardly a bfloat16 kernel. On CPU targets a bfloat16 graph therefore keeps bfloat16
weights, inputs and outputs, and computes in float32 between: ``y = bf16(f(f32(x), f32(w)))``. float16 needs
no such care: the runtime inserts its own casts where it has no kernel (aarch64 and CUDA have them). float64
stays float64, and an operator without a kernel for it is an error when the file is opened.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from graphprune.errors import BackendError
from graphprune.graph import Graph
from graphprune.target import Target

aten = torch.ops.aten

_LOW, _WIDE = torch.bfloat16, torch.float32


def computable(graph: Graph, target: Target) -> tuple[Graph, tuple[str, ...]]:
    """The graph in a precision the target's provider computes in, and what to say about it.

    Raises:
        BackendError: a tensor is complex.
    """
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype.is_complex:
            raise BackendError(f"{graph.where(node)} is complex, and ONNX has no complex numbers")
    if target.arch == "cuda" or not any(_is_low(n.meta.get("val")) for n in graph.nodes):
        return graph, ()
    note = (
        "CPUs have hardly a bfloat16 kernel: weights, inputs and outputs stay bfloat16, "
        "operators compute in float32 between"
    )
    return _widened(graph), (note,)


def _is_low(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == _LOW


def _widened(graph: Graph) -> Graph:
    """A copy that casts bfloat16 inputs and weights to float32 and its results back."""
    graph = graph.copy()
    originals = list(graph.output.args[0])  # type: ignore[arg-type]
    low = {node for node in graph.fx.nodes if _is_low(node.meta.get("val"))}
    after_inputs = graph.placeholders[-1] if graph.placeholders else None
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr") and node in low:
            with graph.fx.inserting_after(after_inputs if node.op == "placeholder" else node):
                wide = graph.fx.call_function(aten.to.dtype, (node, _WIDE))
            node.replace_all_uses_with(wide, delete_user_cb=lambda user, wide=wide: user is not wide)  # type: ignore[misc]
        elif node.op == "call_function":
            node.args = map_aggregate(node.args, _wide)
            node.kwargs = map_aggregate(node.kwargs, _wide)
    results = list(graph.output.args[0])  # type: ignore[arg-type]
    for index, original in enumerate(originals):
        if isinstance(original, fx.Node) and original in low:
            if original.op == "call_function":
                with graph.fx.inserting_before(graph.output):
                    results[index] = graph.fx.call_function(aten.to.dtype, (results[index], _LOW))
            else:
                results[index] = original
    graph.output.args = (tuple(results),)
    return graph.propagate()


def _wide(argument: Any) -> Any:
    return _WIDE if argument is _LOW else argument
