"""Convolution, linear and pooling on blocked channels, as tensor expressions.

Activations of images are ``[n, C/v, h, w, v]``: *v* neighbouring channels stand together, so that one vector
instruction computes them. Weights are packed once, when compiling, into the order in which the inner loops
read
them: ``[O/v, I/v, kh, kw, v, v]`` of a convolution, ``[C/v, kh, kw, v]`` of a depthwise one, ``[O/v, I,
    v]`` of a linear. Missing channels are zeros. (Y. Liu et al., "Optimizing CNN Model Inference on CPUs",
    USENIX ATC 2019, section 3.1, describe the layout; the code is this project's own.)

The functions here only say *what* is computed; :mod:`graphprune.backends.tvm_schedules` says in which order.
Blocks are named for it: ``pad``, the product (one of :data:`PRODUCTS`), ``crop``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import te, tirx

PRODUCTS = ("conv", "depthwise", "dense", "matmul")


def _sizes(tensor: Any) -> list[int]:
    return [int(size) for size in tensor.shape]


def _out(size: int, kernel: int, stride: int, dilation: int, padded: int) -> int:
    return (size + padded - dilation * (kernel - 1) - 1) // stride + 1


def _padded(x: Any, padding: Sequence[int], extra: int, value: float = 0.0) -> Any:
    """``x`` with its rows and columns (axes 2 and 3) padded, and ``extra`` more columns on the right."""
    top, left, bottom, right = padding
    if not (top or left or bottom or right or extra):
        return x
    _, _, h, w, *rest = _sizes(x)
    shape = [*_sizes(x)[:2], h + top + bottom, w + left + right + extra, *rest]

    def at(n: Any, c: Any, i: Any, j: Any, *b: Any) -> Any:
        inside = te.all(i >= top, i < h + top, j >= left, j < w + left)
        return te.if_then_else(inside, x[(n, c, i - top, j - left, *b)], tirx.const(value, x.dtype))

    return te.compute(shape, at, name="pad")


def _cropped(result: Any, axis: int, size: int) -> Any:
    shape = _sizes(result)
    if shape[axis] == size:
        return result
    shape[axis] = size
    return te.compute(shape, lambda *at: result[at], name="crop")


def convolution(
    x: Any, weight: Any, strides: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int = 1, columns: int = 0,
) -> Any:  # fmt: skip
    """``[n, O/v, oh, ow, v]`` of ``x`` ``[n, C/v, h, w, v]`` or, in one group, ``[n, C, h, w]`` with few
    channels.

    Args:
        weight: ``[O/v, I, kh, kw, u, v]``, where *u* input channels are a block of ``x`` (all of them where
            ``x`` is not blocked) and *I* blocks are read by a group.
        padding: top, left, bottom, right.
        groups: each of them whole blocks of input and output.
        columns: computes at least as many columns, and crops them (a width that no tile divides).
    """
    blocked = len(x.shape) == 5
    n, _, h, w, *_ = _sizes(x)
    co, ci, kh, kw, bi, bo = _sizes(weight)
    (sh, sw), (dh, dw) = strides, dilation
    top, left, bottom, right = padding
    oh, ow = _out(h, kh, sh, dh, top + bottom), _out(w, kw, sw, dw, left + right)
    wide = max(ow, columns)
    source = _padded(x, padding, max(0, (wide - 1) * sw + (kw - 1) * dw + 1 - (w + left + right)))
    per_group = co // groups
    rc, rh, rw, rb = (te.reduce_axis((0, size), name) for size, name in
                      ((ci, "rc"), (kh, "rh"), (kw, "rw"), (bi, "rb")))  # fmt: skip

    def at(n_: Any, c: Any, i: Any, j: Any, b: Any) -> Any:
        row, column = i * sh + rh * dh, j * sw + rw * dw
        block = rc if groups == 1 else (c // per_group) * ci + rc
        value = source[n_, block, row, column, rb] if blocked else source[n_, rb, row, column]
        return te.sum(value * weight[c, rc, rh, rw, rb, b], axis=[rc, rh, rw, rb])

    return _cropped(te.compute((n, co, oh, wide, bo), at, name="conv"), 3, ow)


def depthwise(
    x: Any, weight: Any, strides: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    columns: int = 0,
) -> Any:  # fmt: skip
    """``[n, C/v, oh, ow, v]`` of ``x`` ``[n, C/v, h, w, v]`` and one filter ``[C/v, kh, kw, v]`` a
    channel."""
    n, c, h, w, v = _sizes(x)
    _, kh, kw, _ = _sizes(weight)
    (sh, sw), (dh, dw) = strides, dilation
    top, left, bottom, right = padding
    oh, ow = _out(h, kh, sh, dh, top + bottom), _out(w, kw, sw, dw, left + right)
    wide = max(ow, columns)
    source = _padded(x, padding, max(0, (wide - 1) * sw + (kw - 1) * dw + 1 - (w + left + right)))
    rh, rw = te.reduce_axis((0, kh), "rh"), te.reduce_axis((0, kw), "rw")
    made = te.compute(
        (n, c, oh, wide, v),
        lambda n_, c_, i, j, b: te.sum(
            source[n_, c_, i * sh + rh * dh, j * sw + rw * dw, b] * weight[c_, rh, rw, b], axis=[rh, rw]
        ),
        name="depthwise",
    )
    return _cropped(made, 3, ow)


def dense(x: Any, weight: Any, outputs: int, rows: int = 0) -> Any:
    """``[…, m, outputs]`` of ``x`` ``[…, m, k]`` and ``weight`` ``[O/v, k, v]``.

    Args:
        rows: computes at least as many rows (the last one again), and crops them.
    """
    *lead, m, k = _sizes(x)
    blocks, _, v = _sizes(weight)
    wide = max(m, rows)
    rk = te.reduce_axis((0, k), "rk")

    def at(*axes: Any) -> Any:
        *outer, row, column = axes
        there = row if wide == m else te.min(row, m - 1)
        value = x[(*outer, there, rk)]
        return te.sum(value * weight[tirx.floordiv(column, v), rk, tirx.floormod(column, v)], axis=[rk])

    made = te.compute((*lead, wide, blocks * v), at, name="dense")
    made = _cropped(made, len(lead), m)
    return _cropped(made, len(lead) + 1, outputs)


def matmul(a: Any, b: Any, v: int, rows: int = 0) -> Any:
    """``[…, m, n]`` of ``a`` ``[…, m, k]`` and ``b`` ``[…, k, n]``, which is packed in every call.

    Args:
        v: outputs in a vector.
        rows: computes at least as many rows (the last one again), and crops them.
    """
    *lead, m, k = _sizes(a)
    n = _sizes(b)[-1]
    wide = max(m, rows)
    zero = tirx.const(0.0, b.dtype)

    def weight(*at: Any) -> Any:
        *outer, block, row, lane = at
        column = block * v + lane
        value = b[(*outer, row, column)]
        return value if n % v == 0 else te.if_then_else(column < n, value, zero)

    packed = te.compute((*lead, -(-n // v), k, v), weight, name="weights")
    rk = te.reduce_axis((0, k), "rk")

    def at(*axes: Any) -> Any:
        *outer, row, column = axes
        there = row if wide == m else te.min(row, m - 1)
        other = packed[(*outer, tirx.floordiv(column, v), rk, tirx.floormod(column, v))]
        return te.sum(a[(*outer, there, rk)] * other, axis=[rk])

    made = te.compute((*lead, wide, -(-n // v) * v), at, name="matmul")
    return _cropped(_cropped(made, len(lead), m), len(lead) + 1, n)


def pool(
    x: Any, kind: str, kernel: Sequence[int], strides: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], out: Sequence[int], count_padding: bool,
) -> Any:  # fmt: skip
    """Maximum or average over windows of ``x`` ``[n, C/v, h, w, v]``; ``out`` is the size that results.

    A window may reach beyond the padding (``ceil_mode``): what lies there is not counted.
    """
    n, c, h, w, v = _sizes(x)
    (kh, kw), (sh, sw), (dh, dw) = kernel, strides, dilation
    top, left, bottom, right = padding
    more_h = max(0, (out[0] - 1) * sh + (kh - 1) * dh + 1 - (h + top + bottom))
    more_w = max(0, (out[1] - 1) * sw + (kw - 1) * dw + 1 - (w + left + right))
    lowest = float("-inf") if kind == "max" else 0.0
    source = _padded(x, (top, left, bottom + more_h, right), more_w, lowest)
    rh, rw = te.reduce_axis((0, kh), "rh"), te.reduce_axis((0, kw), "rw")
    combine = te.max if kind == "max" else te.sum
    made = te.compute(
        (n, c, *out, v),
        lambda n_, c_, i, j, b: combine(source[n_, c_, i * sh + rh * dh, j * sw + rw * dw, b], axis=[rh, rw]),
        name="pool",
    )
    if kind == "max":
        return made

    def counted(at: Any, stride: int, before: int, size: int, after: int, window: int) -> Any:
        low, high = (-before, size + after) if count_padding else (0, size)
        first = at * stride - before
        return te.min(first + window, high) - te.max(first, low)

    def average(n_: Any, c_: Any, i: Any, j: Any, b: Any) -> Any:
        count = counted(i, sh, top, h, bottom, kh) * counted(j, sw, left, w, right, kw)
        return made[n_, c_, i, j, b] / count.astype("float32")

    return te.compute((n, c, *out, v), average, name="average")


def mean(x: Any) -> Any:
    """``[n, C/v, 1, 1, v]``: the mean of ``x`` ``[n, C/v, h, w, v]`` over rows and columns."""
    n, c, h, w, v = _sizes(x)
    rh, rw = te.reduce_axis((0, h), "rh"), te.reduce_axis((0, w), "rw")
    total = te.compute((n, c, 1, 1, v), lambda n_, c_, i, j, b: te.sum(x[n_, c_, rh, rw, b], axis=[rh, rw]),
                       name="pool")  # fmt: skip
    return te.compute((n, c, 1, 1, v), lambda *at: total[at] * tirx.const(1.0 / (h * w), "float32"),
                      name="average")  # fmt: skip


def pack(x: Any, v: int) -> Any:
    """``[n, ⌈C/v⌉, h, w, v]`` of ``x`` ``[n, C, h, w]``; missing channels are zeros."""
    n, c, h, w = _sizes(x)
    whole = c % v == 0

    def at(n_: Any, b: Any, i: Any, j: Any, within: Any) -> Any:
        channel = b * v + within
        value = x[n_, channel, i, j]
        return value if whole else te.if_then_else(channel < c, value, tirx.const(0.0, x.dtype))

    return te.compute((n, -(-c // v), h, w, v), at, name="pack")


def unpack(x: Any, channels: int) -> Any:
    """``[n, channels, h, w]`` of ``x`` ``[n, C/v, h, w, v]``."""
    n, _, h, w, v = _sizes(x)
    return te.compute(
        (n, channels, h, w),
        lambda n_, c, i, j: x[n_, tirx.floordiv(c, v), i, j, tirx.floormod(c, v)],
        name="unpack",
    )
