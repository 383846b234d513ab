"""The original and the pruned network side by side, and what is repaired on the way.

Both advance operator by operator over all batches at once, to the next operator that can be repaired;
there its unit looks at both, settles, and the pruned network goes on with what came of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from graphprune.passes.affine import Refusal
from torch import fx

from graphprune.calibration import Call
from graphprune.graph import Graph
from graphprune.runner import Runner

from .match import Cut, Unit, Units
from .rows import operands
from .units import Record, Refit

aten = torch.ops.aten


class Lockstep:
    """Both networks side by side.

    A weight that several operators share is settled at the last of them. What was computed with the
    weight as it was before is stale then, so both networks start over, and what lies between the first
    and the last is repaired again.

    Attributes:
        records: by the unit's number.
        refused: how many units refused on the way.
    """

    def __init__(self, cut: Cut, work: Graph, calls: Sequence[Call], found: Units, seed: int):
        self._cut, self._work, self._calls, self._found, self._seed = cut, work, calls, found, seed
        self.records: dict[int, Record] = {}
        self._out: set[int] = set()

    @property
    def refused(self) -> int:
        return len(self._out)

    def sweep(self) -> None:
        """Settle every unit once."""
        todo = set(range(len(self._found.units))) - self._out
        while todo:
            todo = self._run(todo)

    def _run(self, todo: set[int]) -> set[int]:
        """Settle what is to do, in order; what is left to do after a shared weight changed."""
        units, twin, place = self._found.units, self._found.twin, self._found.place
        for number in todo:
            units[number].begin(self._work, self._seed + number)
        order = sorted((node for number in todo for node in units[number].nodes), key=place.__getitem__)
        before = Runner(self._cut.original, self._calls, [_target(twin[node]) for node in order])
        after = Runner(self._work, self._calls)
        left = set(todo)
        for node in order:
            number = self._found.of[node]
            unit = units[number]
            target = _target(twin[node])
            before.advance(target)
            after.advance(node, inclusive=False)
            try:
                if number in left:
                    self._observe(unit, node, target, before, after)
                if number in left and node is unit.nodes[-1]:
                    self._settle(number, left)
                    again = left | self._stale(unit, order) if len(unit.nodes) > 1 else set()
                    if again:
                        return again
            except Refusal as refusal:
                left.discard(number)
                self._out.add(number)
                self._found.refuse(unit.nodes, refusal)
            before.release(target)
        return set()

    def _stale(self, shared: Unit, order: list[fx.Node]) -> set[int]:
        """What was settled, by itself, between the first and the last use of something shared."""
        place = self._found.place
        first, last = place[shared.nodes[0]], place[shared.nodes[-1]]
        between = {self._found.of[node] for node in order if first < place[node] < last}
        return {n for n in between - self._out if len(self._found.units[n].nodes) == 1}

    def _observe(self, unit: Unit, node: fx.Node, target: fx.Node, before: Runner, after: Runner) -> None:
        source: Any = operands(node)[0] if isinstance(unit, Refit) else node.args[0]
        for batch, (x, wanted) in enumerate(zip(after.values(source), before.values(target), strict=True)):
            wanted = self._cut.value(target, wanted)
            if isinstance(unit, Refit):
                unit.observe(node, x, wanted, partial(after.compute, node, batch))
            else:
                unit.observe(x, wanted)

    def _settle(self, number: int, left: set[int]) -> None:
        record = self._found.units[number].settle(self._work)
        left.discard(number)
        self.records.pop(number, None)
        if record is not None:
            self.records[number] = record


def _target(twin: fx.Node) -> fx.Node:
    """What a unit is compared with: a batch norm's input, any other operator's result."""
    return twin.args[0] if twin.target is aten.batch_norm.default else twin  # type: ignore[return-value]
