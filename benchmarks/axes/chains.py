"""Networks of any length, to see how the work on axes grows with the graph."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import graphprune
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


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """The least processor time of several runs, garbage collection off as :mod:`timeit` has it."""
    best = float("inf")
    for _ in range(repeats):
        gc.collect()
        gc.disable()
        try:
            start = time.process_time()
            result = work()
            best = min(best, time.process_time() - start)
        finally:
            gc.enable()
        del result
    return best
