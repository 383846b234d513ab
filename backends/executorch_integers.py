"""A quantized graph as XNNPACK's partitioner wants it written, with the same numbers.

XNNPACK computes in signed integers: what the graph rounds to ``0 … 255`` is written as ``-128 … 127`` with
the zero point 128 lower, which stands for the same real numbers. An operator runs in integers where its
operands and its result are quantized. One whose result stays in float gets its weight in float, which is
the same product; the audit names it. Tables of embeddings stay integers, and rows of them are dequantized.

>>> import graphprune
>>> class Rounded(torch.nn.Module):
...     def forward(self, x):
...         q = torch.ops.quantized_decomposed
...         small = q.quantize_per_tensor.default(x, 0.1, 130, 0, 255, torch.uint8)
...         return q.dequantize_per_tensor.default(small, 0.1, 130, 0, 255, torch.uint8)
>>> graph = graphprune.trace(Rounded(), torch.zeros(2))
>>> for_xnnpack(graph)
>>> next(node for node in graph.nodes if node.op == "call_function").args[1:]
(0.1, 2, -128, 127, torch.int8)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import fx

from graphprune.errors import BackendError
from graphprune.graph import Graph
from graphprune.graph_text import operator_name
from graphprune.kinds import kind
from graphprune.operands import CONVOLUTIONS, TRANSPOSED, argument

aten, qd = torch.ops.aten, torch.ops.quantized_decomposed

_QUANTIZE, _DEQUANTIZE = qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default
_BY_CHANNEL = qd.dequantize_per_channel.default
_DYNAMIC = qd.choose_qparams.tensor, qd.quantize_per_tensor.tensor, qd.dequantize_per_tensor.tensor
_WEIGHTED = CONVOLUTIONS | {aten.linear.default}
_FOREIGN = ("channel_group", "choose_qparams")
_MIDDLE = 128  # between the zero points of uint8 and of int8


def for_xnnpack(graph: Graph) -> None:
    """Rewrite in place; see the module docstring.

    Raises:
        BackendError: the graph has ONNX Runtime's recurrent integers or weights in blocks.
    """
    for node in list(graph.fx.nodes):
        foreign = getattr(node.target, "namespace", "aten") == "graphprune"
        if foreign or "channel_group" in operator_name(node):
            raise BackendError(
                f"{graph.where(node)}: ExecuTorch has no {operator_name(node)}, which is ONNX Runtime's "
                "(recurrent integers, weights in blocks); use backend='onnxruntime', or precision='int8'"
            )
    for node in list(graph.fx.nodes):
        if node.target in (_QUANTIZE, _DEQUANTIZE):
            _signed(graph, node)
        elif node.target in _DYNAMIC:
            _signed_dynamic(node)
    for node in list(graph.fx.nodes):
        if node.target is aten.mean.dim and kind(node) == "average-pool":
            _kept_dimensions(graph, node)
        elif kind(node) == "reshape":
            _one_open_size(graph, node)
        elif kind(node) == "pad":
            _rounded_again(graph, node)
    for node in [n for n in graph.fx.nodes if n.target in (_BY_CHANNEL, _DEQUANTIZE)]:
        if graph.constant(node.args[0]) is not None and not _in_integers(node):
            _as_float(graph, node)
    for node in [n for n in graph.fx.nodes if n.target in (_DEQUANTIZE, _DYNAMIC[2])]:
        for user in list(node.users)[1:]:
            with graph.fx.inserting_before(user):
                user.replace_input_with(node, _again(graph, node))
    graph.sweep()
    graph.propagate()


def asks_for_integers(node: fx.Node) -> bool:
    """Whether a product's operands are dequantized integers."""
    tensors = [n for n in node.args[:2] if isinstance(n, fx.Node)]
    return len(tensors) == 2 and all(_is_dequantized(n) for n in tensors)


def runs_in_integers(node: fx.Node) -> bool:
    """Whether XNNPACK computes this convolution or linear in integers: all around it is quantized.

    Where a linear's input is quantized as it comes, its result is in float.
    """
    if node.target not in _WEIGHTED - TRANSPOSED or not asks_for_integers(node):
        return False
    if node.args[0].target is _DYNAMIC[2]:  # type: ignore[union-attr]
        return node.target is aten.linear.default
    users = list(node.users)
    return len(users) == 1 and users[0].target is _QUANTIZE


def _is_dequantized(node: fx.Node) -> bool:
    return node.target in (_DEQUANTIZE, _BY_CHANNEL, _DYNAMIC[2])


def _in_integers(constant: fx.Node) -> bool:
    """Whether what reads a dequantized constant takes it as integers; a bias, XNNPACK rounds by itself."""
    if constant.target is _DEQUANTIZE:
        return all(u.target not in _WEIGHTED or runs_in_integers(u) for u in constant.users)
    if constant.args[2] is None:
        return False
    return all(runs_in_integers(user) and user.args[1] is constant for user in constant.users)


def _signed(graph: Graph, node: fx.Node) -> None:
    """``uint8`` as ``int8``, the constant behind it included."""
    if node.args[5] is not torch.uint8:
        return
    integers, scale, zero, low, high, _ = node.args
    known = graph.constant(integers) if node.target is _DEQUANTIZE else None
    if known is not None:
        shifted = (known.to(torch.int16) - _MIDDLE).to(torch.int8)
        integers = graph.add_tensor(f"{integers.target}.signed", shifted, before=node, trainable=False)  # type: ignore[union-attr]
    node.args = (integers, scale, zero - _MIDDLE, low - _MIDDLE, high - _MIDDLE, torch.int8)  # type: ignore[operator]


