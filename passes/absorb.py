"""Taking an affine map per channel into the weights of a linear operator.

*Behind* the operator (``y = s (W x + b) + t``), rows are scaled:

    W' = s W            b' = s b + t

*Before* it (``y = W (s x + t) + b``), columns are, and the shift passes through the weight:

    W' = W s            b' = b + sum over inputs of W t

For a convolution the sum runs over the kernel as well, which is the truth only where the kernel never
reaches into zero padding: padding reads 0, not ``t``. A transposed convolution adds up as many inputs as
its kernel overlaps, which differs at the borders, so a shift before it goes through 1×1 kernels alone.
Channels of grouped convolutions are numbered group by group in both layouts, ``[out, in/g, …]`` and
transposed ``[in, out/g, …]``. All of it is computed in float64 and cast to the weight's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphprune.graph import Graph
from graphprune.operands import (
    CONVOLUTIONS,
    argument,
    depends_on_input,
    is_transposed,
    set_argument,
    sizes,
    uses,
)

from .affine import Affine, Refusal
from .commute import describe

aten = torch.ops.aten


@dataclass(frozen=True)
class Edit:
    """New values for the tensors an operator reads; ``bias`` is one it did not have."""

    node: fx.Node
    replaced: dict[str, torch.Tensor]
    bias: torch.Tensor | None = field(default=None)

    def apply(self, graph: Graph) -> None:
        """Write the new tensors into ``graph``; an operator without a bias gets one."""
        for name, value in self.replaced.items():
            graph.set_tensor(name, value)
        if self.bias is None:
            return
        owner = next(iter(self.replaced))
        trainable = isinstance(graph.tensors[owner], torch.nn.Parameter)
        name = owner.rpartition(".")[0] + ".bias" if "." in owner else "bias"
        bias = graph.add_tensor(name, self.bias, before=self.node, trainable=trainable)
        if self.node.target in _PRODUCTS:
            with graph.fx.inserting_after(self.node):
                total = graph.fx.call_function(aten.add.Tensor)
            self.node.replace_all_uses_with(total)
            total.args, total.meta = (self.node, bias), dict(self.node.meta)
        else:
            set_argument(self.node, "bias", bias)


def absorb_behind(graph: Graph, node: fx.Node, affine: Affine) -> Edit | None:
    """The edit that makes ``node`` compute ``affine(node)``; ``None`` where it has no weights.

    Raises:
        Refusal: it has, but they cannot take it.
    """
    rule = _BEHIND.get(node.target) if node.op == "call_function" else _constant_behind
    return rule(graph, node, affine) if rule is not None and node.op != "placeholder" else None


def absorb_before(graph: Graph, node: fx.Node, source: fx.Node, affine: Affine) -> Edit | None:
    """The edit that makes ``node`` compute on ``source`` what it did on ``affine(source)``.

    Raises:
        Refusal: it has weights, but they cannot take it.
    """
    rule = _BEFORE.get(node.target) if node.op == "call_function" else None
    if rule is None:
        return None
    if uses(source, node) != 1:
        raise Refusal(f"{describe(node)} reads it twice")
    return rule(graph, node, source, affine)


def _own(graph: Graph, node: fx.Node, value: Any, what: str) -> torch.Tensor:
    """The tensor behind an operand, in float64, if this operator alone reads it."""
    tensor = graph.constant(value)
    if tensor is None:
        made_by = describe(value) if isinstance(value, fx.Node) else repr(value)
        hint = "" if isinstance(value, fx.Node) and depends_on_input(value) else "; fold-parameters may help"
        raise Refusal(f"the {what} of {describe(node)} is computed, by {made_by}{hint}")
    readers = [reader for reader in graph.readers(str(value.target)) if reader is not node]
    if readers or uses(value, node) != 1:
        others = ", ".join(describe(reader) for reader in readers) or "itself again"
        raise Refusal(f"the {what} {value.target!r} of {describe(node)} is shared with {others}")
    return tensor.detach().to(torch.float64)


def _edit(
    graph: Graph, node: fx.Node, weight: fx.Node, value: torch.Tensor, bias: Any, shift: torch.Tensor
) -> Edit:
    """An edit with the new weight and bias, cast back; a bias that is zero is not added."""
    replaced = {str(weight.target): _cast(graph, node, weight, value)}
    if isinstance(bias, fx.Node):
        replaced[str(bias.target)] = _cast(graph, node, bias, shift)
        return Edit(node, replaced)
    if not shift.is_meta and not shift.count_nonzero():
        return Edit(node, replaced)
    return Edit(node, replaced, _cast(graph, node, weight, shift))


def _cast(graph: Graph, node: fx.Node, like: fx.Node, value: torch.Tensor) -> torch.Tensor:
    result = value.to(graph.tensor(like).dtype).contiguous()
    if not result.is_meta and not bool(torch.isfinite(result).all()):
        raise Refusal(f"the folded weights of {describe(node)} would not be finite in {result.dtype}")
    return result


def _bias(graph: Graph, node: fx.Node, size: int, like: torch.Tensor) -> tuple[Any, torch.Tensor]:
    given = argument(node, "bias")
    return given, like.new_zeros(size) if given is None else _own(graph, node, given, "bias")


# ---- convolutions ------------------------------------------------------------------------------


def _convolution_behind(graph: Graph, node: fx.Node, affine: Affine) -> Edit:
    weight = argument(node, "weight")
    value = _own(graph, node, weight, "weight")
    kernel = value.dim() - 2
    channel = len(sizes(node)) - kernel - 1
    groups = argument(node, "groups")
    out = value.shape[1] * groups if is_transposed(node) else value.shape[0]
    s, t = affine.channels(channel, out)
    bias, old = _bias(graph, node, out, value)
    if is_transposed(node):
        rows = s.view(groups, 1, -1, *[1] * kernel)
        value = (value.unflatten(0, (groups, -1)) * rows).flatten(0, 1)
    else:
        value = value * s.view(-1, 1, *[1] * kernel)
    return _edit(graph, node, weight, value, bias, s * old + t)


def _convolution_before(graph: Graph, node: fx.Node, source: fx.Node, affine: Affine) -> Edit:
    weight = argument(node, "weight")
    if node.args[0] is not source:
        raise Refusal(f"feeds {describe(node)} as its weight")
    value = _own(graph, node, weight, "weight")
    kernel = value.dim() - 2
    groups = argument(node, "groups")
    transposed = is_transposed(node)
    inputs = value.shape[0] if transposed else value.shape[1] * groups
    s, t = affine.channels(len(sizes(source)) - kernel - 1, inputs)
    if affine.shifts:
        _require_even_shift(node, value, transposed)
    out = value.shape[1] * groups if transposed else value.shape[0]
    bias, old = _bias(graph, node, out, value)
    taps = tuple(range(3, 3 + kernel))
    if transposed:  # [in, out/g, …] as [g, in/g, out/g, …]
        blocks, rows = value.unflatten(0, (groups, -1)), (groups, -1, 1, *[1] * kernel)
        shift = (blocks * t.view(rows)).sum(dim=(1, *taps)).flatten()
    else:  # [out, in/g, …] as [g, out/g, in/g, …]
        blocks, rows = value.unflatten(0, (groups, -1)), (groups, 1, -1, *[1] * kernel)
        shift = (blocks * t.view(rows)).sum(dim=(2, *taps)).flatten()
    return _edit(graph, node, weight, (blocks * s.view(rows)).flatten(0, 1), bias, old + shift)


def _require_even_shift(node: fx.Node, weight: torch.Tensor, transposed: bool) -> None:
    """Raise unless every output position adds the shift up over the whole kernel."""
    padding = argument(node, "padding")
    pointwise = math.prod(weight.shape[2:]) == 1
    if transposed:
        spread = any(stride != 1 for stride in argument(node, "stride"))
        if not pointwise or spread or any(padding) or any(argument(node, "output_padding")):
            raise Refusal(f"feeds {describe(node)}, whose borders add up fewer shifts than its middle")
    elif not pointwise if padding == "same" else padding != "valid" and any(padding):
        raise Refusal(f"feeds {describe(node)}, whose zero padding the shift would not reach")


# ---- matrix products ----------------------------------------------------------------------------


def _linear_behind(graph: Graph, node: fx.Node, affine: Affine) -> Edit:
    weight = argument(node, "weight")
    value = _matrix(_own(graph, node, weight, "weight"), node)
    s, t = affine.channels(-1, value.shape[0])
    bias, old = _bias(graph, node, value.shape[0], value)
    return _edit(graph, node, weight, value * s[:, None], bias, s * old + t)


def _linear_before(graph: Graph, node: fx.Node, source: fx.Node, affine: Affine) -> Edit:
    if node.args[0] is not source:
        raise Refusal(f"feeds {describe(node)} as its weight")
    weight = argument(node, "weight")
    value = _matrix(_own(graph, node, weight, "weight"), node)
    s, t = affine.channels(-1, value.shape[1])
    bias, old = _bias(graph, node, value.shape[0], value)
    return _edit(graph, node, weight, value * s, bias, old + value @ t)


def _product_behind(graph: Graph, node: fx.Node, affine: Affine) -> Edit:
    bias, _, weight = _product_operands(node)
    value = _matrix(_own(graph, node, weight, "right operand"), node)
    s, t = affine.channels(-1, value.shape[1])
    return _edit(graph, node, weight, value * s, bias, s * _vector(graph, node, bias, value) + t)


def _product_before(graph: Graph, node: fx.Node, source: fx.Node, affine: Affine) -> Edit:
    bias, left, weight = _product_operands(node)
    if left is not source:
        raise Refusal(f"feeds {describe(node)}, but not as its left operand")
    value = _matrix(_own(graph, node, weight, "right operand"), node)
    s, t = affine.channels(-1, value.shape[0])
    shift = _vector(graph, node, bias, value) + t @ value
    return _edit(graph, node, weight, value * s[:, None], bias, shift)


def _product_operands(node: fx.Node) -> tuple[Any, Any, Any]:
    if node.target is not aten.addmm.default:
        return None, node.args[0], node.args[1]
    if argument(node, "alpha") != 1 or argument(node, "beta") != 1:
        raise Refusal(f"{describe(node)} has factors of its own")
    return node.args[:3]  # type: ignore[return-value]


def _vector(graph: Graph, node: fx.Node, bias: Any, weight: torch.Tensor) -> torch.Tensor:
    if bias is None:
        return weight.new_zeros(weight.shape[1])
    value = _own(graph, node, bias, "bias")
    if value.shape != (weight.shape[1],):
        raise Refusal(f"{describe(node)} adds a {tuple(value.shape)} tensor, not a bias per channel")
    return value


def _matrix(value: torch.Tensor, node: fx.Node) -> torch.Tensor:
    if value.dim() != 2:
        raise Refusal(f"{describe(node)} multiplies with a {value.dim()}-dimensional tensor, not a matrix")
    return value


# ---- batch norms and constants --------------------------------------------------------------------


def _batch_norm_behind(graph: Graph, node: fx.Node, affine: Affine) -> Edit | None:
    """A batch norm with weights takes the next one in; without, it has nothing to take it."""
    weight, bias = argument(node, "weight"), argument(node, "bias")
    if argument(node, "training") or weight is None or bias is None:
        return None
    gamma, beta = _own(graph, node, weight, "weight"), _own(graph, node, bias, "bias")
    s, t = affine.channels(1, gamma.shape[0])
    return _edit(graph, node, weight, gamma * s, bias, beta * s + t)


def _constant_behind(graph: Graph, node: fx.Node, affine: Affine) -> Edit | None:
    value = graph.constant(node)
    if value is None:
        return None
    if not value.is_floating_point():
        raise Refusal(f"the tensor {node.target!r} is {value.dtype}")
    if uses(node) != 1 or len(graph.readers(str(node.target))) != 1:
        raise Refusal(f"the tensor {node.target!r} is read elsewhere, too")
    moved = affine.scale * value.detach().to(torch.float64) + affine.shift
    return Edit(node, {str(node.target): _cast(graph, node, node, moved)})


_PRODUCTS = frozenset({aten.mm.default, aten.matmul.default})

_BEHIND: dict[Any, Callable[[Graph, fx.Node, Affine], Edit | None]] = {
    **dict.fromkeys(CONVOLUTIONS, _convolution_behind),
    **dict.fromkeys((*_PRODUCTS, aten.addmm.default), _product_behind),
    aten.linear.default: _linear_behind,
    aten.batch_norm.default: _batch_norm_behind,
}
_BEFORE: dict[Any, Callable[[Graph, fx.Node, fx.Node, Affine], Edit]] = {
    **dict.fromkeys(CONVOLUTIONS, _convolution_before),
    **dict.fromkeys((*_PRODUCTS, aten.addmm.default), _product_before),
    aten.linear.default: _linear_before,
}
