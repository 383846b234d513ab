"""Reductions and normalisations, by the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from .oracle import Cases, Program, check, oracle, shapes

aten = torch.ops.aten
CASES = Cases()


def some_dims(p: Program, rank: int) -> list[int]:
    """Dimensions, each once, counted from either end; perhaps none, which means all of them."""
    places = p.draw(st.lists(st.integers(0, rank - 1), unique=True, max_size=rank))
    return [d - p.draw(st.sampled_from((0, rank))) for d in places]


def one_dim(p: Program, rank: int) -> int:
    """A dimension, counted from either end."""
    return p.draw(st.integers(-rank, rank - 1))


@CASES.of("sum nansum any all prod mean max min nanmean amax amin aminmax count_nonzero")
def whole(p: Program, target: Any) -> None:
    node = p(target, p.operand(*p.draw(shapes())))
    if isinstance(node.meta["val"], tuple):
        p.parts(node)


@CASES.of("sum.dim_IntList mean.dim logsumexp any.dims")
def along(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    dims = some_dims(p, len(shape))
    if target is aten.logsumexp.default:
        dims = dims or [0]
    p(target, p.operand(*shape), dims, p.draw(st.booleans()))


@CASES.of("any.dim all.dim prod.dim_int max.dim min.dim median.dim mode argmax argmin")
def along_one(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    node = p(target, p.operand(*shape), one_dim(p, len(shape)), p.draw(st.booleans()))
    if isinstance(node.meta["val"], tuple):
        p.parts(node)


@CASES.of("kthvalue")
def kth(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    p.parts(p(target, p.operand(*shape), 1, one_dim(p, len(shape)), p.draw(st.booleans())))


@CASES.of("var.correction std.correction var_mean.correction std_mean.correction var.dim std.dim")
def variance(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    dims = some_dims(p, len(shape)) or None
    if target._overloadname == "dim":
        p(target, p.operand(*shape), dims, False, p.draw(st.booleans()))
        return
    node = p(target, p.operand(*shape), dims, correction=0, keepdim=p.draw(st.booleans()))
    if isinstance(node.meta["val"], tuple):
        p.parts(node)


@CASES.of("linalg_vector_norm norm.ScalarOpt_dim norm.Scalar frobenius_norm.dim linalg_norm")
def norm(p: Program, target: Any) -> None:
    shape = p.draw(shapes(2, 3))
    dims = some_dims(p, len(shape))[:2] or [0]
    keep = p.draw(st.booleans())
    order = p.draw(st.sampled_from((1, 2, 3, 0.5, float("inf"), -1, 0)))
    if target is aten.linalg_norm.default and len(dims) == 2:
        order = p.draw(st.sampled_from((None, 1, 2, -2, float("inf"))))
    values: dict[Any, tuple] = {
        aten.norm.Scalar: (order,),
        aten.frobenius_norm.dim: (dims, keep),
        aten.linalg_vector_norm.default: (order, p.draw(st.sampled_from((dims, None))), keep),
    }
    p(target, p.operand(*shape), *values.get(target, (order, dims, keep)))


@CASES.of("batch_norm instance_norm")
def channel_norm(p: Program, target: Any) -> None:
    c = p.draw(st.integers(1, 6))
    x = p.operand(2, c, *p.draw(shapes(1 if target is aten.instance_norm.default else 0, 2)))
    affine = [p.operand(c), p.operand(c)] if p.draw(st.booleans()) else [None, None]
    running = [p.operand(c), p(aten.exp.default, p.operand(c))] if p.draw(st.booleans()) else [None, None]
    own = running[0] is None
    p(target, x, *affine, *running, own, 0.1, 1e-5, False)


@CASES.of("group_norm")
def group_norm(p: Program, target: Any) -> None:
    groups, inner = p.draw(st.sampled_from((1, 2, 3, 4))), p.draw(st.integers(1, 3))
    affine = (p.operand(groups * inner), p.operand(groups * inner)) if p.draw(st.booleans()) else ()
    p(target, p.operand(2, groups * inner, *p.draw(shapes(0, 2))), groups, *affine)


@CASES.of("layer_norm rms_norm")
def layer_norm(p: Program, target: Any) -> None:
    shape = p.draw(shapes(1, 3))
    inner = list(shape[p.draw(st.integers(0, len(shape) - 1)) :])
    count = 2 if target is aten.layer_norm.default else 1
    affine = [p.operand(*inner) for _ in range(p.draw(st.integers(0, count)))]
    p(target, p.operand(*shape), inner, *affine)


@CASES.of("softmax.int log_softmax.int _softmax _log_softmax special_softmax")
def softmax(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    private = target in (aten._softmax.default, aten._log_softmax.default)
    p(target, p.operand(*shape), one_dim(p, len(shape)), *((False,) if private else ()))


@CASES.of("_weight_norm")
def weight_norm(p: Program, target: Any) -> None:
    shape = p.draw(shapes(2, 3))
    dim = p.draw(st.integers(0, len(shape) - 1))
    g = p.operand(*[s if i == dim else 1 for i, s in enumerate(shape)])
    p(target, p.operand(*shape), g, dim)


@pytest.mark.parametrize("target", CASES, ids=str)
@oracle(examples=16)
def test_slices(target: Any, data: st.DataObject, seed: int) -> None:
    program = Program(data.draw)
    CASES[target](program, target)
    check(program, seed)
