"""Products of two computed values, and attention: their bounds, and which operand elements count.

``C = A B`` sums over ``k``; a term ``A[m, k] B[k, n]`` counts unless one factor is known to be 0. Where the
rows of ``A`` are a softmax they are weights that add up to 1, so ``C`` stays between the bounds of ``B``.

An operand element that meets zeros alone need not be kept as it is, provided those zeros are. Where both
factors are 0 one of them has to stay; a position that goes takes both along.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphprune.operands import argument

from .intervals import Interval

if TYPE_CHECKING:
    from .constancy import Constancy

aten = torch.ops.aten

# Larger tables of terms are not looked at one by one.
MAX_TERMS = 1 << 24

_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
_KEEPS_ROWS = frozenset({
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.to.dtype,
    aten._to_copy.default,
})  # fmt: skip


def is_distribution(node: fx.Node) -> bool:
    """Whether the last dimension holds the weights of a softmax: not negative, with sum 1."""
    while node.target in _KEEPS_ROWS or (node.target is aten.dropout.default and not argument(node, "train")):
        node = node.args[0]  # type: ignore[assignment]
    if node.target not in _SOFTMAX or not isinstance(node.args[1], int):
        return False
    return node.args[1] % node.meta["val"].dim() == node.meta["val"].dim() - 1


def multiplied(left: Interval, right: Interval, size: Any) -> Interval | None:
    """Bounds of a matrix product over ``size`` terms (symbolic: any number); ``None`` if it is too large."""
    if terms(left.lo, right.lo) > MAX_TERMS:
        return None
    product = left.map(lambda bound: bound.unsqueeze(-1)) * right.map(lambda bound: bound.unsqueeze(-3))
    if product.shape[-2] != 1:
        return Interval(product.lo.sum(-2), product.hi.sum(-2))
    low, high = (float(size), float(size)) if isinstance(size, int) else (0.0, math.inf)
    total = product * Interval.between(low, high, 0)
    return total.map(lambda bound: bound.squeeze(-2))


def terms(left: torch.Tensor, right: torch.Tensor) -> int:
    """How many terms ``[…, m, k] · […, k, n]`` has, dimensions of size one spread out."""
    return math.prod(torch.broadcast_shapes(left.unsqueeze(-1).shape, right.unsqueeze(-3).shape))


def needed_of_product(
    needed: torch.Tensor, left: torch.Tensor, right: torch.Tensor, gone: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which elements of the operands of a matrix product count.

    Args:
        needed: ``[…, m, n]``, elements of the result that count.
        left, right: ``[…, m, k]`` and ``[…, k, n]``, where an operand is known to be 0.
        gone: ``[k]``, positions that are to be removed.

    Returns:
        Booleans of the terms' shape summed up: ``[…, m, k]`` and ``[…, k, n]``.
    """
    wanted = needed.unsqueeze(-2)
    zero_left, zero_right, gone = left.unsqueeze(-1), right.unsqueeze(-3), gone.unsqueeze(-1)
    for_left = wanted & ~zero_right & ~(gone & zero_left)
    for_right = wanted & ~torch.where(gone, zero_left | zero_right, zero_left & ~zero_right)
    return for_left.any(-1), for_right.any(-3)


def letters(node: fx.Node) -> tuple[str, str, str] | None:
    """Those of an ``einsum`` of two operands, result last; ``None`` where it is of another kind."""
    given: tuple[Any, ...] = node.args
    inputs, arrow, result = str(given[0]).replace(" ", "").partition("->")
    operands = inputs.split(",")
    if len(operands) != 2 or not arrow or "." in given[0] or given[1][0] is given[1][1]:
        return None
    if any(len(set(labels)) != len(labels) for labels in operands):
        return None
    return operands[0], operands[1], result


def summed(values: Constancy, node: fx.Node) -> Interval | None:
    """Bounds of an ``einsum``: 0 where every term has a factor that is 0, else nothing known."""
    named = letters(node)
    if named is None:
        return None
    operands: Any = node.args[1]
    left, right = (values.of(n) for n in operands)
    count = torch.einsum(f"{named[0]},{named[1]}->{named[2]}", (~left.zero).float(), (~right.zero).float())
    return Interval.between(-math.inf, math.inf, 0) * Interval.of((count > 0).double())


def needed_of_einsum(
    named: tuple[str, str, str],
    needed: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    gone: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`needed_of_product`, for an ``einsum``; ``gone`` says of the left operand's elements."""

    def reached(target: str, from_left: torch.Tensor, from_right: torch.Tensor) -> torch.Tensor:
        equation = f"{named[2]},{named[0]},{named[1]}->{target}"
        return torch.einsum(equation, needed.float(), from_left.float(), from_right.float()) > 0

    for_right = reached(named[1], ~gone & ~left, torch.ones_like(right))
    for_right |= reached(named[1], ~gone & left, right) | reached(named[1], gone & ~left, ~right)
    return reached(named[0], ~(gone & left), ~right), for_right


def attended(values: Constancy, node: fx.Node) -> Interval:
    """Bounds of ``scaled_dot_product_attention``: those of its value, over the sequence."""
    found = values.of(node.args[2]).over([node.meta["val"].dim() - 2])
    if _may_hide_rows(values, argument(node, "attn_mask")):
        found = found.with_number(0.0)  # a row that sees nothing is 0
    repeats = _repeats(node)
    if repeats != 1 and found.shape[-3] != 1:
        found = found.map(lambda bound: bound.repeat_interleave(repeats, -3))
    return found


def needed_of_attention(
    values: Constancy, node: fx.Node, needed: torch.Tensor, gone: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which elements of query, key and value count, broadcast against ``[…, h, 1, width]``.

    Args:
        values: what is known of the operands.
        node: the attention.
        needed: ``[…, h, l, width of the value]``.
        gone: ``[width]`` of query and key, positions that are to be removed.
    """
    wanted = needed.any(-2, keepdim=True)
    # Where a head's value is one number, it does not matter which positions are attended to.
    fixed = attended(values, node).constant
    scored = (wanted & ~fixed).any(-1, keepdim=True)
    query, key = (values.of(node.args[i]) for i in (0, 1))
    zero_query, zero_key = (x.zero.all(-2, keepdim=True) for x in (query, key))
    repeats = _repeats(node)
    if repeats != 1:
        zero_key = zero_key.repeat_interleave(repeats, -3) if zero_key.shape[-3] != 1 else zero_key
    for_query = scored & ~zero_key & ~(gone & zero_query)
    for_key = scored & ~torch.where(gone, zero_query | zero_key, zero_query & ~zero_key)
    if repeats != 1:
        for_key, wanted = (
            x.unflatten(-3, (-1, repeats)).any(-3) if x.shape[-3] != 1 else x for x in (for_key, wanted)
        )
    return for_query, for_key, wanted


def _may_hide_rows(values: Constancy, mask: Any) -> bool:
    """Whether a position may attend to nothing: by a mask that is not known, or that hides a whole row."""
    if mask is None:
        return False
    known = values.weights.of(mask)
    if known is None:
        return True
    seen = known if known.dtype == torch.bool else known > -math.inf
    return not bool(seen.any(-1).all())


def _repeats(node: fx.Node) -> int:
    query, key = node.args[0].meta["val"], node.args[1].meta["val"]  # type: ignore[union-attr]
    return query.shape[-3] // key.shape[-3] if node.kwargs.get("enable_gqa") else 1
