"""What a graph costs: multiply-accumulates, parameters and bytes, per node and in total.

MACs are counted for convolutions, linears, matrix products, attention and recurrent layers, at the
sizes the graph was captured with (a symbolic batch counts as the batch of the examples). Of a decision
(``torch.cond``) the branch that costs most counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from .graph import Graph

aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """Totals of a graph: operator nodes, parameters, bytes of all tensors, MACs of one call."""

    nodes: int
    parameters: int
    bytes: int
    macs: int


def cost(graph: Graph) -> Cost:
    """The totals of ``graph``. Shared tensors count once; buffers count as bytes, not as parameters.

    A weight that became integers is a parameter still, and counts a byte a number, however it is packed.
    """
    return Cost(
        nodes=sum(n.op == "call_function" for n in graph.fx.nodes),
        parameters=sum(p.numel() for p in graph.tensors.values() if _is_parameter(p)),
        bytes=sum(t.numel() * t.element_size() for t in graph.tensors.values()),
        macs=_macs(graph.fx, graph.bodies.__getitem__),
    )


def _macs(graph: fx.Graph, body: Callable[[str], Any]) -> int:
    """Multiply-accumulates; of every ``torch.cond`` those of the branch that costs most.

    ``body`` gives a branch by its name.
    """
    total = sum(node_macs(node) for node in graph.nodes)
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond):
        sides = [body(str(argument.target)) for argument in node.args[1:3]]
        total += max(_macs(side.graph, partial(getattr, side)) for side in sides)
    return total


def _is_parameter(tensor: torch.Tensor) -> bool:
    integers = tensor.dtype in (torch.int8, torch.uint8) and tensor.dim() > 1
    return isinstance(tensor, torch.nn.Parameter) or integers


Shape = Callable[[Any], tuple[int, ...]]
"""Operand or node → its concrete shape."""


def node_macs(node: fx.Node, shape: Shape | None = None) -> int:
    """Multiply-accumulates of one operator; 0 for operators that multiply no matrices.

    Args:
        node: the operator.
        shape: how to read shapes; by default as captured. With sizes taken from a plan this gives the
            cost of the operator after it.
    """
    if node.op != "call_function":
        return 0
    rule = _RULES.get(node.target) or _NAMED.get(getattr(node.target, "_name", ""))
    return rule(node, shape or captured_shape) if rule is not None else 0


def captured_shape(argument: Any) -> tuple[int, ...]:
    """The shape of a node's value as captured; symbolic sizes at the value they had then."""
    return tuple([size_hint(s) for s in argument.meta["val"].shape])


def size_hint(size: Any) -> int:
    """A size as a number: a symbolic one at the value it had at capture."""
    if isinstance(size, int):
        return size
    node = size.node
    return int(node.hint) if node.hint is not None else int(node.shape_env.size_hint(node.expr))


def _convolution(node: fx.Node, shape: Shape) -> int:
    return math.prod(shape(node)) * math.prod(shape(node.args[1])[1:])


def _transposed_convolution(node: fx.Node, shape: Shape) -> int:
    # Every input position is multiplied with a [out/groups, *kernel] block of the weight.
    return math.prod(shape(node.args[0])) * math.prod(shape(node.args[1])[1:])


def _linear(node: fx.Node, shape: Shape) -> int:
    return math.prod(shape(node)) * shape(node.args[1])[-1]


def _product(left: int) -> Callable[[fx.Node, Shape], int]:
    return lambda node, shape: math.prod(shape(node)) * shape(node.args[left])[-1]


def _attention(node: fx.Node, shape: Shape) -> int:
    query, key, value = (shape(a) for a in node.args[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(node: fx.Node, shape: Shape) -> int:
    operands: Any = node.args[1]
    sizes: dict[str, int] = {}
    for labels, operand in zip(str(node.args[0]).split("->")[0].split(","), operands, strict=True):
        before, dots, after = labels.replace(" ", "").partition("...")
        dims = shape(operand)
        sizes.update(zip(before, dims, strict=False))
        sizes.update(zip(after, dims[len(dims) - len(after) :], strict=True))
        if dots:
            spread = math.prod(dims[len(before) : len(dims) - len(after)])
            sizes["..."] = max(sizes.get("...", 1), spread)
    return math.prod(sizes.values()) if len(operands) > 1 else 0


def _recurrent(node: fx.Node, shape: Shape) -> int:
    source, _, weights = node.args[:3]
    steps = math.prod(shape(source)[:-1])
    return steps * sum(math.prod(dims) for dims in map(shape, weights) if len(dims) == 2)  # type: ignore[arg-type,misc]


def _integer_recurrent(node: fx.Node, shape: Shape) -> int:
    weights: Any = node.args[3]
    return math.prod(shape(node.args[0])[:-1]) * sum(map(math.prod, map(shape, weights)))


_RULES: dict[Any, Callable[[fx.Node, Shape], int]] = {
    **dict.fromkeys(
        (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
         aten.conv2d.padding, aten.conv3d.padding, aten.convolution.default), _convolution),
    **dict.fromkeys(
        (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
        _transposed_convolution),
    aten.linear.default: _linear,
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten.matmul.default, aten.mv.default), _product(0)),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default), _product(1)),
    aten.scaled_dot_product_attention.default: _attention,
    aten.einsum.default: _einsum,
    **dict.fromkeys((aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input), _recurrent),
}  # fmt: skip
_NAMED = {"transformers::grouped_mm_fallback": _product(0), "graphprune::dynamic_lstm": _integer_recurrent}
