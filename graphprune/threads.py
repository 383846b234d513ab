"""Torch's intra-operator threads, set for a while.

>>> import torch
>>> before = torch.get_num_threads()
>>> with torch_threads(3) as used:
...     torch.get_num_threads() == used == 3
True
>>> torch.get_num_threads() == before
True
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import InputError


def checked(threads: int | None) -> int | None:
    """``threads``, or an :class:`InputError` where no runtime could have so many."""
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, got {threads}")
    return threads


@contextmanager
def torch_threads(count: int | None) -> Iterator[int]:
    """Torch computes with so many threads inside; ``None`` leaves them. Gives the number there is."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield before
        return
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)
