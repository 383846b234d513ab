"""Reductions: a sum over an axis is exact, a mean or an extremum over it is a statistic.

Zeroed positions add nothing to a sum, a Euclidean norm or an ``any``. A mean divides by the count, an
extremum may have been the zero, ``argmax`` gives a position: those change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..terms import Reason, Term
from ..typing import Dims, Typed, Typing, aten_operators, rule

aten = torch.ops.aten


def _reduced(t: Typing, node: fx.Node, dims: Any, keep: bool) -> tuple[Dims, list[Term]]:
    """The result's type, and the terms that were reduced (all, when ``dims`` is None or empty)."""
    x = t.of(node.args[0])
    if dims == [] and node.target is aten.any.dims:
        places = set()  # the one reduction for which no dimensions means none
    elif dims is None or dims == []:
        places = set(range(len(x)))
    else:
        places = {d % len(x) for d in ([dims] if isinstance(dims, int) else dims)} if x else set()
    gone = [x[p] for p in sorted(places)]
    one = t.fixed(1, _ONE)
    return tuple(one if i in places else term for i, term in enumerate(x) if keep or i not in places), gone


_ONE = Reason("reduced")


def _by_position(node: fx.Node, index: int, keep_index: int) -> tuple[Any, bool]:
    dims = node.args[index] if len(node.args) > index else node.kwargs.get("dim")
    keep = node.args[keep_index] if len(node.args) > keep_index else node.kwargs.get("keepdim", False)
    return dims, bool(keep)


@rule(*aten_operators("sum sum.dim_IntList nansum any any.dim any.dims count_nonzero"))
def total(t: Typing, node: fx.Node) -> Typed:
    """Exact: a zeroed position adds nothing."""
    return _reduced(t, node, *_by_position(node, 1, 2))[0]


@rule(*aten_operators("mean mean.dim amax amin all all.dim logsumexp prod prod.dim_int nanmean "
                      "aminmax max min"))  # fmt: skip
def statistic(t: Typing, node: fx.Node) -> Typed:
    """Removing a position changes the result."""
    result, gone = _reduced(t, node, *_by_position(node, 1, 2))
    t.statistical(gone, f"a {_name(node)} runs over it", node)
    return result if isinstance(node.meta["val"], torch.Tensor) else [result, result]


@rule(*aten_operators("var.correction std.correction var_mean.correction std_mean.correction"))
def variance(t: Typing, node: fx.Node) -> Typed:
    """A variance, perhaps with its mean."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    result, gone = _reduced(t, node, dims, bool(node.kwargs.get("keepdim", False)))
    t.statistical(gone, f"a {_name(node)} runs over it", node)
    return result if isinstance(node.meta["val"], torch.Tensor) else [result, result]


@rule(*aten_operators("var.dim std.dim"))
def variance_unbiased(t: Typing, node: fx.Node) -> Typed:
    """``(x, dims, unbiased, keepdim)``."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keep = node.args[3] if len(node.args) > 3 else node.kwargs.get("keepdim", False)
    result, gone = _reduced(t, node, dims, bool(keep))
    t.statistical(gone, f"a {_name(node)} runs over it", node)
    return result


@rule(*aten_operators("max.dim min.dim median.dim mode kthvalue argmax argmin"))
def position(t: Typing, node: fx.Node) -> Typed:
    """The result names a position, so positions stay."""
    name = _name(node)
    index = 2 if name == "kthvalue" else 1
    result, gone = _reduced(t, node, *_by_position(node, index, index + 1))
    t.freeze(gone, f"{name} names a position of it", node)
    return result if isinstance(node.meta["val"], torch.Tensor) else [result, result]


@rule(*aten_operators("linalg_vector_norm norm.ScalarOpt_dim norm.Scalar frobenius_norm.dim linalg_norm"))
def norm(t: Typing, node: fx.Node) -> Typed:
    """A norm of positive finite order sums powers, which is exact; any other counts or compares."""
    order = node.args[1] if len(node.args) > 1 else 2
    if "frobenius" in _name(node):
        result, _ = _reduced(t, node, *_by_position(node, 1, 2))
        return result
    result, gone = _reduced(t, node, *_by_position(node, 2, 3))
    if order is not None and not (isinstance(order, (int, float)) and 0 < order < float("inf")):
        t.statistical(gone, "a norm compares its positions", node)
    return result


@rule(*aten_operators("histc"))
def histogram(t: Typing, node: fx.Node) -> Typed:
    """How often a value occurs: every position counts, zero or not."""
    t.freeze(t.of(node.args[0]), "its values are counted", node)
    return t.fixed_like(node.meta["val"], _BINS)


_BINS = Reason("how often values occur")


def _name(node: fx.Node) -> str:
    return node.target._schema.name.removeprefix("aten::")
