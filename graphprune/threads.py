"""How many threads a runtime may be given, and torch's intra-operator threads, set for a while.

>>> import torch
>>> before = torch.get_num_threads()
>>> with torch_threads(3) as used:
...     torch.get_num_threads() == used == 3
True
>>> torch.get_num_threads() == before
True
>>> checked(3), checked(None)
(3, None)
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import InputError


def most() -> int:
    """The largest number of threads that is taken: 8 for every core, and at least 64.

    More never makes a network faster, and runtimes start all they are told to: thousands take minutes, and
    a million takes the machine's memory.
    """
    return max(64, 8 * (os.cpu_count() or 1))


def checked(threads: Any) -> int | None:
    """``threads``, or an :class:`InputError` where it is no whole number from 1 to :func:`most`."""
    if threads is None:
        return None
    try:
        count = None if isinstance(threads, bool) else operator.index(threads)
    except TypeError:
        count = None
    if count is None:
        raise InputError(
            f"threads must be a whole number, or None for the runtime's default, got {threads!r}"
        )
    if count < 1:
        raise InputError(f"threads must be at least 1, got {count}")
    if count > most():
        raise InputError(
            f"threads must be at most {most()} on this host, which has {os.cpu_count()} cores, got {count}"
        )
    return count


@contextmanager
def torch_threads(count: int | None) -> Iterator[int]:
    """Torch computes with so many threads inside; ``None`` leaves them. Gives the number there is.

    Raises:
        InputError: see :func:`checked`.
    """
    before, count = torch.get_num_threads(), checked(count)
    if count is None or count == before:
        yield before
        return
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)
