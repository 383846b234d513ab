"""Matrix products: what is contracted is one axis of both operands, and removing it is exact."""

from __future__ import annotations

import torch
from torch import fx

from ..terms import Term
from ..typing import Dims, Typed, Typing, aten_operators, rule
from .elementwise import broadcast

aten = torch.ops.aten


@rule(aten.linear.default)
def linear(t: Typing, node: fx.Node) -> Typed:
    """``x […, I] · W [O, I]ᵀ + b [O]``."""
    x, weight = t.of(node.args[0]), t.of(node.args[1])
    t.same(x[-1], weight[-1], node)
    if len(weight) == 1:
        return x[:-1]
    if len(node.args) > 2 and node.args[2] is not None:
        t.same(t.of(node.args[2])[0], weight[0], node)
    return (*x[:-1], weight[0])


@rule(*aten_operators("matmul mm bmm mv dot vdot"))
def matmul(t: Typing, node: fx.Node) -> Typed:
    """``[…, M, K] · […, K, N]`` with vectors and broadcast batches as ``torch.matmul`` has them."""
    return _product(t, node, t.of(node.args[0]), t.of(node.args[1]))


@rule(*aten_operators("addmm baddbmm addmv"))
def added_product(t: Typing, node: fx.Node) -> Typed:
    """``bias + left · right``."""
    result = _product(t, node, t.of(node.args[1]), t.of(node.args[2]))
    return broadcast(t, node, [result, t.of(node.args[0])])


def _product(t: Typing, node: fx.Node, left: Dims, right: Dims) -> Dims:
    t.same(left[-1], right[-2] if len(right) > 1 else right[-1], node)
    rows, columns = left[-2:-1], right[-1:] if len(right) > 1 else ()
    batches = [dims[:-2] for dims in (left, right) if len(dims) > 2]
    return (*(broadcast(t, node, batches) if batches else ()), *rows, *columns)


@rule(*aten_operators("outer ger"))
def outer(t: Typing, node: fx.Node) -> Typed:
    """``[M] × [N]``."""
    return (t.of(node.args[0])[0], t.of(node.args[1])[0])


@rule(aten.einsum.default)
def einsum(t: Typing, node: fx.Node) -> Typed:
    """A letter is an axis; letters that do not come out are summed, which is exact. ``...`` broadcasts."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    inputs, arrow, output = equation.partition("->")
    axes: dict[str, Term] = {}
    extra: list[Dims] = []
    for labels, operand in zip(inputs.split(","), operands, strict=True):
        dims = t.of(operand)
        before, dots, after = labels.partition("...")
        if dots:
            extra.append(dims[len(before) : len(dims) - len(after)])
        placed = [*zip(before, dims, strict=False)]
        placed += zip(after, dims[len(dims) - len(after) :], strict=True) if after else ()
        for label, term in placed:
            if labels.count(label) > 1:
                t.freeze(term, "is a diagonal", node)
            known = axes.get(label)
            if known is None or (known.size == 1 and term.size != 1):
                axes[label] = term
            elif term.size != 1:
                t.same(known, term, node)
    spread = broadcast(t, node, extra) if extra else ()
    if not arrow:
        letters = inputs.replace(",", "").replace("...", "")
        output = ("..." if extra else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    before, dots, after = output.partition("...")
    return (*(axes[c] for c in before), *(spread if dots else ()), *(axes[c] for c in after))


@rule(aten.bilinear.default)
def bilinear(t: Typing, node: fx.Node) -> Typed:
    """``x1 […, I] · W [O, I, J] · x2 […, J] + b [O]``."""
    first, second, weight = (t.of(a) for a in node.args[:3])
    t.same(first[-1], weight[1], node)
    t.same(second[-1], weight[2], node)
    if len(node.args) > 3 and node.args[3] is not None:
        t.same(t.of(node.args[3])[0], weight[0], node)
    return (*broadcast(t, node, [first[:-1], second[:-1]]), weight[0])
