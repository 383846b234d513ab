"""Operators that sum over channels: what of a channel reaches which result, and with what weight.

A :class:`Contraction` is a convolution, a linear layer or a product with a known matrix, seen as

    y[…, g, o] = sum over i and taps of W[g, o, i, tap] x[…, g, i] + b[g, o]

with groups ``g``, which is all that bounds and dead channels depend on. A constant input channel ``c`` adds
``c · sum over taps of W`` to each result, unless the kernel reaches into zero padding (or a transposed
convolution overlaps unevenly): there fewer taps meet it.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from graphprune.passes.clean_up import is_pure
from graphprune.passes.commute import describe
from torch import fx

from graphprune.graph import Graph
from graphprune.operands import CONVOLUTIONS, PRODUCTS, TRANSPOSED, argument, has_argument, uses

from .intervals import Interval

aten = torch.ops.aten

_CONVOLUTIONS = CONVOLUTIONS - {aten.convolution.default}
_FACTORIES = frozenset({
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.full.default, aten.ones.default,
    aten.zeros.default, aten.scalar_tensor.default,
})  # fmt: skip
CONTRACTIONS = _CONVOLUTIONS | PRODUCTS | {aten.linear.default}


class Weights:
    """The tensors of a graph by node, on the CPU; those that operators compute from parameters, too."""

    def __init__(self, graph: Graph):
        self._graph = graph
        self._known: dict[fx.Node, Any] = {}

    def of(self, node: Any) -> torch.Tensor | None:
        """The value, or ``None`` where it depends on an input (or is no tensor)."""
        value = self._any(node) if isinstance(node, fx.Node) else None
        return value if isinstance(value, torch.Tensor) else None

    def _any(self, node: fx.Node) -> Any:
        """As :meth:`of`, with the several results of a split, too."""
        if node not in self._known:
            self._known[node] = self._value(node)
        return self._known[node]

    def _value(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            value = self._graph.constant(node)
            return None if value is None else value.detach().cpu()
        sources = node.all_input_nodes
        if node.op != "call_function" or not (is_pure(node) or node.target is operator.getitem):
            return None
        if any(self._any(source) is None for source in sources) or not (sources or node.target in _FACTORIES):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._any)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]


@dataclass(frozen=True)
class Contraction:
    """See the module docstring.

    Attributes:
        node: the operator.
        source: what it reads.
        weight: the node of its weight.
        matrix: ``[g, out/g, in/g, taps]``, a view of the weight.
        channel: the channels' dimension in ``source`` and in the result, counted from the end.
        uneven: why a constant does not reach every result alike, else empty.
        fixed_bias: why its bias cannot take a constant, else empty.
    """

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    matrix: torch.Tensor
    channel: int
    uneven: str
    fixed_bias: str

    @property
    def refusal(self) -> str:
        """Why a constant other than 0 cannot go into the bias, else empty."""
        return self.uneven or self.fixed_bias

    @cached_property
    def reads(self) -> torch.Tensor | None:
        """Boolean ``[g, out/g, in/g]``: which results a channel goes into; ``None`` for all into all."""
        read = (self.matrix != 0).any(-1)
        return None if bool(read.all()) else read

    def counting(self, results: torch.Tensor) -> torch.Tensor:
        """Which channels ``[…, g, in/g]`` go into one of the results ``[…, g, out/g]`` that are marked."""
        if self.reads is None:
            counts = results.any(-1, keepdim=True)
            return counts.expand((*counts.shape[:-1], self.matrix.shape[2]))
        return torch.einsum("...go,goi->...gi", results.float(), self.reads.float()) > 0

    def inputs(self, value: torch.Tensor) -> torch.Tensor:
        """Something said of the source's channels as ``[…, g, in/g]``."""
        return self._grouped(value, self.matrix.shape[2])

    def outputs(self, value: torch.Tensor) -> torch.Tensor:
        """Something said of the result's channels as ``[…, g, out/g]``."""
        return self._grouped(value, self.matrix.shape[1])

    def _grouped(self, value: torch.Tensor, within: int) -> torch.Tensor:
        groups = self.matrix.shape[0]
        value = value.movedim(self.channel, -1)
        return value.expand((*value.shape[:-1], groups * within)).unflatten(-1, (groups, within))

    def back(self, value: torch.Tensor) -> torch.Tensor:
        """``[…, g, channels]`` as a value with its channels where they belong."""
        return value.flatten(-2).movedim(-1, self.channel)

    def bounds(self, x: Interval, bias: Interval | None) -> Interval:
        """Bounds of the result from those of the source (channels as ``self.channel`` has them)."""
        if self.uneven:  # some taps meet nothing, which reads as 0
            x = x.with_number(0.0)
        weight = self.matrix.detach().cpu()
        weight = weight if weight.element_size() >= 4 else weight.float()
        up, down = weight.clamp(min=0).sum(-1), weight.clamp(max=0).sum(-1)
        lo, hi = self.inputs(x.lo), self.inputs(x.hi)
        result = Interval(
            self.back(_lower(up, lo) + _lower(down, hi)), self.back(-_lower(up, -hi) - _lower(down, -lo))
        )
        return result if bias is None else result + bias

    def share(self, channels: torch.Tensor) -> torch.Tensor:
        """``[out]`` float64: what constant channels ``[in]`` add to every result."""
        weight = self.matrix.detach().to("cpu", torch.float64).sum(-1)
        constants = channels.view(weight.shape[0], -1)
        return torch.einsum("goi,gi->go", weight, constants).flatten()