def _kept_dimensions(graph: Graph, node: fx.Node) -> None:
    """A mean over space that keeps its dimensions, flattened behind it: XNNPACK has no other."""
    if argument(node, "keepdim"):
        return
    quantizer = next(iter(node.users))
    steps: list[tuple[Any, tuple[Any, ...]]] = [(aten.mean.dim, (node.args[1], True))]
    if len(node.users) == 1 and quantizer.target is _QUANTIZE:
        steps += [(_QUANTIZE, quantizer.args[1:]), (_DEQUANTIZE, quantizer.args[1:])]
    shape = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    result = node.args[0]
    with graph.fx.inserting_before(node):
        for target, rest in (*steps, (aten.reshape.default, (shape,))):
            result = graph.fx.call_function(target, (result, *rest))
    node.replace_all_uses_with(result)  # type: ignore[arg-type]
    graph.fx.erase_node(node)


def _rounded_again(graph: Graph, node: fx.Node) -> None:
    """Integers behind padded integers: those there are, as zeros and they have the same scale."""
    source = node.args[0]
    reads_again = all(user.target is _QUANTIZE for user in node.users)
    if not isinstance(source, fx.Node) or source.target is not _DEQUANTIZE or reads_again:
        return
    with graph.fx.inserting_after(node):
        integers = graph.fx.call_function(_QUANTIZE, (node, *source.args[1:]))
    with graph.fx.inserting_after(integers):
        result = graph.fx.call_function(_DEQUANTIZE, (integers, *source.args[1:]))
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not integers)


def _signed_dynamic(node: fx.Node) -> None:
    """The same of a scale and zero point that are computed: both come 128 lower."""
    if node.args[-1] is torch.uint8:
        *given, _ = node.args
        place = 1 if node.target is _DYNAMIC[0] else 3
        given[place : place + 2] = [limit - _MIDDLE for limit in given[place : place + 2]]  # type: ignore[operator]
        node.args = (*given, torch.int8)


def _again(graph: Graph, node: fx.Node) -> fx.Node:
    """A dequantizer, and what computes its scale, once more: the partitioner parts who share one."""
    if node.target is _DEQUANTIZE:
        return graph.fx.call_function(_DEQUANTIZE, node.args)
    quantizer: Any = node.args[0]
    chosen = graph.fx.call_function(_DYNAMIC[0], quantizer.args[1].args[0].args)
    scale, zero = (graph.fx.call_function(operator.getitem, (chosen, i)) for i in (0, 1))
    small = graph.fx.call_function(_DYNAMIC[1], (quantizer.args[0], scale, zero, *quantizer.args[3:]))
    return graph.fx.call_function(_DYNAMIC[2], (small, scale, zero, *node.args[3:]))


def _one_open_size(graph: Graph, node: fx.Node) -> None:
    """A shape with one symbolic size, which XNNPACK works out by itself where it is left open."""
    shape = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    if shape.count(-1) != 1:
        return
    with graph.fx.inserting_before(node):
        open_ = graph.fx.call_function(aten.reshape.default, (node.args[0], shape))
    open_.meta = dict(node.meta)
    node.replace_all_uses_with(open_)
    graph.fx.erase_node(node)


def _as_float(graph: Graph, node: fx.Node) -> None:
    """A constant as the numbers it stands for; of a table only the rows that are read."""
    integers: Any = node.args[0]
    stored = graph.tensor(integers)
    scale, zero = _parameters(graph, node, stored.dim())
    tables = [u for u in node.users if u.target is aten.embedding.default and u.args[0] is node]
    for user in tables if scale.dim() and scale.shape[0] == stored.shape[0] else ():
        _rows(graph, user, integers, scale, zero)
    if node.users:
        numbers = (stored.to(torch.float32) - zero) * scale
        made = graph.add_tensor(f"{integers.target}.numbers", numbers, before=node, trainable=False)
        node.replace_all_uses_with(made)
    graph.fx.erase_node(node)


def _parameters(graph: Graph, node: fx.Node, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point, shaped so that they stand beside a tensor of that rank."""
    scale, zero = node.args[1], node.args[2]
    if node.target is _DEQUANTIZE:
        return torch.tensor(scale), torch.tensor(float(zero))  # type: ignore[arg-type]
    shape = [1] * rank
    shape[int(node.args[3])] = -1  # type: ignore[arg-type]
    scales = graph.tensor(scale).reshape(shape)  # type: ignore[arg-type]
    zeros = torch.zeros_like(scales) if zero is None else graph.tensor(zero).reshape(shape).to(scales.dtype)  # type: ignore[arg-type]
    return scales, zeros


def _rows(graph: Graph, user: fx.Node, integers: fx.Node, scale: torch.Tensor, zero: torch.Tensor) -> None:
    """``embedding(dequantize(table), ids)`` as rows of integers, dequantized."""
    name = str(integers.target)
    call = graph.fx.call_function
    scales = graph.add_tensor(f"{name}.row_scale", scale.reshape(-1, 1), before=user, trainable=False)
    with graph.fx.inserting_before(user):
        rows = call(aten.to.dtype, (call(aten.embedding.default, (integers, user.args[1])), torch.float32))
        if zero.any():
            zeros = graph.add_tensor(f"{name}.row_zero", zero.reshape(-1, 1), before=user, trainable=False)
            rows = call(aten.sub.Tensor, (rows, call(aten.embedding.default, (zeros, user.args[1]))))
        found = call(aten.mul.Tensor, (rows, call(aten.embedding.default, (scales, user.args[1]))))
    user.replace_all_uses_with(found)
    graph.fx.erase_node(user)
