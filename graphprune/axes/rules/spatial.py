"""Pooling, resampling and patch extraction: channels pass, extents keep every position."""

from __future__ import annotations

import torch
from torch import fx

from ..terms import Reason, product
from ..typing import Typed, Typing, aten_operators, rule
from .convolution import SPATIAL, windows

aten = torch.ops.aten

_BY_RANK = {"1d": 1, "2d": 2, "3d": 3}


@rule(*aten_operators("""
    avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool2d_with_indices
    max_pool3d_with_indices max_pool1d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d _adaptive_avg_pool2d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_nearest1d.vec
    upsample_nearest2d.vec upsample_nearest3d.vec upsample_linear1d upsample_linear1d.vec
    upsample_bilinear2d upsample_bilinear2d.vec upsample_bicubic2d upsample_bicubic2d.vec
    upsample_trilinear3d upsample_trilinear3d.vec _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    _upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec _upsample_nearest_exact2d
    _upsample_nearest_exact2d.vec _upsample_nearest_exact1d.vec
"""))  # fmt: skip
def resample(t: Typing, node: fx.Node) -> Typed:
    """The trailing one, two or three dimensions are resampled."""
    x = t.of(node.args[0])
    name = str(node.target)
    rank = next(count for mark, count in _BY_RANK.items() if mark in name)
    windows(t, node, x[-rank:])
    value = node.meta["val"]

    def one(v: torch.Tensor) -> Typed:
        return (*x[:-rank], *[t.fixed(s, SPATIAL) for s in v.shape[-rank:]])

    return one(value) if isinstance(value, torch.Tensor) else [one(v) for v in value]


@rule(*aten_operators("grid_sampler grid_sampler_2d grid_sampler_3d"))
def grid_sampler(t: Typing, node: fx.Node) -> Typed:
    """``x [N, C, …]`` read at ``grid [N, …, 2 or 3]``."""
    x, grid = t.of(node.args[0]), t.of(node.args[1])
    windows(t, node, x[2:])
    t.same(x[0], grid[0], node)
    t.freeze(grid[1:], "it holds coordinates", node)
    return (x[0], x[1], *[t.fixed(s, SPATIAL) for s in t.shape(node)[2:]])


@rule(*aten_operators("im2col"))
def im2col(t: Typing, node: fx.Node) -> Typed:
    """``[N, C, H, W] → [N, Product(C, kernel), L]``."""
    x = t.of(node.args[0])
    windows(t, node, x[-2:])
    shape = t.shape(node)
    kernel = t.fixed(shape[-2] // x[-3].size, _PATCH)
    return (*x[:-3], product(x[-3], kernel), t.fixed(shape[-1], SPATIAL))


@rule(*aten_operators("col2im"))
def col2im(t: Typing, node: fx.Node) -> Typed:
    """``[N, Product(C, kernel), L] → [N, C, H, W]``."""
    x = t.of(node.args[0])
    shape = t.shape(node)
    windows(t, node, x[-1:])
    channels, kernel = t.regroup(node, [x[-2]], [shape[-3], x[-2].size // shape[-3]])
    t.freeze(kernel, "positions of a patch", node)
    return (*x[:-2], channels, *[t.fixed(s, SPATIAL) for s in shape[-2:]])


@rule(*aten_operators("unfold"))
def unfold(t: Typing, node: fx.Node) -> Typed:
    """Windows along one dimension become a trailing one."""
    x = t.of(node.args[0])
    dim: int = node.args[1] % len(x)
    windows(t, node, (x[dim],))
    shape = t.shape(node)
    return (*x[:dim], t.fixed(shape[dim], SPATIAL), *x[dim + 1 :], t.fixed(shape[-1], SPATIAL))


_PATCH = Reason("positions of a patch")