def _lower(weight: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """``sum over i of weight · bound``, ``[…, g, out/g]``; minus infinity where an unbounded one counts.

    ``weight`` has one sign, and ``bound`` is the end that makes the sum smallest.
    """
    known = bound.isfinite()
    total = _times(weight, torch.where(known, bound, 0.0).to(weight.dtype)).double()
    if bool(known.all()):
        return total
    if bool(known.any()):
        unbounded = _times((weight != 0).to(weight.dtype), (~known).to(weight.dtype)) > 0
    else:
        unbounded = (weight != 0).any(-1)
    return torch.where(unbounded, -math.inf, total)


def _times(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``[g, o, i]`` times ``[…, g, i]`` is ``[…, g, o]``."""
    return (weight @ value.unsqueeze(-1)).squeeze(-1)


def contraction(graph: Graph, weights: Weights, node: fx.Node) -> Contraction | None:
    """The operator as a contraction over channels, or ``None`` where it is none or its weight not known."""
    if node.target not in CONTRACTIONS:
        return None
    if node.target in _CONVOLUTIONS:
        return _convolution(graph, weights, node)
    if node.target is aten.linear.default:
        weight = weights.of(node.args[1])
        if weight is None or weight.dim() != 2:
            return None
        return _make(graph, node, node.args[0], node.args[1], weight[None, :, :, None], -1, "")
    source, right = node.args[1:3] if node.target is aten.addmm.default else node.args[:2]
    weight = weights.of(right)
    if weight is None or weight.dim() != 2 or source.meta["val"].dim() < 2:  # type: ignore[union-attr]
        return None
    return _make(graph, node, source, right, weight.mT[None, :, :, None], -1, "")


def _convolution(graph: Graph, weights: Weights, node: fx.Node) -> Contraction | None:
    weight = weights.of(node.args[1])
    if weight is None:
        return None
    groups: int = argument(node, "groups")
    kernel = weight.dim() - 2
    blocks = weight.flatten(2).unflatten(0, (groups, -1))  # [g, out/g, in/g, taps] or [g, in/g, out/g, taps]
    padding = argument(node, "padding")
    pointwise = math.prod(weight.shape[2:]) == 1
    if node.target in TRANSPOSED:
        blocks = blocks.transpose(1, 2)
        even = pointwise and all(s == 1 for s in argument(node, "stride"))
        even = even and not any(padding) and not any(argument(node, "output_padding"))
        uneven = (
            "" if even else f"{describe(node)} adds up fewer of its taps at the borders than in the middle"
        )
    else:
        padded = not pointwise if padding == "same" else padding != "valid" and any(padding)
        uneven = f"{describe(node)} pads with zeros, which the constant is not" if padded else ""
    return _make(graph, node, node.args[0], node.args[1], blocks, -1 - kernel, uneven)


def _make(
    graph: Graph, node: fx.Node, source: Any, weight: Any, matrix: torch.Tensor, channel: int, uneven: str
) -> Contraction:
    return Contraction(node, source, weight, matrix, channel, uneven, _fixed_bias(graph, node))


def bias_of(node: fx.Node) -> Any:
    """The operand that is added: a convolution's or linear layer's bias, ``addmm``'s first."""
    if node.target is aten.addmm.default:
        return node.args[0]
    return argument(node, "bias") if has_argument(node, "bias") else None


def _fixed_bias(graph: Graph, node: fx.Node) -> str:
    if node.target in PRODUCTS and node.target is not aten.addmm.default:
        return f"{describe(node)} has no bias to take the constant"
    bias = bias_of(node)
    if bias is None:
        return ""
    value = graph.constant(bias)
    if value is None or value.dim() != 1:
        return f"the bias of {describe(node)} is computed"
    if node.target is aten.addmm.default and (argument(node, "alpha"), argument(node, "beta")) != (1, 1):
        return f"{describe(node)} has factors of its own"
    if [*graph.readers(str(bias.target))] != [node] or uses(bias, node) != 1:
        return f"the bias of {describe(node)} is shared"
    return ""
