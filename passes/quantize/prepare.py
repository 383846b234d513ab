"""Operators written out so that their parts run in integers; each rewrite computes what stood there before.

Attention becomes two products and a softmax (Vaswani et al., 2017, eq. 1). A hard swish becomes
``x * (clamp(x + 3, 0, 6) / 6)`` (Howard et al., *MobileNetV3*, 2019, section 5.2): the clamp is a quantizer's
own saturation and the division a scale, so an integer sum and an integer product are left of it. A SiLU is
``x * sigmoid(x)``. Only those that end up in integers are written out.

>>> import torch, graphprune
>>> graph = graphprune.trace(torch.nn.Hardswish(), torch.zeros(1, 2)).copy()
>>> written_out(graph, next(graph.find(torch.ops.aten.hardswish.default)))
>>> [node.name for node in graph.propagate().nodes if node.op == "call_function"]
['add_tensor', 'hardtanh_default', 'mul_tensor', 'mul_tensor_1']
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from graphprune.graph import Graph
from graphprune.kinds import kind
from graphprune.operands import argument

aten = torch.ops.aten


def written_out(graph: Graph, node: fx.Node) -> None:
    """Replace one operator by its parts; shapes are derived by the caller afterwards."""
    with graph.fx.inserting_before(node):
        result = _PARTS[kind(node)](graph, node)
    for part in _between(result, node):
        for key in ("stack_trace", "module", "module_type"):
            if key in node.meta:
                part.meta[key] = node.meta[key]
    node.replace_all_uses_with(result)
    graph.fx.erase_node(node)


def has_parts(node: fx.Node) -> bool:
    """Whether :func:`written_out` knows the operator."""
    return kind(node) in _PARTS


def attention_refusal(node: fx.Node) -> str:
    """Why an attention is not written out; empty where it is."""
    if argument(node, "is_causal") and not all(isinstance(s, int) for s in _scores(node)):
        return "its causal mask has a symbolic size"
    if argument(node, "dropout_p"):
        return "it drops out"
    if argument(node, "enable_gqa"):
        return "its queries share keys (enable_gqa)"
    return ""


def _between(result: fx.Node, end: fx.Node) -> Iterable[fx.Node]:
    """``result`` and the fresh operators it is made of."""
    fresh, stack = {result}, [result]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in fresh and "val" not in source.meta:
                fresh.add(source)
                stack.append(source)
    return fresh


def _scores(node: fx.Node) -> tuple[Any, Any]:
    query, key = (node.args[i].meta["val"].shape for i in (0, 1))  # type: ignore[union-attr]
    return query[-2], key[-2]


def _attention(graph: Graph, node: fx.Node) -> fx.Node:
    query, key, value = node.args[:3]
    call = graph.fx.call_function
    scale = argument(node, "scale")
    if scale is None:
        scale = 1 / math.sqrt(query.meta["val"].shape[-1])  # type: ignore[union-attr]
    scores = call(aten.matmul.default, (query, call(aten.transpose.int, (key, -2, -1))))
    scores = call(aten.mul.Tensor, (scores, float(scale)))
    mask = argument(node, "attn_mask")
    if argument(node, "is_causal"):
        ones = torch.ones(_scores(node), dtype=torch.bool).tril()
        mask = graph.add_tensor(f"{node.name}.causal_mask", ones, before=scores, trainable=False)
    if isinstance(mask, fx.Node):
        if mask.meta["val"].dtype == torch.bool:
            scores = call(
                aten.masked_fill.Scalar, (scores, call(aten.logical_not.default, (mask,)), -math.inf)
            )
        else:
            scores = call(aten.add.Tensor, (scores, mask))
    return call(aten.matmul.default, (call(aten.softmax.int, (scores, -1)), value))


def _hardsigmoid(graph: Graph, node: fx.Node) -> fx.Node:
    call = graph.fx.call_function
    shifted = call(aten.add.Tensor, (node.args[0], 3.0))
    return call(aten.mul.Tensor, (call(aten.hardtanh.default, (shifted, 0.0, 6.0)), 1 / 6))


def _hardswish(graph: Graph, node: fx.Node) -> fx.Node:
    return graph.fx.call_function(aten.mul.Tensor, (node.args[0], _hardsigmoid(graph, node)))


def _silu(graph: Graph, node: fx.Node) -> fx.Node:
    gate = graph.fx.call_function(aten.sigmoid.default, (node.args[0],))
    return graph.fx.call_function(aten.mul.Tensor, (node.args[0], gate))


_PARTS: dict[str, Callable[[Graph, fx.Node], fx.Node]] = {
    "attention": _attention,
    "hardsigmoid": _hardsigmoid,
    "hardswish": _hardswish,
    "silu": _silu,
}
