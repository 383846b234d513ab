"""Matrix products, convolutions, attention and recurrent layers, by the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from .oracle import Cases, Program, check, oracle

aten = torch.ops.aten
CASES = Cases()

sizes = st.sampled_from((2, 3, 4, 6))
batches = st.lists(st.sampled_from((1, 2, 3)), max_size=2)


@CASES.of("linear")
def linear(p: Program, target: Any) -> None:
    inner, out = p.draw(sizes), p.draw(sizes)
    x = p.operand(*p.draw(batches), inner)
    if p.draw(st.integers(0, 4)) == 0:
        p(target, x, p.operand(inner))
    else:
        p(target, x, p.operand(out, inner), *p.draw(st.sampled_from(((), (p.operand(out),), (None,)))))


@CASES.of("matmul")
def matmul(p: Program, target: Any) -> None:
    m, k, n = (p.draw(sizes) for _ in range(3))
    batch = p.draw(batches)
    form = p.draw(st.integers(0, 5))
    left = p.operand(k) if form == 0 else p.operand(*batch, m, k)
    spread = [p.draw(st.sampled_from((1, s))) for s in batch] if form > 2 else []
    right = p.operand(k) if form == 1 else p.operand(*spread, k, n)
    p(target, left, right)


@CASES.of("mm bmm mv dot vdot outer ger addmm baddbmm addmv")
def product(p: Program, target: Any) -> None:
    b, m, k, n = (p.draw(sizes) for _ in range(4))
    shapes: dict[Any, tuple[tuple[int, ...], ...]] = {
        aten.mm.default: ((m, k), (k, n)),
        aten.bmm.default: ((b, m, k), (b, k, n)),
        aten.mv.default: ((m, k), (k,)),
        aten.dot.default: ((k,), (k,)),
        aten.vdot.default: ((k,), (k,)),
        aten.outer.default: ((m,), (n,)),
        aten.ger.default: ((m,), (n,)),
        aten.addmm.default: (p.draw(st.sampled_from(((n,), (m, 1), (m, n)))), (m, k), (k, n)),
        aten.baddbmm.default: (
            p.draw(st.sampled_from(((1, m, n), (b, 1, n), (b, m, n)))),
            (b, m, k),
            (b, k, n),
        ),
        aten.addmv.default: ((m,), (m, k), (k,)),
    }
    p(target, *[p.operand(*shape) for shape in shapes[target]])


EQUATIONS = {
    "bij,bjk->bik": ((2, 3, 4), (2, 4, 6)),
    "bhid,bhjd->bhij": ((1, 2, 3, 4), (2, 2, 3, 4)),
    "i,j->ij": ((3,), (4,)),
    "ij->ji": ((3, 4),),
    "ij,ij": ((3, 4), (3, 4)),
    "ij,jk": ((3, 4), (4, 6)),
    "Ba,aC": ((3, 4), (4, 6)),
    "...c,cd->...d": ((2, 3, 4), (4, 6)),
    "a...b,bc->...ac": ((2, 3, 4), (4, 6)),
    "...i,...j->...ij": ((2, 3), (2, 4)),
    "ii->i": ((4, 4),),
    "iij->j": ((3, 3, 4),),
    "ij->": ((3, 4),),
    "bnd,bmd,de->bnme": ((2, 3, 4), (2, 6, 4), (4, 2)),
    "bhw,bc hw->bc": ((2, 3, 4), (2, 6, 3, 4)),
}


@CASES.of("einsum")
def einsum(p: Program, target: Any) -> None:
    equation = p.draw(st.sampled_from(sorted(EQUATIONS)))
    p(target, equation, [p.operand(*shape) for shape in EQUATIONS[equation]])


@CASES.of("bilinear")
def bilinear(p: Program, target: Any) -> None:
    i, j, o = (p.draw(sizes) for _ in range(3))
    bias = p.draw(st.sampled_from(((), (p.operand(o),), (None,))))
    p(target, p.operand(2, i), p.operand(2, j), p.operand(o, i, j), *bias)


@CASES.of("conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding")
def convolution(p: Program, target: Any) -> None:
    rank = int(target._schema.name[-2])
    groups, inner, out = (
        p.draw(st.sampled_from((1, 1, 2, 4, 6))),
        p.draw(st.integers(1, 3)),
        p.draw(st.integers(1, 3)),
    )
    batch = [2] if p.draw(st.booleans()) or target._overloadname == "padding" else []
    kernel = p.draw(st.sampled_from((1, 3)))
    x = p.operand(*batch, groups * inner, *[4] * rank)
    weight = p.operand(groups * out, inner, *[kernel] * rank)
    bias = p.operand(groups * out) if p.draw(st.booleans()) else None
    if groups == 1 and p.draw(st.booleans()):
        p(target, x, weight, bias)
        return
    padding = "same" if target._overloadname == "padding" else [kernel // 2] * rank
    p(target, x, weight, bias, [1] * rank, padding, [1] * rank, groups)


@CASES.of("conv_transpose1d conv_transpose2d.input conv_transpose3d.input")
def transposed_convolution(p: Program, target: Any) -> None:
    rank = int(target._schema.name[-2])
    groups, inner, out = (
        p.draw(st.sampled_from((1, 2, 4))),
        p.draw(st.integers(1, 3)),
        p.draw(st.integers(1, 3)),
    )
    x = p.operand(*([2] if p.draw(st.booleans()) else []), groups * inner, *[3] * rank)
    weight = p.operand(groups * inner, out, *[2] * rank)
    bias = p.operand(groups * out) if p.draw(st.booleans()) else None
    p(target, x, weight, bias, [2] * rank, [0] * rank, [0] * rank, groups)


@CASES.of("scaled_dot_product_attention")
def attention(p: Program, target: Any) -> None:
    heads, repeats, width, wide = (p.draw(st.sampled_from((1, 2, 3, 4))) for _ in range(4))
    length, keys = p.draw(sizes), p.draw(sizes)
    batch = p.draw(st.sampled_from(((), (2,), (1,))))
    named: dict[str, Any] = {}
    if repeats > 1:
        named["enable_gqa"] = True
    query = p.operand(*batch, heads * repeats, length, width)
    key, value = p.operand(*batch, heads, keys, width), p.operand(*batch, heads, keys, wide)
    mask: Any = p.draw(st.sampled_from(("none", "none", "table", "heads", "flags")))
    if mask == "table":
        mask = p.operand(length, keys)
    elif mask == "heads":
        mask = p.operand(*batch, heads * repeats, length, keys)
    elif mask == "flags":
        # At least one key a query, or its row is not a number.
        mask = p.tensor_of(torch.ones(length, keys).tril(1).bool())
    if p.draw(st.booleans()):
        named["scale"] = 0.3
    causal = mask == "none" and p.draw(st.booleans())
    p(target, query, key, value, None if mask == "none" else mask, 0.0, causal, **named)


@CASES.of("lstm.input gru.input rnn_tanh.input rnn_relu.input")
def recurrent(p: Program, target: Any) -> None:
    gates = {aten.lstm.input: 4, aten.gru.input: 3}.get(target, 1)
    hidden, source = p.draw(st.sampled_from((2, 3, 4))), p.draw(sizes)
    layers, both, biased = p.draw(st.integers(1, 2)), p.draw(st.booleans()), p.draw(st.booleans())
    out = p.draw(st.sampled_from((hidden, 2))) if target is aten.lstm.input and hidden > 2 else hidden
    directions = 2 if both else 1
    weights: list[Any] = []
    entering = source
    for _ in range(layers):
        for _ in range(directions):
            weights += [p.operand(gates * hidden, entering), p.operand(gates * hidden, out)]
            weights += [p.operand(gates * hidden), p.operand(gates * hidden)] if biased else []
            weights += [p.operand(out, hidden)] if out != hidden else []
        entering = out * directions
    state: Any = p.operand(layers * directions, 2, out)
    if target is aten.lstm.input:
        state = [state, p.operand(layers * directions, 2, hidden)]
    first = p.draw(st.booleans())
    x = p.operand(2, 3, source) if first else p.operand(3, 2, source)
    p.parts(p(target, x, state, weights, biased, layers, 0.0, False, both, first))


@pytest.mark.parametrize("target", CASES, ids=str)
@oracle(examples=20)
def test_slices(target: Any, data: st.DataObject, seed: int) -> None:
    program = Program(data.draw)
    CASES[target](program, target)
    check(program, seed)
