"""Weights that the graph dequantizes block by block, as ONNX Runtime's own operators on packed integers.

``linear(x, dequantize_per_channel_group(integers, …), b)`` becomes ``com.microsoft.MatMulNBits``, and
``embedding(dequantize_per_channel_group(integers, …), ids)`` becomes ``com.microsoft.GatherBlockQuantized``;
both read one constant where they share a weight. Both store ``b``-bit integers ``0 … 2^b - 1`` with 4 or
8 bits each, the first in the low half of a byte; without zero points the middle stands for zero. Fewer
than 4 bits are stored in 4. Linears compute in float32 (``accuracy_level`` 1), so that results are the
graph's.

What reads such a weight otherwise gets it unpacked, by arithmetic that the exporter may fold into a float
constant, and a note says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.graph import Graph

aten = torch.ops.aten

_DOMAIN = "com.microsoft"
_FLOAT32, _INT8 = 1, 4  # of accuracy_level


@dataclass(frozen=True, eq=False)
class _Packed:
    """One weight as the runtime stores it.

    Attributes:
        integers: uint8 ``[rows, blocks, bytes]``.
        scale: ``[rows, blocks]``.
        zero_point: uint8 ``[rows, bytes]``, or ``None``.
        bits: 4 or 8.
        size: columns of a block.
        columns: how many the weight has, without padding.
    """

    integers: fx.Node
    scale: fx.Node
    zero_point: fx.Node | None
    bits: int
    size: int
    columns: int


def packed(graph: Graph) -> tuple[str, ...]:
    """Rewrite block-wise weights in place; returns notes on those that are unpacked."""
    notes: list[str] = []
    name = "quantized_decomposed::dequantize_per_channel_group"
    for node in [n for n in graph.nodes if getattr(n.target, "_name", "") == name]:
        weights = [node, *(user for user in node.users if user.target is aten.slice.Tensor)]
        readers = [(weight, user) for weight in weights for user in weight.users if user not in weights]
        fitting = [(w, user) for w, user in readers if _is_read(user, w) and _is_constant(graph, node)]
        if fitting:
            stored = _pack(graph, node, _columns(fitting[0][0]))
            for _, user in fitting:
                _replace(graph, user, stored)
        others = [user for pair in readers if pair not in fitting for user in pair[1:]]
        if others:
            at = graph.place(others[0])
            notes.append(f"the weight that {at} reads is unpacked, only linears and embeddings read blocks")
            _unpack(graph, node)
    graph.sweep()
    return tuple(notes)


def _is_read(user: fx.Node, weight: fx.Node) -> bool:
    if user.target is aten.linear.default:
        return user.args[1] is weight and user.args[0] is not weight and len(_shape(user.args[0])) > 1
    return user.target is aten.embedding.default and user.args[0] is weight


def _is_constant(graph: Graph, node: fx.Node) -> bool:
    """Whether integers, scales and zero points are tensors, in blocks that the runtime knows."""
    integers, scale, zero = node.args[:3]
    known = graph.constant(integers) is not None and graph.constant(scale) is not None
    size: Any = node.args[6]
    return known and (zero is None or graph.constant(zero) is not None) and size in (16, 32, 64, 128, 256)


def _columns(weight: fx.Node) -> int:
    return _shape(weight)[-1]


def _shape(node: Any) -> Sequence[Any]:
    return node.meta["val"].shape


def _pack(graph: Graph, node: fx.Node, columns: int) -> _Packed:
    args: tuple[Any, ...] = node.args
    integers, zero = graph.tensor(args[0]), graph.constant(args[2])
    low, high, size = args[3], args[4], args[6]
    name = str(args[0].target)
    bits = 4 if high - low < 16 else 8
    shift = 2 ** (bits - 1) if zero is None else -min(low, 0)
    blocks = pack((integers.to(torch.int32) + shift).to(torch.uint8).unflatten(1, (-1, size)), bits)
    zeros = None
    if zero is not None:
        middles = pack((zero.to(torch.int32) + shift).to(torch.uint8), bits)
        zeros = graph.add_tensor(f"{name}_zeros", middles, before=node, trainable=False)
    stored = graph.add_tensor(f"{name}_packed", blocks, before=node, trainable=False)
    return _Packed(stored, args[1], zeros, bits, size, columns)


def pack(integers: Tensor, bits: int) -> Tensor:
    """Integers ``[…, n]`` of 4 or 8 bits, each row in as few bytes as hold it.

    >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist()
    [[33, 3]]
    """
    if bits == 8:
        return integers.contiguous()
    padded = torch.nn.functional.pad(integers, (0, integers.shape[-1] % 2))
    return padded[..., 0::2] | padded[..., 1::2] << 4


def _replace(graph: Graph, user: fx.Node, stored: _Packed) -> None:
    zeros = stored.zero_point
    common = (stored.integers, stored.scale, zeros)
    sizes = (stored.bits, stored.size, stored.columns)
    with graph.fx.inserting_before(user):
        if user.target is aten.linear.default:
            bias = user.args[2] if len(user.args) > 2 else None
            source, level = _unrounded(user.args[0], stored.size)
            fresh = graph.fx.call_function(_product, (source, *common, bias, *sizes, level))
        else:
            fresh = graph.fx.call_function(_rows, (user.args[1], *common, *sizes))
    fresh.meta.update(user.meta)
    user.replace_all_uses_with(fresh)
    graph.fx.erase_node(user)


def _unrounded(source: Any, size: int) -> tuple[Any, int]:
    """What a linear reads before the graph rounds it as the operator can by itself, and how it computes."""
    if getattr(source.target, "_name", "") == "graphprune::round_blocks" and source.args[1] == size:
        return source.args[0], _INT8
    return source, _FLOAT32


def _product(
    x: Tensor, integers: Tensor, scale: Tensor, zeros: Tensor | None, bias: Tensor | None,
    bits: int, size: int, columns: int, level: int,
) -> Tensor:  # fmt: skip
    rows = integers.shape[0]
    attributes: Any = {"K": columns, "N": rows, "bits": bits, "block_size": size, "accuracy_level": level}
    return torch.onnx.ops.symbolic(
        f"{_DOMAIN}::MatMulNBits", _trimmed(x, integers, scale, zeros, None, bias), attributes,
        dtype=x.dtype, shape=[*x.shape[:-1], rows], version=1,
    )  # fmt: skip


def _rows(
    ids: Tensor, integers: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, size: int, columns: int
) -> Tensor:
    attributes: Any = {"gather_axis": 0, "quantize_axis": 1, "block_size": size, "bits": bits}
    width = scale.shape[1] * size
    found = torch.onnx.ops.symbolic(
        f"{_DOMAIN}::GatherBlockQuantized", _trimmed(integers.flatten(1), ids, scale, zeros), attributes,
        dtype=scale.dtype, shape=[*ids.shape, width], version=1,
    )  # fmt: skip
    return found if width == columns else found[..., :columns]


def _trimmed(*inputs: Tensor | None) -> list[Tensor | None]:
    """Without the absent ones at the end."""
    count = max(i + 1 for i, value in enumerate(inputs) if value is not None)
    return list(inputs[:count])


def _unpack(graph: Graph, node: fx.Node) -> None:
    """``scale * (integers - zero_point)`` in plain operators, for what is left of the readers."""
    integers, scale, zero = node.args[:3]
    size = node.args[6]
    with graph.fx.inserting_before(node):
        value = graph.fx.call_function(aten.to.dtype, (integers, torch.float32))
        value = graph.fx.call_function(aten.unflatten.int, (value, 1, (-1, size)))
        if zero is not None:
            middle = graph.fx.call_function(aten.to.dtype, (zero, torch.float32))
            middle = graph.fx.call_function(aten.unsqueeze.default, (middle, 2))
            value = graph.fx.call_function(aten.sub.Tensor, (value, middle))
        factor = graph.fx.call_function(aten.unsqueeze.default, (scale, 2))
        value = graph.fx.call_function(aten.mul.Tensor, (value, factor))
        value = graph.fx.call_function(aten.flatten.using_ints, (value, 1, 2))
    node.replace_all_uses_with(value)
