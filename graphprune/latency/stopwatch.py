"""Single operators, timed: lowered and opened as a network of its own, in turns with a reference.

Other work on the machine, and its clock, change how long everything takes from one minute to the next. So
each operator takes turns with one and the same convolution, and what counts is the quotient; times of
different days stand in one table. Several openings of the operator take turns, so that its weights are not
in a cache that the rest of a network would have emptied.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..backend import Backend
from ..blocks import Block, Sizes
from ..frontend.capture import capture
from ..graph import Graph
from ..lowering import opened
from ..pipeline import LOSSLESS, Context, Pipeline
from ..sittings import in_sittings
from ..target import Target
from .goal import quartiles
from .table import Entry, Table

ROUNDS = 9
TURN = 0.01  # seconds
EFFORT = 3  # times as many rounds while the quartiles are wide apart
SPREAD = 0.1  # of the median
COPIES = 8
CACHE = 16 * 2**20  # bytes that the copies' weights take together, as far as copies go
NOTHING = "nothing"  # the table's key of a network that does nothing


@dataclass
class Stopwatch:
    """Measures blocks into a table.

    Attributes:
        table: where times go.
        backend, target, threads: what runs them.
    """

    table: Table
    backend: Backend
    target: Target
    threads: int | None
    rounds: int = ROUNDS
    turn: float = TURN
    _reference: Callable[[], Any] | None = field(default=None, repr=False)

    def measure(self, block: Block, sizes: Sizes, text: str) -> Entry:
        """Time a block at these sizes and keep it.

        Raises:
            BackendError: the runtime cannot run it alone.
        """
        return self._keep(text, block.label, block.graph(sizes))

    def nothing(self) -> float:
        """Milliseconds of a call that computes nothing; measured unless it is known."""
        known = self.table.get(NOTHING)
        if known is None:
            known = self._keep(NOTHING, "a call", nothing())
        return known.ms

    def _keep(self, text: str, label: str, graph: Graph) -> Entry:
        reference = self._opened_reference()
        call = self._open(graph, _copies(graph))
        shares: list[float] = []
        for _ in range(EFFORT):
            timings = in_sittings(
                {"block": lambda: call, "reference": lambda: reference},
                rounds=self.rounds, sittings=1, turn=self.turn, threads=self.threads,
            )  # fmt: skip
            unit = self.table.begin(timings["reference"].median_ms)
            pairs = zip(timings["block"].samples, timings["reference"].samples, strict=True)
            shares += [ours / theirs for ours, theirs in pairs]
            found = quartiles(sorted(shares))
            if found.high - found.low <= SPREAD * found.median:
                break
        entry = Entry(text, label, found.median * unit, found.low * unit, found.high * unit, len(shares))
        self.table.put(entry)
        return entry

    def _opened_reference(self) -> Callable[[], Any]:
        if self._reference is None:
            torch_state = torch.get_rng_state()
            torch.manual_seed(0)
            module = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()).eval()
            self._reference = self._open(capture(module, (torch.randn(1, 64, 28, 28),)))
            torch.set_rng_state(torch_state)
        return self._reference

    def _open(self, graph: Graph, copies: int = 1) -> Callable[[], Any]:
        graph = Pipeline.parse(LOSSLESS).run(graph, Context(self.target)).graph
        lowered = self.backend.lower(graph, self.target)
        runners = [opened(self.backend, lowered, self.target, self.threads) for _ in range(copies)]
        turns = itertools.cycle(runners)
        return lambda: next(turns)(*graph.examples)


def _copies(graph: Graph) -> int:
    """How many openings take turns, so that weights come from memory as they do within a whole network."""
    weights = sum(value.numel() * value.element_size() for value in graph.tensors.values())
    return min(COPIES, math.ceil(CACHE / weights)) if weights else 1


def nothing() -> Graph:
    """A network that computes next to nothing."""
    return capture(nn.ReLU().eval(), (torch.ones(1, 4),))
