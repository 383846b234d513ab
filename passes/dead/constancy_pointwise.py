"""The rules of :mod:`.dead.constancy` for operators that work element by element.

Functions that never decrease are applied to both bounds as they are. SiLU, GELU, Mish and hard swish fall
to a minimum a little below 0 and rise from there, so their largest value is at an end. Any other pointwise
operator is evaluated where all its operands are known numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphprune.axes.typing import aten_operators
from graphprune.operands import argument

from .constancy import Constancy
from .extents import is_float
from .intervals import Interval

aten = torch.ops.aten
Rule = Callable[[Constancy, fx.Node], Any]
RULES: dict[Any, Rule] = {}


def is_pointwise(node: fx.Node) -> bool:
    """Whether the operator works element by element, and gives the same again on the same operands."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        return False
    return torch.Tag.pointwise in tags or node.target in _POINTWISE_TOO


_POINTWISE_TOO = frozenset(aten_operators(
    "hardswish log_sigmoid multiply.Tensor divide.Tensor subtract.Tensor square prelu rsub.Tensor "
    "where.ScalarOther where.ScalarSelf where.Scalar masked_fill.Tensor float_power.Tensor_Scalar "
    "pow.Tensor_Scalar"
))  # fmt: skip


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators by name."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(aten_operators(names), function))
        return function

    return register


def known(values: Constancy, node: fx.Node) -> Interval | None:
    """A pointwise operator where every operand is a known number: its value there, else nothing known."""
    if not is_pointwise(node) or not is_float(node.meta.get("val")):
        return None
    sources = node.all_input_nodes
    if not sources or not all(is_float(s.meta.get("val")) for s in sources):
        return None
    operands = {s: values.of(s) for s in sources}
    sure = _all(operands[s].constant for s in sources)
    if not bool(sure.any()):
        return None
    args, kwargs = fx.map_arg(
        (node.args, node.kwargs), lambda n: torch.where(operands[n].constant, operands[n].lo, 0.0)
    )
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    sure = sure & result.isfinite()
    return Interval(torch.where(sure, result, -math.inf), torch.where(sure, result, math.inf))


def _all(masks: Any) -> torch.Tensor:
    result = torch.ones((), dtype=torch.bool)
    for entry in masks:
        result = result & entry
    return result


@rule("relu relu6 hardtanh clamp clamp_min clamp_max sigmoid tanh hardsigmoid softplus elu selu celu exp "
      "expm1 erf log_sigmoid logsigmoid sign floor ceil round trunc atan sqrt")  # fmt: skip
def _rising(values: Constancy, node: fx.Node) -> Interval | None:
    if any(isinstance(a, fx.Node) for a in (*node.args[1:], *node.kwargs.values())):
        return None
    x = values.of(node.args[0])
    if node.target is aten.sqrt.default:
        x = Interval(x.lo.clamp(min=0), x.hi.clamp(min=0))
    found = x.map(lambda bound: node.target(bound, *node.args[1:], **node.kwargs))  # type: ignore[operator]
    values.saturated[node] = found.constant & ~x.constant
    return found


@rule("leaky_relu")
def _leaky(values: Constancy, node: fx.Node) -> Interval | None:
    return _rising(values, node) if argument(node, "negative_slope") >= 0 else None


# The least value of each, rounded down.
_DIPS: dict[Any, float] = {
    aten.silu.default: -0.27847, aten.gelu.default: -0.17005, aten.mish.default: -0.30885,
    aten.hardswish.default: -0.37501,
}  # fmt: skip


@rule("silu gelu mish hardswish")
def _dipping(values: Constancy, node: fx.Node) -> Interval:
    x = values.of(node.args[0])
    # f(-inf) is 0 · -inf to floating point; map makes it 0, which it is.
    ends = x.map(lambda bound: node.target(bound, *node.args[1:], **node.kwargs))  # type: ignore[operator]
    exact = x.constant | (x.lo >= 0)
    dip = torch.full_like(ends.lo, _DIPS[node.target])
    return Interval(torch.where(exact, ends.lo, dip), torch.maximum(ends.lo, ends.hi))


@rule("add.Tensor add.Scalar sub.Tensor sub.Scalar subtract.Tensor rsub.Scalar")
def _sum(values: Constancy, node: fx.Node) -> Interval:
    left, right = values.of(node.args[0]), values.of(node.args[1])
    alpha = argument(node, "alpha") if not str(node.target).startswith("aten.subtract") else 1
    right = right * Interval.of(torch.tensor(float(alpha)))
    if "rsub" in str(node.target):  # alpha belongs to the first operand
        return values.of(node.args[1]) - left * Interval.of(torch.tensor(float(alpha)))
    return left + right if "add" in str(node.target) else left - right


@rule("mul.Tensor mul.Scalar multiply.Tensor")
def _product(values: Constancy, node: fx.Node) -> Interval:
    return values.of(node.args[0]) * values.of(node.args[1])


@rule("div.Tensor div.Scalar divide.Tensor")
def _quotient(values: Constancy, node: fx.Node) -> Interval:
    return values.of(node.args[0]) * values.of(node.args[1]).reciprocal()


@rule("reciprocal")
def _reciprocal(values: Constancy, node: fx.Node) -> Interval:
    return values.of(node.args[0]).reciprocal()


@rule("neg")
def _negative(values: Constancy, node: fx.Node) -> Interval:
    return -values.of(node.args[0])


@rule("abs square pow.Tensor_Scalar")
def _even(values: Constancy, node: fx.Node) -> Interval | None:
    power = node.args[1] if len(node.args) > 1 else 2
    if power != 2:
        return None
    x = values.of(node.args[0])
    size = torch.maximum(x.lo.abs(), x.hi.abs())
    inner = torch.where((x.lo <= 0) & (x.hi >= 0), 0.0, torch.minimum(x.lo.abs(), x.hi.abs()))
    found = Interval(inner, size)
    return found if node.target is aten.abs.default else found.map(torch.square)


@rule("maximum minimum")
def _extremum(values: Constancy, node: fx.Node) -> Interval:
    left, right = values.of(node.args[0]), values.of(node.args[1])
    return Interval(node.target(left.lo, right.lo), node.target(left.hi, right.hi))  # type: ignore[operator]


@rule("where.self where.ScalarOther where.ScalarSelf")
def _where(values: Constancy, node: fx.Node) -> Interval:
    left, right = (Interval(*b) for b in zip(
        torch.broadcast_tensors(values.of(node.args[1]).lo, values.of(node.args[2]).lo),
        torch.broadcast_tensors(values.of(node.args[1]).hi, values.of(node.args[2]).hi), strict=True,
    ))  # fmt: skip
    return _at_rank(left.hull(right), node)


@rule("masked_fill.Scalar masked_fill.Tensor")
def _filled_in(values: Constancy, node: fx.Node) -> Interval | None:
    if isinstance(node.args[2], fx.Node):
        return None
    return _at_rank(values.of(node.args[0]).with_number(float(node.args[2])), node)  # type: ignore[arg-type]


def _at_rank(value: Interval, node: fx.Node) -> Interval:
    missing = node.meta["val"].dim() - value.lo.dim()
    return value.map(lambda bound: bound.reshape((*[1] * missing, *bound.shape)))


@rule("zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full")
def _filled(values: Constancy, node: fx.Node) -> Interval | None:
    name = str(node.target)
    number = 0.0 if "zeros" in name else 1.0 if "ones" in name else argument(node, "fill_value")
    return (
        Interval.between(float(number), float(number), node.meta["val"].dim())
        if isinstance(number, (int, float))
        else None
    )
