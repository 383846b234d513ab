"""Look-ups, pooling, resampling and patches, by the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from .oracle import Cases, Program, check, oracle, shapes

aten = torch.ops.aten
CASES = Cases()


def positions(p: Program, size: int, *shape: int) -> torch.Tensor:
    """Random positions of a dimension."""
    count = 1
    for s in shape:
        count *= s
    return torch.tensor(p.draw(st.lists(st.integers(0, size - 1), min_size=count, max_size=count))).reshape(
        shape
    )


@CASES.of("embedding")
def embedding(p: Program, target: Any) -> None:
    rows, width = p.draw(st.integers(1, 6)), p.draw(st.integers(1, 6))
    p(target, p.operand(rows, width), positions(p, rows, *p.draw(shapes(0, 2))))


@CASES.of("index.Tensor _unsafe_index.Tensor")
def index(p: Program, target: Any) -> None:
    shape = p.draw(shapes(1, 4))
    chosen = p.draw(st.lists(st.booleans(), min_size=1, max_size=len(shape)).filter(any))
    count = p.draw(st.integers(1, 4))
    rank = p.draw(st.integers(1, 2))
    indices: list[Any] = [
        positions(p, size, *[1] * (rank - 1), p.draw(st.sampled_from((1, count)))) if here else None
        for size, here in zip(shape, chosen, strict=False)
    ]
    if p.draw(st.booleans()):
        indices = [i if i is None else i - s for i, s in zip(indices, shape, strict=False)]
    result = p(target, p.operand(*shape), indices)
    p(aten.mul.Tensor, result, p.operand(*result.meta["val"].shape))


@CASES.of("index_select")
def index_select(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    dim = p.draw(st.integers(-len(shape), len(shape) - 1))
    x = p.operand(*shape)
    chosen = positions(p, shape[dim], p.draw(st.integers(1, 6)))
    if p.draw(st.booleans()):  # a permutation that is known
        chosen = torch.tensor(p.draw(st.permutations(range(shape[dim]))))
    if p.draw(st.booleans()):  # positions that are computed
        p(target, x, dim, p(aten.abs.default, chosen))
    else:
        result = p(target, x, dim, chosen)
        p(aten.mul.Tensor, result, p.operand(*result.meta["val"].shape))


@CASES.of("gather take_along_dim")
def gather(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    dim = p.draw(st.integers(-len(shape), len(shape) - 1))
    full = p.draw(st.booleans())
    places = [
        s if full or target is aten.take_along_dim.default else p.draw(st.integers(1, s)) for s in shape
    ]
    places[dim] = p.draw(st.integers(1, 4))
    if target is aten.take_along_dim.default:
        places = [1 if i != dim % len(shape) and p.draw(st.booleans()) else s for i, s in enumerate(places)]
    chosen = positions(p, shape[dim], *places)
    index: Any = chosen
    if p.draw(st.booleans()):  # computed from a parameter, so that it may lose positions, too
        index = p(aten.to.dtype, p(aten.mul.Scalar, p(aten.abs.default, p.operand(*places)), 0), torch.int64)
    arguments = (index, dim) if target is aten.take_along_dim.default else (dim, index)
    p(target, p.operand(*shape), *arguments)


@CASES.of("one_hot")
def one_hot(p: Program, target: Any) -> None:
    p(target, positions(p, 4, 3), 4)


@CASES.of("""avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool2d_with_indices
    max_pool3d_with_indices max_pool1d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d _adaptive_avg_pool2d""")
def pool(p: Program, target: Any) -> None:
    rank = next(r for r in (1, 2, 3) if f"{r}d" in str(target))
    batch = () if target is aten._adaptive_avg_pool2d.default else p.draw(st.sampled_from(((), (2,))))
    node = p(target, p.operand(*batch, 4, *[4] * rank), [2] * rank)
    if isinstance(node.meta["val"], tuple):
        p.parts(node)


@CASES.of("""upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_nearest1d.vec
    upsample_nearest2d.vec upsample_nearest3d.vec upsample_linear1d upsample_linear1d.vec
    upsample_bilinear2d upsample_bilinear2d.vec upsample_bicubic2d upsample_bicubic2d.vec
    upsample_trilinear3d upsample_trilinear3d.vec _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    _upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec _upsample_nearest_exact2d
    _upsample_nearest_exact2d.vec _upsample_nearest_exact1d.vec""")
def resample(p: Program, target: Any) -> None:
    rank = next(r for r in (1, 2, 3) if f"{r}d" in str(target))
    corners = [] if "nearest" in str(target) else [False]
    scale = [None] if target._overloadname == "vec" else []
    p(target, p.operand(2, 4, *[3] * rank), [5] * rank, *corners, *scale)


@CASES.of("grid_sampler grid_sampler_2d grid_sampler_3d")
def grid_sampler(p: Program, target: Any) -> None:
    rank = 3 if target is aten.grid_sampler_3d.default else 2
    grid = p(aten.tanh.default, p.operand(2, *[4] * rank, rank))
    p(target, p.operand(2, 4, *[3] * rank), grid, 0, 0, False)


@CASES.of("im2col col2im")
def patches(p: Program, target: Any) -> None:
    batch = p.draw(st.sampled_from(((), (2,))))
    extra = ([2, 2], [1, 1], [0, 0], [1, 1])
    if target is aten.im2col.default:
        p(target, p.operand(*batch, 3, 4, 4), *extra)
    else:
        p(target, p.operand(*batch, 12, 9), [4, 4], *extra)


@CASES.of("unfold")
def unfold(p: Program, target: Any) -> None:
    shape = p.draw(shapes())
    dim = p.draw(st.integers(-len(shape), len(shape) - 1))
    p(target, p.operand(*shape), dim, p.draw(st.integers(1, shape[dim])), p.draw(st.integers(1, 2)))


@pytest.mark.parametrize("target", CASES, ids=str)
@oracle(examples=16)
def test_slices(target: Any, data: st.DataObject, seed: int) -> None:
    program = Program(data.draw)
    CASES[target](program, target)
    check(program, seed)
