"""What an iterative run did, round by round, and the table of it."""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.graph import Graph
from graphprune.module import TracedModule


@dataclass(frozen=True)
class Round:
    """One round: something was removed, then the network was trained.

    Attributes:
        number: from 1.
        plan: what went, as JSON of :class:`~graphprune.plans.plan.Plan`.
        macs, parameters: of the network after it.
        pruned: what ``evaluate`` gave after pruning and repair, before training; ``None`` without it.
        losses, scores: of every epoch, mean training loss and what ``evaluate`` gave.
    """

    number: int
    plan: str
    macs: int
    parameters: int
    pruned: float | None = None
    losses: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Iterated:
    """A network pruned and trained in rounds.

    Attributes:
        graph: the network; :attr:`module` trains on, and is what ``graphprune.optimize`` takes.
        rounds: what was done.
        before: multiply-accumulates and parameters of the original, and its score or ``None``.
        notes: what a reader should know: where it went on from, what was met already.
    """

    graph: Graph
    rounds: tuple[Round, ...]
    before: tuple[int, int, float | None]
    notes: tuple[str, ...] = ()

    @property
    def module(self) -> TracedModule:
        """The network as a trainable module, in evaluation mode when first named."""
        return self.graph.module

    def __str__(self) -> str:
        return table(self.rounds, self.before)


def table(rounds: tuple[Round, ...], before: tuple[int, int, float | None]) -> str:
    """The rounds as a Markdown table, the network they started from in front."""
    macs, parameters, score = before
    lines = [
        "| round | MACs | parameters | pruned | trained | loss |",
        "|--:|--:|--:|--:|--:|--:|",
        f"| 0 | {macs:,} | {parameters:,} | | {_number(score)} | |",
    ]
    for r in rounds:
        trained, loss = (values[-1] if values else None for values in (r.scores, r.losses))
        cells = (
            str(r.number), f"{r.macs:,} ({r.macs / macs:.1%})",
            f"{r.parameters:,} ({r.parameters / parameters:.1%})", _number(r.pruned), _number(trained),
            _number(loss),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
