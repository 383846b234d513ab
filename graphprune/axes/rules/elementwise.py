"""Operators that work position by position, with broadcasting: dimensions of one place are one axis."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..terms import Reason, Term
from ..typing import Dims, Typed, Typing, aten_operators, rule

aten = torch.ops.aten
_NUMBERS = Reason("computed from numbers alone")


def broadcast(t: Typing, node: fx.Node, operands: list[Dims]) -> Dims:
    """The type of ``operands`` broadcast together; dimensions of size one give way."""
    first = operands[0]
    if len(operands) == 1 or all(dims is first for dims in operands):
        return first
    rank = max(map(len, operands))
    result: list[Term] = []
    for place in range(-rank, 0):
        chosen: Term | None = None
        for dims in operands:
            if len(dims) >= -place:
                term = dims[place]
                if chosen is None or (chosen.size == 1 and term.size != 1):
                    chosen = term
                elif term is not chosen and term.size != 1:
                    t.same(chosen, term, node)
        result.append(chosen)
    return tuple(result)


def tensor_operands(t: Typing, arguments: Any) -> list[Dims]:
    """The types of the tensors among an operator's arguments."""
    return [t.dims[a] for a in arguments if a.__class__ is fx.Node and t.dims[a].__class__ is tuple]


def elementwise(t: Typing, node: fx.Node) -> Typed:
    """Rule of every pointwise operator: torch tags most of them, the rest are registered below."""
    arguments = node.args if not node.kwargs else (*node.args, *node.kwargs.values())
    operands = tensor_operands(t, arguments)
    if not operands:
        return t.fixed_like(node.meta.get("val"), _NUMBERS)
    result, value = broadcast(t, node, operands), node.meta.get("val")
    return [result] * len(value) if isinstance(value, (tuple, list)) else result


def first_operand(t: Typing, node: fx.Node) -> Typed:
    """Rule of operators whose result has the type of their first operand."""
    return t.of(node.args[0])


rule(
    *aten_operators(
        """hardswish log_sigmoid rrelu rsub.Tensor multiply.Tensor divide.Tensor subtract.Tensor
        floor_divide where.ScalarOther where.ScalarSelf where.Scalar masked_fill.Tensor
        __and__.Tensor __or__.Tensor special_expit square float_power.Tensor_Scalar pow.Tensor_Scalar
        fake_quantize_per_tensor_affine real imag conj resolve_conj resolve_neg copy"""
    )
)(elementwise)

rule(
    *aten_operators(
        """dropout alpha_dropout feature_dropout feature_alpha_dropout contiguous detach alias
        lift_fresh_copy lift_fresh to.dtype to.dtype_layout to.device to.other to.prim_Device _to_copy
        type_as detach_copy zeros_like ones_like full_like empty_like fill.Scalar fill.Tensor zero"""
    )
)(first_operand)


@rule(aten.prelu.default)
def prelu(t: Typing, node: fx.Node) -> Typed:
    """``x [N, C, …]`` with a slope ``[C]`` or ``[1]``."""
    x, slope = t.of(node.args[0]), t.of(node.args[1])
    if slope and slope[0].size != 1:
        t.same(x[1] if len(x) > 1 else x[0], slope[0], node)
    return x


@rule(operator.getitem)
def getitem(t: Typing, node: fx.Node) -> Typed:
    """One of several results."""
    return t.dims[node.args[0]][node.args[1]]


@rule(*aten_operators("broadcast_tensors meshgrid meshgrid.indexing"))
def broadcast_tensors(t: Typing, node: fx.Node) -> Typed:
    """Sizes of the operands meet in the results; they are kept whole."""
    t.freeze(
        [term for dims in tensor_operands(t, node.args[0]) for term in dims], "is spread over others", node
    )
    return t.fixed_like(node.meta["val"], _NUMBERS)
