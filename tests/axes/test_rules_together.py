"""Operators one after another: what one rule refined, another one finds, refines further and derives from."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
from hypothesis import strategies as st
from torch import fx

from graphprune.axes.terms import leaves

from .oracle import Program, check, oracle, terms

aten = torch.ops.aten
LARGEST = 300
Step = Callable[[Program, fx.Node], fx.Node | list[fx.Node]]


def shape_of(node: fx.Node) -> list[int]:
    return list(node.meta["val"].shape)


def dim_of(p: Program, node: fx.Node) -> int:
    return p.draw(st.integers(0, len(shape_of(node)) - 1))


def divisor(p: Program, size: int) -> int:
    return p.draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))


def reshape(p: Program, x: fx.Node) -> fx.Node:
    shape: list[int] = []
    total = prod(shape_of(x))
    while total > 1 and len(shape) < 3:
        shape.append(divisor(p, total))
        total //= shape[-1]
    return p(aten.reshape.default, x, [*shape, total])


def split_heads(p: Program, x: fx.Node) -> fx.Node:
    shape = shape_of(x)
    heads = divisor(p, shape[-1])
    x = p(aten.reshape.default, x, [*shape[:-1], heads, shape[-1] // heads])
    return p(aten.transpose.int, x, -2, p.draw(st.integers(-len(shape) - 1, -2)))


def transpose(p: Program, x: fx.Node) -> fx.Node:
    return p(aten.transpose.int, x, dim_of(p, x), dim_of(p, x))


def cat(p: Program, x: fx.Node) -> fx.Node:
    dim, shape = dim_of(p, x), shape_of(x)
    shape[dim] = p.draw(st.integers(1, 4))
    other = p.draw(st.sampled_from((x, p.plain(*shape))))
    return p(aten.cat.default, p.draw(st.permutations([x, other])), dim)


def split(p: Program, x: fx.Node) -> list[fx.Node]:
    dim = dim_of(p, x)
    return p.parts(p(aten.chunk.default, x, p.draw(st.integers(2, 3)), dim))


def slice_(p: Program, x: fx.Node) -> fx.Node:
    dim = dim_of(p, x)
    size = shape_of(x)[dim]
    start = p.draw(st.integers(0, size - 1))
    step = p.draw(st.sampled_from((1, 1, 2)))
    return p(aten.slice.Tensor, x, dim, start, p.draw(st.integers(start + 1, size)), step)


def rotate(p: Program, x: fx.Node) -> fx.Node:
    """``x · a + rotate_half(x) · b``, as rotary embeddings do."""
    size = shape_of(x)[-1]
    if size % 2:
        return x
    front = p(aten.slice.Tensor, x, -1, 0, size // 2)
    back = p(aten.slice.Tensor, x, -1, size // 2, 2**63 - 1)
    turned = p(aten.cat.default, [p(aten.neg.default, back), front], -1)
    return p(aten.add.Tensor, p(aten.mul.Tensor, x, p.plain(size)), p(aten.mul.Tensor, turned, p.plain(size)))


def linear(p: Program, x: fx.Node) -> fx.Node:
    out = p.draw(st.sampled_from((2, 4, 6)))
    return p(aten.linear.default, x, p.plain(out, shape_of(x)[-1]), p.plain(out))


def convolution(p: Program, x: fx.Node) -> fx.Node:
    shape = shape_of(x)
    if len(shape) != 3:
        return x
    groups, out = divisor(p, shape[1]), p.draw(st.integers(1, 3))
    weight = p.plain(groups * out, shape[1] // groups, 1)
    return p(aten.conv1d.default, x, weight, None, [1], [0], [1], groups)


def add(p: Program, x: fx.Node) -> fx.Node:
    shape = shape_of(x)
    other = [p.draw(st.sampled_from((1, s))) for s in shape]
    return p(aten.add.Tensor, x, p.plain(*other))


def gram(p: Program, x: fx.Node) -> fx.Node:
    return p(aten.matmul.default, x, p(aten.transpose.int, x, -1, -2)) if len(shape_of(x)) > 1 else x


def total(p: Program, x: fx.Node) -> fx.Node:
    return p(aten.sum.dim_IntList, x, [dim_of(p, x)], True)


def spread(p: Program, x: fx.Node) -> fx.Node:
    shape = shape_of(x)
    at = p.draw(st.integers(0, len(shape)))
    shape.insert(at, p.draw(st.integers(1, 3)))
    return p(aten.expand.default, p(aten.unsqueeze.default, x, at), shape)


def repeat(p: Program, x: fx.Node) -> fx.Node:
    return p(aten.repeat.default, x, [p.draw(st.integers(1, 2)) for _ in shape_of(x)])


def interleave(p: Program, x: fx.Node) -> fx.Node:
    return p(aten.repeat_interleave.self_int, x, 2, dim_of(p, x))


def glu(p: Program, x: fx.Node) -> fx.Node:
    even = [d for d, s in enumerate(shape_of(x)) if s % 2 == 0]
    return p(aten.glu.default, x, p.draw(st.sampled_from(even))) if even else x


def select(p: Program, x: fx.Node) -> fx.Node:
    dim = dim_of(p, x)
    order = torch.tensor(p.draw(st.permutations(range(shape_of(x)[dim]))))
    return p(aten.index_select.default, x, dim, order)


def pad(p: Program, x: fx.Node) -> fx.Node:
    return p(aten.constant_pad_nd.default, x, [p.draw(st.integers(0, 2)) for _ in range(2)])


def normalise(p: Program, x: fx.Node) -> fx.Node:
    shape = shape_of(x)
    if len(shape) > 1 and p.draw(st.booleans()):
        return p(aten.group_norm.default, x, divisor(p, shape[1]), p.plain(shape[1]))
    return p(aten.layer_norm.default, x, shape[-1:], p.plain(shape[-1]))


def flatten(p: Program, x: fx.Node) -> fx.Node:
    return p(aten.flatten.using_ints, x, p.draw(st.integers(0, len(shape_of(x)) - 1)))


def squeeze(p: Program, x: fx.Node) -> fx.Node:
    y = p(aten.squeeze.default, x)
    return y if shape_of(y) else x


def softmax(p: Program, x: fx.Node) -> fx.Node:
    return p(aten.softmax.int, x, dim_of(p, x))


def unfold(p: Program, x: fx.Node) -> fx.Node:
    shape = shape_of(x)
    dim = dim_of(p, x)
    rows = divisor(p, shape[dim])
    return p(aten.unflatten.int, x, dim, [rows, -1])


STEPS: list[Step] = [
    reshape, split_heads, transpose, cat, split, slice_, rotate, linear, convolution, add, gram, total,
    spread, repeat, interleave, glu, select, pad, normalise, flatten, squeeze, softmax, unfold,
]  # fmt: skip


def chain(p: Program, length: int) -> None:
    """Random steps, each on a value made before."""
    pool = [p.plain(2, 6, 4), p.plain(12), p.plain(4, 6)]
    for _ in range(length):
        x = p.draw(st.sampled_from(pool[-4:]))
        made = p.draw(st.sampled_from(STEPS))(p, x)
        for node in made if isinstance(made, list) else [made]:
            if node not in pool and 0 < prod(shape_of(node)) <= LARGEST and len(shape_of(node)) < 5:
                pool.append(node)


@pytest.mark.parametrize("length", [2, 4, 8, 12])
@oracle(examples=50)
def test_chains(length: int, data: st.DataObject, seed: int) -> None:
    program = Program(data.draw)
    chain(program, length)
    check(program, seed)


def test_chains_leave_something_to_remove() -> None:
    """The oracle says nothing about a graph in which everything is frozen."""
    free = []

    @oracle(examples=40)
    def run(data: st.DataObject, seed: int) -> None:
        program = Program(data.draw)
        chain(program, 4)
        typing = check(program, seed)
        atoms = {a for d in typing.tensors.values() for t in terms(d) for a in leaves(t)}
        free.append(sum(a.frozen is None and a.statistical is None for a in atoms))

    run()
    assert sum(count > 0 for count in free) > 0.9 * len(free)
    assert sum(free) / len(free) > 3
