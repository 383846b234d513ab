"""Find the fewest operators that have to stay in float, or keep 8 bits, and quantize the rest.

Operators are ranked by what each does to the network's outputs when it alone is in integers
(:mod:`.quantize.sensitivity`). The most harmful ones are left out: as many as a bisection over that order
needs until the score, or the error on the calibration inputs, is within bounds; then each of them is tried
in integers again, and stays there if the bounds still hold.

>>> import torch, graphprune
>>> from graphprune.pipeline import Context
>>> _ = torch.manual_seed(0)
>>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> graph = graphprune.trace(net, torch.zeros(1, 8))
>>> done = MixedPrecision(sqnr=20.0).run(graph, Context(calibration=[torch.randn(1, 8) for _ in range(32)]))
>>> done.notes[0].message.partition(";")[0]
'0 of 2 operators stay in float'
>>> len(done.rankings[0].rows), done.rankings[0].chosen
(2, ())
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.integers import INT8
from graphprune.kinds import kind
from graphprune.notes import Note, Ranking, RankingRow
from graphprune.pipeline import Context, PassResult
from graphprune.quantization.parameters import Parameters, of_weight, to_integers
from graphprune.verify import compare

from .quantize import Quantize, summary
from .quantize.annotate import Annotation, weight_of
from .quantize.insert import channel_axis
from .quantize.sensitivity import Sensitivity, ranked
from .quantize.staged import Staged, float_notes


@dataclass(frozen=True)
class MixedPrecision(Quantize):
    """Quantize what can be quantized within bounds.

    Attributes:
        max_drop: how much less ``evaluate`` may give than on the float network.
        sqnr: what the outputs must keep on the calibration inputs, dB, instead of ``max_drop``.
        fallback: what those left out are: ``float``, or ``int8`` (their weights; with ``bits`` below 8).
        most: share of the operators that may be left out; more is an error.

    The others are those of :class:`~graphprune.passes.quantize.Quantize`.
    """

    name: ClassVar[str] = "mixed-precision"

    max_drop: float | None = None
    sqnr: float | None = None
    fallback: str = "float"
    most: float = 1.0

    def run(self, graph: Graph, context: Context) -> PassResult:
        """A graph with quantizers where they are affordable, and the ranking."""
        self._check(context)
        staged = self.staged(graph, context)
        weights = self.weights(staged, context.seed)
        rows = ranked(staged, weights)
        search = _Search(self, staged, weights, context)
        chosen = search.fewest([row.node for row in rows])
        if len(chosen) > self.most * len(rows):
            raise PassError(
                self.name,
                f"{len(chosen)} of {len(rows)} operators would have to stay in {self.fallback} for "
                f"{search.bound}, and at most {self.most:.0%} may; allow more, or a larger loss",
            )
        result, found, tables = search.made(chosen)
        ranking = _ranking(rows, chosen, self.fallback)
        stay = [Note("refused", name, f"costs too much, stays in {self.fallback}") for name in ranking.chosen]
        if not found.runs:
            why = f"nothing is in integers: {search.bound} allows none"
            return PassResult(graph, False, (Note("refused", "", why), *stay), rankings=(ranking,))
        said = Note(
            "info", "", f"{len(chosen)} of {len(rows)} operators stay in {self.fallback}; {search.said}"
        )
        notes = (said, summary(found), *stay, *staged.notes, *tables, *float_notes(staged.found))
        return PassResult(result, True, notes, rankings=(ranking,))

    def _check(self, context: Context) -> None:
        if (self.max_drop is None) == (self.sqnr is None):
            raise PassError(self.name, "needs a bound: max-drop with `evaluate`, or sqnr in dB")
        if self.max_drop is not None and context.evaluate is None:
            raise PassError(
                self.name, "max-drop is measured with `evaluate`, a function from module to score"
            )
        if self.fallback not in ("float", "int8"):
            raise InputError(f"fallback must be float or int8, got {self.fallback!r}")
        if self.fallback == "int8" and self.bits == INT8.bits:
            raise InputError("fallback=int8 goes with fewer bits than 8, as in bits=4")
        if not 0 <= self.most <= 1:
            raise InputError(f"most is a share of the operators, 0 to 1, got {self.most}")


def _ranking(rows: Sequence[Sensitivity], chosen: set[fx.Node], fallback: str) -> Ranking:
    """Every operator, the most harmful first."""
    worst = rows[0].sqnr if rows else math.inf
    return Ranking(
        "operators, each alone in integers",
        "SQNR, dB",
        tuple(
            RankingRow(
                row.node.name,
                row.sqnr,
                _share(row.sqnr, worst),
                f"{kind(row.node)}{f', stays in {fallback}' * (row.node in chosen)}",
                row.node in chosen,
            )
            for row in rows
        ),
        "a bar is as long as the error of the network's outputs (root mean square) next to the largest one",
    )


def _share(sqnr: float, worst: float) -> float:
    """The error of one operator over that of the most harmful one; both may be infinite, in dB."""
    if sqnr == math.inf:
        return 0.0
    return 1.0 if sqnr == worst else float(10 ** ((worst - sqnr) / 20))


class _Search:
    """Which operators are left out; every set is tried once."""

    def __init__(
        self,
        step: MixedPrecision,
        staged: Staged,
        weights: Mapping[str, tuple[Tensor, Parameters]],
        context: Context,
    ):
        self._step, self._staged, self._weights = step, staged, weights
        self._known: dict[frozenset[fx.Node], float] = {}
        self._best: tuple[Graph, Annotation, list[Note]] | None = None
        if step.max_drop is not None:
            assert context.evaluate is not None
            self._score: Callable[[Graph], float] = _evaluated(context.evaluate)
            self._float = self._score(staged.graph.copy())
            self._least = self._float - step.max_drop
            self.bound = f"a score of at least {self._least:.4g} ({self._float:.4g} in float)"
        else:
            self._score, self._least = self._noise, float(step.sqnr or 0)
            self._wanted = [staged.graph.run(*call) for call in staged.calibration.calls]
            self.bound = f"an SQNR of at least {self._least:g} dB"

    def fewest(self, order: Sequence[fx.Node]) -> set[fx.Node]:
        """A shortest prefix of ``order`` that is enough, less what turns out to be superfluous."""
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            if self._fits(set(order[:middle])):
                high = middle
            else:
                low = middle + 1
        chosen = set(order[:low])
        for node in reversed(order[:low]):
            if self._fits(chosen - {node}):
                chosen -= {node}
        self._final = chosen
        return chosen

    @property
    def said(self) -> str:
        """The bound's figure as it came out."""
        now, alone = self._value(self._final), self._value(set())
        if self._step.max_drop is not None:
            return f"score {now:.4g}, in float {self._float:.4g}, all in integers {alone:.4g}"
        return f"SQNR {now:.1f} dB, all in integers {alone:.1f} dB"

    def made(self, left_out: set[fx.Node]) -> tuple[Graph, Annotation, list[Note]]:
        """The network with some operators left out."""
        staged, step = self._staged, self._step
        weights = dict(self._weights)
        if step.fallback == "int8":
            found = staged.found
            for node in left_out:
                weight = weight_of(node)
                if weight is not None:
                    numbers = staged.graph.tensors[str(weight.target)].detach()
                    how = of_weight(numbers, INT8, channel_axis(node))
                    weights[str(weight.target)] = to_integers(numbers, how), how
        else:
            found = staged.without(dict.fromkeys(left_out, "it costs too much"))
        graph, tables = staged.quantized(found, weights=weights, tables=step.embeddings)
        return graph, found, tables

    def _fits(self, left_out: set[fx.Node]) -> bool:
        return self._value(left_out) >= self._least

    def _value(self, left_out: set[fx.Node]) -> float:
        key = frozenset(left_out)
        if key not in self._known:
            self._known[key] = self._score(self.made(left_out)[0])
        return self._known[key]

    def _noise(self, graph: Graph) -> float:
        outputs = [graph.run(*call) for call in self._staged.calibration.calls]
        return compare("pass", outputs, self._wanted, exact=False).sqnr


def _evaluated(evaluate: Callable[[Any], float]) -> Callable[[Graph], float]:
    def score(graph: Graph) -> float:
        found = float(evaluate(graph.module.eval()))
        if not torch.isfinite(torch.tensor(found)):
            raise InputError(f"evaluate gave {found}; it must give a finite number, larger is better")
        return found

    return score
