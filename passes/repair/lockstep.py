"""The original and the pruned network side by side, and what is repaired on the way.

Both advance operator by operator over all batches at once, to the next operator that can be repaired;
there its unit looks at both, settles, and the pruned network goes on with what came of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from graphprune.passes.affine import Refusal
from torch import fx

from graphprune.calibration import Call
from graphprune.graph import Graph
from graphprune.runner import Runner

from .match import Cut, Unit, Units
from .mixing import Mix
from .relevance import relevance
from .rows import operands
from .targets import Target
from .units import Record, Refit


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
        self._relevance = relevance(cut.original, calls, seed)
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
        units, place = self._found.units, self._found.place
        for number in todo:
            units[number].begin(self._work, self._seed + number)
        order = sorted((node for number in todo for node in units[number].nodes), key=place.__getitem__)
        targets = {node: self._found.target(node) for node in order}
        mixed = [units[n].source for n in todo if isinstance(units[n], Mix)]  # type: ignore[union-attr]
        wanted = [n for target in targets.values() for n in target.before]
        before = Runner(self._cut.original, self._calls, [*wanted, *mixed])
        after = Runner(self._work, self._calls, [n for t in targets.values() for n in t.after])
        left = set(todo)
        for node in order:
            number = self._found.of[node]
            unit = units[number]
            target = targets[node]
            for point in target.before:
                before.advance(point)
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
            for done in (*target.before, *([unit.source] if isinstance(unit, Mix) else [])):
                before.release(done)
            for done in target.after:
                after.release(done)
        return set()

    def _stale(self, shared: Unit, order: list[fx.Node]) -> set[int]:
        """What was settled, by itself, between the first and the last use of something shared."""
        place = self._found.place
        first, last = place[shared.nodes[0]], place[shared.nodes[-1]]
        between = {self._found.of[node] for node in order if first < place[node] < last}
        return {n for n in between - self._out if len(self._found.units[n].nodes) == 1}

    def _observe(self, unit: Unit, node: fx.Node, target: Target, before: Runner, after: Runner) -> None:
        source: Any = operands(node)[0] if isinstance(unit, Refit) else node.args[0]
        originals = [before.values(n) for n in target.before]
        others = [after.values(n) for n in target.after]
        if isinstance(unit, Mix):
            for x, full in zip(after.values(source), before.values(unit.source), strict=True):
                unit.read(x, full)
            unit.mix()
        for batch, x in enumerate(after.values(source)):
            cut = [
                self._cut.value(n, values[batch]) for n, values in zip(target.before, originals, strict=True)
            ]
            wanted, whole = target.value(cut, [values[batch] for values in others])
            if isinstance(unit, Mix):
                unit.compare(wanted, whole, partial(after.compute, node, batch))
            elif isinstance(unit, Refit):
                masks = self._relevance.get(node.name)
                matters = None if masks is None else masks[batch]
                unit.observe(node, x, wanted, whole, partial(after.compute, node, batch), matters)
            else:
                unit.observe(x, wanted)

    def _settle(self, number: int, left: set[int]) -> None:
        record = self._found.units[number].settle(self._work)
        left.discard(number)
        self.records.pop(number, None)
        if record is not None:
            self.records[number] = record
