"""Sizes of register tiles: which divisors an extent has, and to what it is rounded where none is good.

>>> divisors(56, 28)
[1, 2, 4, 7, 8, 14, 28]
>>> padded_extent(56, 28), padded_extent(37, 28), padded_extent(197, 28)
(56, 38, 198)
"""

from __future__ import annotations


def divisors(extent: int, most: int) -> list[int]:
    """Those of ``extent`` that are at most ``most``, ascending."""
    return [d for d in range(1, min(extent, most) + 1) if extent % d == 0]


def padded_extent(extent: int, most: int) -> int:
    """``extent``, or the next size that a tile of at least half of ``most`` divides, if it has no fair
    divisor.

    A tile of a quarter of the registers keeps the arithmetic units busy enough not to pay for more work.
    """
    if extent <= most or divisors(extent, most)[-1] * 4 >= most:
        return extent
    return min(-(-extent // tile) * tile for tile in range(most // 2, most + 1))
