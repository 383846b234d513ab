"""Inputs that the graph rounds at run time, as the operators that ONNX Runtime fuses.

``choose_qparams`` and the quantizer behind it are one ``DynamicQuantizeLinear``. A linear between what
that gives and a dequantized constant is ``MatMulInteger``, whose sums are scaled: ONNX Runtime makes
``DynamicQuantizeMatMul`` of it all, or ``MatMulIntegerToFloat`` where several linears read the same
integers. Anything else that reads them gets them through ``DequantizeLinear``.

``graphprune::dynamic_lstm`` is a ``com.microsoft.DynamicQuantizeLSTM`` for every layer. ONNX has the
gates in the order input, output, forget, cell.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.graph import Graph

aten = torch.ops.aten

_QUANTIZED = "quantized_decomposed::"
_GATES = (0, 3, 1, 2)  # where torch has what ONNX wants: input, output, forget, cell


def dynamic(graph: Graph) -> None:
    """Rewrite, in place, what is rounded at run time."""
    turned: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if _is(node, "choose_qparams") and node.args[1:3] == (0, 255) and node.args[4] is torch.uint8:
            _round(graph, node, turned)
    for node in graph.nodes:
        if getattr(node.target, "_name", "") == "graphprune::dynamic_lstm":
            _lstm(graph, node)
    graph.sweep()


def _is(node: Any, name: str) -> bool:
    return getattr(getattr(node, "target", None), "_name", "").startswith(f"{_QUANTIZED}{name}")


def _round(graph: Graph, chosen: fx.Node, turned: dict[str, fx.Node]) -> None:
    source, how = chosen.args[0], {user.args[1]: user for user in chosen.users}
    if set(how) != {0, 1}:
        return
    scale, zero = how[0], how[1]
    quantizers = [user for user in scale.users if _is(user, "quantize_per_tensor")]
    rounded = [node for node in quantizers if node.args[:3] == (source, scale, zero)]
    back = [n for q in rounded for n in q.users if _is(n, "dequantize_per_tensor")]
    known = {*rounded, *back}
    if not rounded or any(user not in known for node in (scale, zero, *rounded) for user in node.users):
        return
    with graph.fx.inserting_before(chosen):
        made = graph.fx.call_function(_quantize, (source,))
        parts = tuple(graph.fx.call_function(operator.getitem, (made, i)) for i in range(3))
    for node in back:
        for user in list(node.users):
            if _multiplies(graph, user, node):
                _product(graph, user, parts, turned)
        if node.users:
            with graph.fx.inserting_before(node):
                other = graph.fx.call_function(_dequantize, parts)
            node.replace_all_uses_with(other)


def _multiplies(graph: Graph, user: fx.Node, rounded: fx.Node) -> bool:
    if user.target is not aten.linear.default or user.args[0] is not rounded:
        return False
    weight: Any = user.args[1]
    if not _is(weight, "dequantize_per_channel") or weight.args[3] != 0:
        return False
    zero = graph.constant(weight.args[2])
    symmetric = weight.args[2] is None or (zero is not None and not bool(zero.count_nonzero()))
    integers = graph.constant(weight.args[0])
    return symmetric and integers is not None and integers.dtype is torch.int8 and integers.dim() == 2


def _product(graph: Graph, user: fx.Node, parts: Sequence[fx.Node], turned: dict[str, fx.Node]) -> None:
    weight: Any = user.args[1]
    table, scale = weight.args[:2]
    bias = user.args[2] if len(user.args) > 2 else None
    matrix = _turned(graph, table, turned)
    with graph.fx.inserting_before(user):
        if matrix is None:  # the runtime turns what others read as it is, once, when it opens the file
            matrix = graph.fx.call_function(aten.t.default, (table,))
        fresh = graph.fx.call_function(_multiply, (*parts, matrix, scale, bias))
    fresh.meta.update(user.meta)
    user.replace_all_uses_with(fresh)
    graph.fx.erase_node(user)


def _turned(graph: Graph, table: fx.Node, turned: dict[str, fx.Node]) -> fx.Node | None:
    """The table ``[inputs, outputs]``, one constant for all linears; ``None`` where others read it."""
    name = str(table.target)
    if not all(_is(reader, "dequantize_per_channel") for reader in graph.readers(name)):
        return None
    if name not in turned:
        value, first = graph.tensor(table).T.contiguous(), next(iter(graph.fx.nodes))
        turned[name] = graph.add_tensor(f"{name}_turned", value, before=first, trainable=False)
    return turned[name]


def _quantize(x: Tensor) -> Sequence[Tensor]:
    return torch.onnx.ops.symbolic_multi_out(
        "DynamicQuantizeLinear", [x],
        dtypes=[torch.uint8, torch.float32, torch.uint8], shapes=[list(x.shape), [], []],
    )  # fmt: skip


def _dequantize(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", [x, scale, zero], dtype=torch.float32, shape=list(x.shape)
    )


def _multiply(
    x: Tensor, scale: Tensor, zero: Tensor, matrix: Tensor, factors: Tensor, bias: Tensor | None
) -> Tensor:
    shape = [*x.shape[:-1], matrix.shape[1]]
    sums = torch.onnx.ops.symbolic("MatMulInteger", [x, matrix, zero], dtype=torch.int32, shape=shape)
    result = sums.to(torch.float32) * (scale * factors)
    return result if bias is None else result + bias


def _lstm(graph: Graph, node: fx.Node) -> None:
    """Constants as ONNX wants them, a pair of matrices for each layer, and one operator for all of them."""
    args: tuple[Any, ...] = node.args
    x, hidden, cell, *lists = args[:6]
    weights, scales, biases = ([graph.tensor(n) for n in nodes] for nodes in lists)
    both, batch_first = args[6:8]
    directions, name = 1 + bool(both), str(args[3][0].target)
    layers = []
    for layer in range(len(weights) // (2 * directions)):
        at = range(layer * directions, (layer + 1) * directions)
        values = []
        for part in (0, 1):
            values.append(torch.stack([_gates(weights[2 * i + part]).T for i in at]).contiguous())
            values.append(torch.stack([_gates(scales[2 * i + part]) for i in at]))
            values.append(torch.zeros_like(values[-1], dtype=torch.int8))
        if biases:
            values.append(torch.stack([torch.cat([b := _gates(biases[i]), b.new_zeros(len(b))]) for i in at]))
        layers.append([
            graph.add_tensor(f"{name}_layer{layer}", value, before=node, trainable=False) for value in values
        ])  # fmt: skip
    with graph.fx.inserting_before(node):
        fresh = graph.fx.call_function(_recur, (x, hidden, cell, layers, directions, batch_first))
    node.replace_all_uses_with(fresh)
    graph.fx.erase_node(node)


def _gates(value: Tensor) -> Tensor:
    """``[4 · units, …]`` in ONNX's order of gates."""
    return value.unflatten(0, (4, -1))[list(_GATES)].flatten(0, 1)


def _recur(
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
    layers: Sequence[Sequence[Tensor]],
    directions: int,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    value = x.transpose(0, 1) if batch_first else x
    last = []
    units, kind = hidden.shape[-1], "bidirectional" if directions == 2 else "forward"
    for layer, (w, ws, wz, r, rs, rz, *bias) in enumerate(layers):
        own = slice(layer * directions, (layer + 1) * directions)
        states = [hidden[own], cell[own]]
        steps, batch = value.shape[:2]
        results = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::DynamicQuantizeLSTM",
            [value, w, r, bias[0] if bias else None, None, *states, None, ws, wz, rs, rz],
            {"hidden_size": units, "direction": kind},
            dtypes=[torch.float32] * 3,
            shapes=[[steps, directions, batch, units], *[[directions, batch, units]] * 2],
            version=1,
        )
        value = results[0].transpose(1, 2).flatten(2)
        last.append(results[1:])
    value = value.transpose(0, 1) if batch_first else value
    return value, torch.cat([h for h, _ in last]), torch.cat([c for _, c in last])
