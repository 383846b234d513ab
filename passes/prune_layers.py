"""Drop residual blocks, those first whose absence is measured to matter least.

In ``y = x + f(x)`` the network still makes sense without ``f`` (:mod:`.residual`); networks trained with such
blocks left out at random can lose many (Fan, Grave and Joulin, *Reducing Transformer Depth on Demand with
Structured Dropout*, ICLR 2020, arXiv 2019), and any network some. There depth is cut by a pattern; here every
block is taken out in turn and the effect measured: how far the outputs move on calibration inputs,

    error = √( Σ ‖y' - y‖² / Σ ‖y‖² ),

or how much ``evaluate`` falls where the caller has one (equal falls are told apart by the error, if there is
calibration). The block with the smallest effect goes, and, being ``greedy``, the rest is measured again, for
of two blocks that do the same work one is needed. To meet a budget the smallest effect for each unit saved
decides.

For a transformer the attention and the feed-forward part are blocks of their own; ``whole`` takes those of
one numbered module (``encoder.layer.3``) together. The outputs change, and by how much is recorded.

>>> import torch, graphprune
>>> from graphprune.pipeline import Context
>>> layer = torch.nn.TransformerEncoderLayer(12, 4, 16, batch_first=True, norm_first=True).eval()
>>> _ = layer.linear2.weight.data.mul_(1e-3), layer.linear2.bias.data.zero_()
>>> graph = graphprune.trace(layer, torch.zeros(2, 5, 12))
>>> result = PruneLayers(layers=1).run(graph, Context(calibration=[torch.randn(2, 5, 12)]))
>>> [note.where for note in result.notes if note.kind == "changed"], "linear1.weight" in result.graph.tensors
(['add_1'], False)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import inf
from typing import ClassVar

from graphprune.calibration import read
from graphprune.cost import cost
from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.pipeline import Context, Note, Pass, PassResult
from graphprune.plans.budget import within
from graphprune.plans.candidates import RESOURCES
from graphprune.plans.plan import make_plan
from graphprune.plans.removal import Removal

from .effect import Effect, Measured
from .residual import Block, drop, residual_blocks

_BUDGETS = ("macs", "params")


@dataclass(frozen=True)
class Candidate:
    """Blocks that go together, and the network without them."""

    blocks: tuple[Block, ...]
    where: str
    without: Graph
    effect: Effect
    saved: int


@dataclass(frozen=True)
class PruneLayers(Pass):
    """Drop residual blocks by measured effect.

    Attributes:
        layers: how many blocks (or layers, with ``whole``) go.
        macs, params: a budget instead, a fraction of what the network has (a float up to 1.0) or an absolute
            number.
        whole: drop all blocks of a numbered module together.
        greedy: measure what is left again after each drop; otherwise only once.
        ignored: blocks that stay, by the name of their sum or the path of the module it is in, or a glob.
        samples: how many samples of the calibration are read.
    """

    name: ClassVar[str] = "prune-layers"
    exact: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    layers: int | None = None
    macs: float | None = None
    params: float | None = None
    whole: bool = False
    greedy: bool = True
    ignored: tuple[str, ...] = ()
    samples: int = 128

    def run(self, graph: Graph, context: Context) -> PassResult:
        """A shallower graph."""
        self._check()
        if graph.is_meta:
            raise PassError(self.name, "it runs the network, and the weights have shapes only")
        if context.calibration is None and context.evaluate is None:
            raise PassError(
                self.name,
                "it measures what each block does: pass calibration= (inputs, without labels) or evaluate=",
            )
        data = None if context.calibration is None else read(graph, context.calibration, self.samples)
        measure = Measured(graph, data.calls if data is not None else (), context.evaluate)
        limit = self._limit(graph)
        table: list[Note] = []
        order: list[Candidate] = []
        current = graph
        dropped: list[Note] = []
        refused: dict[str, str] = {}
        while not self._done(current, len(dropped), limit):
            if not order:
                order = self._ranked(graph, current, measure, refused)
                table = table or _table(order)
            chosen = next((c for c in order if self.greedy or _blocks_now(c, current)), None)
            if chosen is None:
                raise self._unreachable(graph, current, len(dropped), limit, refused)
            if not self.greedy:
                without = drop(current, _blocks_now(chosen, current))
                chosen = replace(chosen, without=without, effect=measure(without))
            order = [] if self.greedy else [c for c in order if c.where != chosen.where]
            current = chosen.without
            dropped.append(Note("changed", chosen.where, f"dropped, with all so far: {chosen.effect}"))
        if not dropped:
            return PassResult(graph, False, (Note("info", "", "the network meets the budget as it is"),))
        if current.removal is None:
            # What a repair fits the rest to: the network with all its blocks, no position of an axis removed.
            current.removal = Removal.of(graph, make_plan(graph, {}))
        notes = [*dropped, *table, *(Note("refused", where, why) for where, why in refused.items())]
        return PassResult(current, True, (*notes, *(data.notes if data is not None else ())))

    def _check(self) -> None:
        asked = [name for name in ("layers", *_BUDGETS) if getattr(self, name) is not None]
        if len(asked) != 1:
            given = f"got {' and '.join(asked)}" if asked else "got none"
            raise PassError(self.name, f"needs one of layers (a number), macs or params; {given}")
        if self.layers is not None and (
            not isinstance(self.layers, int) or isinstance(self.layers, bool) or self.layers < 1
        ):
            raise InputError(f"layers is how many residual blocks go, at least 1, not {self.layers!r}")

    def _limit(self, graph: Graph) -> float:
        """What the network may cost, or how many blocks go."""
        if self.layers is not None:
            return self.layers
        name = "macs" if self.macs is not None else "params"
        value, now = getattr(self, name), getattr(cost(graph), RESOURCES[name])
        return within(name, value, now)

    def _cost(self, graph: Graph) -> int:
        return int(getattr(cost(graph), RESOURCES["params" if self.params is not None else "macs"]))

    def _done(self, graph: Graph, count: int, limit: float) -> bool:
        return count >= limit if self.layers is not None else self._cost(graph) <= limit

    def _ranked(
        self, graph: Graph, current: Graph, measure: Measured, refused: dict[str, str]
    ) -> list[Candidate]:
        """What can go from the network as it is now, the smallest effect first."""
        now, before = measure(current), self._cost(current)
        found = []
        for blocks in self._groups(graph, current):
            where = blocks[0].layer if self.whole else blocks[0].where
            try:
                without = drop(current, blocks)
            except RuntimeError as error:
                refused[where] = f"cannot be dropped: {str(error).splitlines()[0]}"
                continue
            found.append(Candidate(blocks, where, without, measure(without), before - self._cost(without)))

        def key(c: Candidate) -> tuple[float, ...]:
            rise = c.effect.rise(now)
            if self.layers is None:
                rise = tuple(r / c.saved if c.saved > 0 else inf for r in rise)
            return rise

        return sorted(found, key=key)

    def _groups(self, graph: Graph, current: Graph) -> list[tuple[Block, ...]]:
        blocks = residual_blocks(current)
        if current is graph:
            for pattern in self.ignored:
                if not any(matches(b, pattern) for b in blocks):
                    raise InputError(f"ignored name {pattern!r} matches no residual block's sum or module")
        groups: dict[str, list[Block]] = {}
        for block in blocks:
            groups.setdefault(block.layer if self.whole else block.add, []).append(block)
        kept = (g for g in groups.values() if not any(matches(b, p) for b in g for p in self.ignored))
        return [tuple(group) for group in kept]

    def _unreachable(
        self, graph: Graph, current: Graph, count: int, limit: float, refused: dict[str, str]
    ) -> Exception:
        if not residual_blocks(graph):
            return PassError(self.name, "the network has no residual blocks whose shortcut is an identity")
        why = "".join(f"; {where} {reason}" for where, reason in refused.items())
        if self.layers is not None:
            return InputError(f"layers={self.layers} cannot be reached: only {count} can go{why}")
        what = "macs" if self.macs is not None else "params"
        return InputError(
            f"the budget cannot be reached: {what} {self._cost(current):,} for {limit:,.0f} asked are left "
            f"when all {count} that can go have gone{why}"
        )


def matches(block: Block, pattern: object) -> bool:
    """Whether a name or glob is that of a block's sum, or of a module around it."""
    parts = block.module.split(".")
    around = {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
    return any(fnmatchcase(name, str(pattern)) for name in {block.add, *around} - {""})


def _blocks_now(candidate: Candidate, graph: Graph) -> tuple[Block, ...]:
    """A candidate's blocks as they are after others went; none if one of them was part of another."""
    now = {block.add: block for block in residual_blocks(graph)}
    found = tuple(now[block.add] for block in candidate.blocks if block.add in now)
    return found if len(found) == len(candidate.blocks) else ()


def _table(order: Sequence[Candidate]) -> list[Note]:
    """What every block does, measured alone, the least first."""
    return [
        Note("info", c.where, f"{place} of {len(order)} by effect: {c.effect} without it")
        for place, c in enumerate(order, 1)
    ]
