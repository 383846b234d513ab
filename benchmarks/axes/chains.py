"""Networks of any length, to see how the work on axes grows with the graph."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import graphprune
from graphprune.axes.typing import Typing
from graphprune.graph import Graph


class Chain(nn.Module):
    """``x + narrow(relu(widen(x)))`` again and again: eight nodes and one axis a block."""

    def __init__(self, blocks: int):
        super().__init__()
        self.widen = nn.ModuleList(nn.Linear(6, 8) for _ in range(blocks))
        self.narrow = nn.ModuleList(nn.Linear(8, 6) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for widen, narrow in zip(self.widen, self.narrow, strict=True):
            x = x + narrow(torch.relu(widen(x)))
        return x


def chain(nodes: int) -> Graph:
    """A captured chain of about that many nodes."""
    return graphprune.trace(Chain(nodes // 8), torch.zeros(1, 6))


def typing_seconds(length: int, total: int = 20_000, repeats: int = 5) -> float:
    """Least processor time a node, in seconds, of typing chains of one length, ``total`` nodes in all.

    A short chain alone would fit the processor's cache and a long one would not: 100 chains of 200 nodes, 10
    of 2,000 or one of 20,000 are the same work on the same memory, and differ where typing is not linear.
    """
    first = chain(length)
    nodes = len(first.nodes)
    graphs = [first, *(chain(length) for _ in range(max(1, round(total / nodes)) - 1))]
    return seconds(lambda: [Typing(graph) for graph in graphs], repeats) / (nodes * len(graphs))


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """The least processor time of several runs."""
    best = float("inf")
    for _ in range(repeats):
        with own_work():
            start = time.process_time()
            result = work()
            best = min(best, time.process_time() - start)
        del result
    return best


def calls(work: Callable[[], Any]) -> int:
    """How many functions a call calls, Python's and C's: work that no load on the machine changes."""
    count = 0

    def step(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    with own_work():
        sys.setprofile(step)
        try:
            work()
        finally:
            sys.setprofile(before)
    return count


@contextmanager
def own_work() -> Iterator[None]:
    """Garbage collection off, as :mod:`timeit` has it: it would finalize, and call, what others left."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
