"""Reshapes, permutations, concatenations and their inverses, by the oracle."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from .oracle import Cases, Program, check, oracle, shapes

aten = torch.ops.aten
CASES = Cases()


def dim_of(p: Program, rank: int) -> int:
    """A dimension, counted from either end."""
    return p.draw(st.integers(-rank, rank - 1))


def regrouped(p: Program, total: int) -> list[int]:
    """A shape with that many elements."""
    shape: list[int] = []
    while total > 1:
        size = p.draw(st.sampled_from([d for d in range(1, total + 1) if total % d == 0]))
        shape.append(size)
        total //= size
        if len(shape) == 4:
            shape[-1] *= total
            break
    return shape or [1]


@CASES.of("view reshape _unsafe_view")
def view(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    new = regrouped(p, prod(shape))
    known = p.draw(st.booleans())
    p(target, p(aten.contiguous.default, p.operand(*shape)), new if known else [-1, *new[1:]])


@CASES.of("view_as reshape_as")
def view_as(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    x = p(aten.contiguous.default, p.operand(*shape))
    p(target, x, p.operand(*regrouped(p, prod(shape))))


@CASES.of("flatten.using_ints ravel")
def flatten(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    start = p.draw(st.integers(0, len(shape) - 1))
    end = p.draw(st.integers(start, len(shape) - 1)) - len(shape)
    p(target, p.operand(*shape), *(() if target is aten.ravel.default else (start, end)))


@CASES.of("squeeze unsqueeze squeeze.dim squeeze.dims")
def squeeze(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    arguments: dict[Any, Any] = {
        aten.squeeze.dim: (dim_of(p, len(shape)),),
        aten.squeeze.dims: (p.draw(st.lists(st.integers(0, len(shape) - 1), unique=True)),),
        aten.unsqueeze.default: (p.draw(st.integers(-len(shape) - 1, len(shape))),),
    }
    p(target, p.operand(*shape), *arguments.get(target, ()))


@CASES.of("unflatten.int")
def unflatten(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    dim = dim_of(p, len(shape))
    new = regrouped(p, shape[dim])
    p(target, p.operand(*shape), dim, new if p.draw(st.booleans()) else [*new[:-1], -1])


@CASES.of("permute")
def permute(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    order = p.draw(st.permutations(range(len(shape))))
    p(target, p.operand(*shape), [d - p.draw(st.sampled_from((0, len(shape)))) for d in order])


@CASES.of("transpose.int swapaxes swapdims t numpy_T mT matrix_H adjoint")
def transpose(p: Program, target: Any) -> None:
    least, most = {"t": (1, 2), "mT": (2, 3), "matrix_H": (2, 2), "adjoint": (2, 3)}.get(
        target._schema.name.removeprefix("aten::"), (1, 3)
    )
    # Turning all dimensions round is deprecated for any number but two.
    shape = p.draw(shapes(2, 2) if target is aten.numpy_T.default else shapes(least, most))
    named = "t" in target._schema.name and len(target._schema.arguments) == 3
    p(target, p.operand(*shape), *((dim_of(p, len(shape)), dim_of(p, len(shape))) if named else ()))


@CASES.of("movedim.int movedim.intlist moveaxis.int moveaxis.intlist")
def movedim(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    if target._overloadname == "int":
        p(target, p.operand(*shape), dim_of(p, len(shape)), dim_of(p, len(shape)))
        return
    count = p.draw(st.integers(1, len(shape)))
    source, goal = (p.draw(st.permutations(range(len(shape))))[:count] for _ in range(2))
    p(target, p.operand(*shape), source, goal)


@CASES.of("expand broadcast_to expand_copy expand_as")
def expand(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    small = [1 if p.draw(st.booleans()) else s for s in shape][p.draw(st.integers(0, len(shape) - 1)) :]
    if target is aten.expand_as.default:
        p(target, p.operand(*small), p.operand(*shape))
        return
    new = [-1 if i >= len(shape) - len(small) and s == small[i - len(shape)] and p.draw(st.booleans()) else s
           for i, s in enumerate(shape)]  # fmt: skip
    result = p(target, p.operand(*small), new)
    p(aten.mul.Tensor, result, p.operand(*shape))


@CASES.of("repeat tile")
def repeat(p: Program, target: Any) -> None:
    shape = p.draw(shapes(1, 2))
    least = 1 if target is aten.tile.default else len(shape)
    counts = p.draw(st.lists(st.integers(1, 3), min_size=least, max_size=3))
    result = p(target, p.operand(*shape), counts)
    if p.draw(st.booleans()):
        p(aten.mul.Tensor, result, p.operand(*result.meta["val"].shape))


@CASES.of("repeat_interleave.self_int")
def repeat_interleave(p: Program, target: Any) -> None:
    shape = p.draw(shapes(1, 2))
    dim = p.draw(st.sampled_from((None, *range(-len(shape), len(shape)))))
    count = p.draw(st.integers(1, 3))
    total = count * (prod(shape) if dim is None else shape[dim])
    named = p.draw(st.sampled_from(({}, {"output_size": total})))
    result = p(target, p.operand(*shape), count, dim, **named)
    p(aten.mul.Tensor, result, p.operand(*result.meta["val"].shape))


@CASES.of("pixel_shuffle pixel_unshuffle")
def pixel_shuffle(p: Program, target: Any) -> None:
    channels = p.draw(st.integers(1, 4))
    shape = (channels * 4, 3, 2) if target is aten.pixel_shuffle.default else (channels, 6, 4)
    p(target, p.operand(*p.draw(st.sampled_from(((), (2,)))), *shape), 2)


@CASES.of("channel_shuffle native_channel_shuffle")
def channel_shuffle(p: Program, target: Any) -> None:
    p(
        target,
        p(aten.contiguous.default, p.operand(2, 12, 3, 2)),
        p.draw(st.sampled_from((1, 2, 3, 4, 6, 12))),
    )


@CASES.of("view_as_real view_as_complex")
def complex_view(p: Program, target: Any) -> None:
    pairs = p(aten.view_as_complex.default, p(aten.clone.default, p.operand(4, 3, 2)))
    if target is aten.view_as_real.default:
        p(target, pairs)


@CASES.of("cat concat concatenate")
def cat(p: Program, target: Any) -> None:
    shape = list(p.draw(shapes()))
    dim = dim_of(p, len(shape))
    operands = []
    for _ in range(p.draw(st.integers(1, 3))):
        shape[dim] = p.draw(st.integers(1, 4))
        operands.append(p.operand(*shape))
    if p.draw(st.booleans()):
        operands.append(operands[0])
    result = p(target, operands, *([] if dim == 0 and p.draw(st.booleans()) else [dim]))
    if p.draw(st.booleans()):
        p(aten.mul.Tensor, result, p.operand(*result.meta["val"].shape))


@CASES.of("stack")
def stack(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    operands = [p.operand(*shape) for _ in range(p.draw(st.integers(1, 3)))]
    p(target, operands, *p.draw(st.sampled_from(((), (len(shape),), (-1,), (-2,)))))


@CASES.of("unbind.int select.int")
def taken_apart(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    dim = dim_of(p, len(shape))
    if target is aten.select.int:
        p(target, p.operand(*shape), dim, p.draw(st.integers(-shape[dim], shape[dim] - 1)))
    else:
        p.parts(p(target, p.operand(*shape), dim))


@CASES.of("split.Tensor split_with_sizes split.sizes chunk tensor_split.sections unsafe_chunk")
def split(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    dim = dim_of(p, len(shape))
    size = shape[dim]
    by: Any = p.draw(st.integers(1, size))
    if target in (aten.split_with_sizes.default, aten.split.sizes):
        at = sorted(p.draw(st.lists(st.integers(0, size), max_size=3)))
        by = [high - low for low, high in zip([0, *at], [*at, size], strict=True)]
    pieces = p.parts(p(target, p.operand(*shape), by, dim))
    if p.draw(st.booleans()):
        p(aten.cat.default, pieces[::-1], dim)


@CASES.of("slice.Tensor narrow")
def slice_(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    dim = dim_of(p, len(shape))
    size = shape[dim]
    x = p.operand(*shape)
    if target is aten.narrow.default:
        start = p.draw(st.integers(0, size))
        p(target, x, dim, start, p.draw(st.integers(0, size - start)))
        return
    bounds = st.none() | st.integers(-size - 2, size + 2)
    p(target, x, dim, p.draw(bounds), p.draw(bounds), p.draw(st.integers(1, 3)))


@CASES.of("slice_scatter select_scatter")
def scatter_slice(p: Program, target: Any) -> None:
    shape = p.draw(shapes(1, 3))
    dim = dim_of(p, len(shape))
    rest = [s for i, s in enumerate(shape) if i != dim % len(shape)]
    base = p.operand(*shape)
    at = p.draw(st.integers(0, shape[dim] - 1))
    if target is aten.select_scatter.default:
        p(target, base, p.operand(*rest), dim, at)
    else:
        rest.insert(dim % len(shape), shape[dim] - at)
        p(target, base, p.operand(*rest), dim, at, shape[dim])


@CASES.of("constant_pad_nd pad")
def pad(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    pairs = p.draw(st.integers(1, len(shape)))
    amounts = []
    for place in range(pairs):
        least = -((shape[-1 - place] - 1) // 2)
        amounts += [p.draw(st.integers(least, 2)), p.draw(st.integers(least, 2))]
    extra = (("constant",) if target is aten.pad.default else ()) + (1.5,)
    p(target, p.operand(*shape), amounts, *p.draw(st.sampled_from(((), extra))))


@CASES.of(
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d"
)
def border(p: Program, target: Any) -> None:
    rank = int(target._schema.name[-2])
    p(target, p.operand(2, 3, *[4] * rank), [p.draw(st.integers(0, 2)) for _ in range(2 * rank)])


@CASES.of("glu")
def glu(p: Program, target: Any) -> None:
    shape = list(p.draw(shapes()))
    dim = dim_of(p, len(shape))
    shape[dim] = 2 * p.draw(st.integers(1, 4))
    p(target, p.operand(*shape), dim)


@CASES.of("""flip roll tril triu rot90 cumsum cumprod sort sort.stable argsort topk msort diff
             logcumsumexp fft_fft fft_ifft""")
def ordered(p: Program, target: Any) -> None:
    shape = p.draw(shapes(2, 3))
    dim = dim_of(p, len(shape))
    name = str(target).removeprefix("aten.").removesuffix(".default")
    arguments: dict[str, Any] = {
        "flip": ([dim],), "roll": p.draw(st.sampled_from((([1], [dim]), ([1],)))), "tril": (1,), "triu": (),
        "rot90": (1, [0, 1]), "cumsum": (dim,), "cumprod": (dim,), "logcumsumexp": (dim,), "topk": (1, dim),
        "diff": (1, dim), "fft_fft": (None, dim), "fft_ifft": (None, dim), "argsort": (dim,),
    }  # fmt: skip
    x = p.operand(*shape)
    if name == "sort":
        p.parts(p(target, x, dim))
    elif name == "sort.stable":
        p.parts(p(target, x, stable=True, dim=dim))
    elif name == "topk":
        p.parts(p(target, x, 1, dim))
    else:
        p(target, x, *arguments.get(name, ()))


@pytest.mark.parametrize("target", CASES, ids=str)
@oracle(examples=16)
def test_slices(target: Any, data: st.DataObject, seed: int) -> None:
    program = Program(data.draw)
    CASES[target](program, target)
    check(program, seed)
