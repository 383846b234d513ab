"""What an iterative run did, round by round, and the file that it goes on from.

The file holds tensors, numbers and text only, and is read without unpickling anything else. It is replaced in
one step (:mod:`graphprune.atomic`), so a run that is killed while it writes goes on from the one before.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from graphprune import atomic
from graphprune.errors import InputError
from graphprune.graph import Graph
from graphprune.module import TracedModule
from graphprune.plans.plan import Plan

try:
    import fcntl
except ImportError:  # not POSIX: nobody is kept from starting a run twice
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
FILE, TABLE, LOCK = "state.pt", "rounds.md", "lock"


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


@dataclass(frozen=True)
class Saved:
    """Where a run stands.

    Attributes:
        settings: what it was started with; another run's state is refused by them.
        before: see :class:`Iterated`.
        done: rounds that are through.
        current: the round that is being trained, its epochs left out.
        tensors: of the network in that round before training; of the last one, when no round is left.
        training: ``finetune``'s state in it, ``None`` before its first epoch is through.
    """

    settings: Mapping[str, Any]
    before: tuple[int, int, float | None]
    done: tuple[Round, ...] = ()
    current: Round | None = None
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None

    @property
    def plans(self) -> list[Plan]:
        """Every plan so far, in order."""
        rounds = [*self.done, *([self.current] if self.current is not None else [])]
        return [Plan.from_json(r.plan) for r in rounds]

    def write(self, directory: Path | None) -> None:
        """Replace the state in the directory, and the table beside it; without one, do nothing."""
        if directory is None:
            return
        content = {
            "format": FORMAT,
            "settings": dict(self.settings),
            "before": list(self.before),
            "done": [asdict(r) for r in self.done],
            "current": None if self.current is None else asdict(self.current),
            "tensors": {name: value.detach() for name, value in self.tensors.items()},
            "training": self.training,
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        atomic.write_file(directory / FILE, buffer.getvalue())
        atomic.write_file(directory / TABLE, f"{table(self.done, self.before)}\n".encode())

    @staticmethod
    def read(directory: Path | None) -> Saved | None:
        """The state in a directory, ``None`` where there is none.

        Raises:
            InputError: the file is damaged, or of a newer version.
        """
        if directory is None or not (directory / FILE).exists():
            return None
        path = directory / FILE
        try:
            content = torch.load(path, weights_only=True, map_location="cpu")
            version = content["format"]
            if version > FORMAT:
                raise InputError(f"{path} has format {version}, this version reads up to {FORMAT}")
            rounds = [_round(r) for r in content["done"]]
            current = None if content["current"] is None else _round(content["current"])
            macs, parameters, score = content["before"]
            return Saved(
                content["settings"], (macs, parameters, score), tuple(rounds), current,
                content["tensors"], content["training"],
            )  # fmt: skip
        except InputError:
            raise
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(
                f"{path} is not the state of an iterative run ({reason}); remove it to start again"
            ) from error


def _round(values: Mapping[str, Any]) -> Round:
    return Round(**{**values, "losses": tuple(values["losses"]), "scores": tuple(values["scores"])})


@contextmanager
def held(directory: Path | None) -> Iterator[None]:
    """Keep a directory to this process, and remove what killed writes left in it.

    Raises:
        InputError: another process runs in it.
    """
    if directory is None:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / LOCK, "ab") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(
                    f"another process runs in {directory}; wait for it, or give another directory"
                ) from None
            for left in directory.glob(".*.partial-*"):
                left.unlink(missing_ok=True)
        yield
