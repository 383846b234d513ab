"""Weights in the order in which the inner loops read them.

>>> import numpy as np
>>> pack_filters(np.ones((20, 8, 3, 3), "float32"), groups=1, v=16, u=16)[0].shape
(2, 1, 3, 3, 16, 16)
>>> pack_filters(np.ones((32, 4, 3, 3), "float32"), groups=8, v=16, u=16)[1]  # four groups make a block
2
"""

from __future__ import annotations

import math

import numpy as np


def _fill(array: np.ndarray, axis: int, multiple: int, value: float = 0.0) -> np.ndarray:
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    widths = [(0, missing if i == axis else 0) for i in range(array.ndim)]
    return np.pad(array, widths, constant_values=value)


def pack_filters(weight: np.ndarray, groups: int, v: int, u: int) -> tuple[np.ndarray, int]:
    """``[O/v, I/u, kh, kw, u, v]`` of ``[O, I/groups, kh, kw]``, and in how many groups it then is.

    Groups that are not whole blocks are taken together, with zeros between them, until they are.
    """
    out, per_group, kh, kw = weight.shape
    rows = out // groups
    together = next(
        (m for m in range(1, groups) if groups % m == 0 and m * per_group % u == 0 and m * rows % v == 0),
        groups,
    )
    wide = np.zeros((out, together * per_group, kh, kw), weight.dtype)
    for group in range(groups):
        place = group % together
        wide[group * rows : (group + 1) * rows, place * per_group : (place + 1) * per_group] = weight[
            group * rows : (group + 1) * rows
        ]
    wide = _fill(_fill(wide, 0, v), 1, u)
    shaped = wide.reshape(wide.shape[0] // v, v, wide.shape[1] // u, u, kh, kw)
    return np.ascontiguousarray(shaped.transpose(0, 2, 4, 5, 3, 1)), groups // together


def pack_depthwise(weight: np.ndarray, v: int) -> np.ndarray:
    """``[C/v, kh, kw, v]`` of ``[C, 1, kh, kw]``."""
    filled = _fill(weight[:, 0], 0, v)
    return np.ascontiguousarray(filled.reshape(-1, v, *filled.shape[1:]).transpose(0, 2, 3, 1))


def lanes(outputs: int, v: int) -> int:
    """How many neighbouring outputs a vector of a linear holds: *v*, or a half or quarter that divides
    them."""
    whole = [w for w in (v, v // 2, v // 4) if w >= 4 and outputs % w == 0]
    return whole[0] if whole else v


def pack_dense(weight: np.ndarray, v: int) -> np.ndarray:
    """``[O/w, I, w]`` of ``[I, O]``, with ``w`` = :func:`lanes`."""
    w = lanes(weight.shape[1], v)
    filled = _fill(weight, 1, w)
    return np.ascontiguousarray(filled.reshape(filled.shape[0], -1, w).transpose(1, 0, 2))


def per_channel(value: np.ndarray, channels: int, v: int, fill: float) -> np.ndarray | None:
    """An elementwise operand of ``[n, c, h, w]`` as one of the blocked form, or ``None`` if it varies
    otherwise.

    Args:
        fill: stands in the channels that are missing.
    """
    if value.size == 1:
        return value.reshape(())
    shape = (1,) * (4 - value.ndim) + value.shape
    if value.ndim > 4 or math.prod(shape) != channels or shape[1] != channels:
        return None
    return _fill(value.reshape(channels), 0, v, fill).reshape(1, -1, 1, 1, v)
