"""The rounds of an iterative run: from the state on disk, or from the beginning, to the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphprune.cost import cost
from graphprune.graph import Graph
from graphprune.pipeline import Context
from graphprune.plans.plan import Plan
from graphprune.target import Target
from graphprune.textual import make_pass

from .batches import pair
from .distill import Distillation, Term
from .finetune import finetune
from .iterative_settings import compare, settings
from .randomness import seeded
from .rounds import Iterated, Round
from .saved import Saved
from .state import State

_LIMIT = 512  # samples that rank positions and fit repairs


@dataclass(frozen=True)
class Run:
    """What a run was started with, as :func:`~graphprune.train.iterate.iterate` takes it.

    Attributes:
        start: the network before any round.
        budgets: of every round, absolute.
        asked: the caller's budgets.
        pruning: options of ``prune-channels``.
        names: what a recipe calls the objects, compared as they are.
        directory: where the state goes, or ``None``.
        say: called with a line of text as each stage starts.
    """

    start: Graph
    budgets: Sequence[Mapping[str, int]]
    asked: Mapping[str, Any]
    data: Iterable[Any]
    loss: Callable[[Any, Any], torch.Tensor]
    per_round: float
    epochs: int
    lr: float
    clip: float | None
    optimizer: Any
    distil: Sequence[Term]
    alpha: float | None
    evaluate: Callable[[nn.Module], float] | None
    calibration: Iterable[Any] | None
    pruning: Mapping[str, Any]
    repair: bool
    target: Target
    seed: int
    names: Mapping[str, str]
    directory: Path | None
    say: Callable[[str], None]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """See :mod:`graphprune.train.iterative_settings`."""
        return settings(self)

    def all(self) -> Iterated:
        """Every round that is not done yet."""
        saved = Saved.read(self.directory)
        mine = self.settings  # what cannot be run is said before anything is
        self._distillation(_own(self.start).module, 0)
        notes: list[str] = []
        if saved is None:
            whole = cost(self.start)
            saved = Saved(mine, (whole.macs, whole.parameters, self._score(self.start.module)))
        else:
            notes = self._same_run(saved)
            saved.write_table(self.directory)
        structure, graph = self.start, self.start
        for plan in saved.plans:
            structure = structure.apply(plan)
        if saved.tensors:
            graph = _filled(structure, saved.tensors)
        through = saved.done[-1].number if saved.done else 0
        first = through + 1 if saved.current is None else saved.current.number
        for number in range(first, len(self.budgets) + 1):
            if saved.current is None:
                self.say(f"round {number} of {len(self.budgets)}: prune")
                plan, small = self._pruned(graph, number)
                if not plan:
                    notes.append(f"round {number} had nothing to remove: those before it went that far")
                    continue
                structure = structure.apply(plan)
                graph = _filled(structure, small.tensors)
                now = cost(graph)
                current = Round(number, plan.to_json(), now.macs, now.parameters, self._score(graph.module))
                tensors = {name: value.detach().clone() for name, value in graph.tensors.items()}
                saved = Saved(self.settings, saved.before, saved.done, current, tensors)
                saved.write(self.directory)
            saved = self._trained(graph, saved)
        if not self.budgets:
            notes.append("the network meets the budget as it is")
        return Iterated(graph, saved.done, saved.before, tuple(notes))

    def _pruned(self, graph: Graph, number: int) -> tuple[Plan, Graph]:
        """What goes in a round, and the repaired network without it."""
        graph = graph.copy()
        graph.removal = None  # a repair refits to the network at the start of its round
        self._reseed(number)
        with seeded(self._seed(number)) as numbers:
            numbers.epoch(-1, process=0)
            calibration = _Inputs(self.data) if self.calibration is None else self.calibration
            context = Context(self.target, calibration, seed=self._seed(number))
            options = {"limit": _LIMIT, **self.pruning, **self.budgets[number - 1]}
            result = make_pass("prune-channels", options).run(graph, context)
            if not result.changed:
                return Plan({}, ""), graph
            small = result.graph
            if self.repair:
                small = make_pass("repair", {"limit": _LIMIT}).run(small, context).graph
        assert result.plan is not None
        return result.plan, small

    def _trained(self, graph: Graph, saved: Saved) -> Saved:
        """The epochs of a round that are not done yet."""
        current = saved.current
        assert current is not None
        module = graph.module
        if saved.training is None:
            self._reseed(current.number)

        def keep(state: State) -> None:
            self.say(f"round {current.number} of {len(self.budgets)}: epoch {state.epoch} of {self.epochs}")
            at = Saved(self.settings, saved.before, saved.done, current, saved.tensors, state.state_dict())
            at.write(self.directory)

        training = finetune(
            module, self.data, self.loss, optimizer=self.optimizer, epochs=self.epochs, lr=self.lr,
            clip=self.clip, distillation=self._distillation(module, current.number),
            evaluate=self.evaluate, seed=self._seed(current.number),
            on_epoch=keep, resume=saved.training,
        )  # fmt: skip
        through = Round(
            current.number, current.plan, current.macs, current.parameters, current.pruned,
            training.losses, training.scores,
        )  # fmt: skip
        tensors = {name: value.detach().clone() for name, value in graph.tensors.items()}
        saved = Saved(self.settings, saved.before, (*saved.done, through), None, tensors)
        saved.write(self.directory)
        return saved

    def _distillation(self, student: nn.Module, number: int) -> Distillation | None:
        """The original as a round's teacher.

        Raises:
            InputError: a layer of a term is unknown, or ``alpha`` is no share.
        """
        if not self.distil:
            return None
        teacher = _own(self.start).module
        return Distillation(teacher, student, self.distil, alpha=self.alpha, seed=self._seed(number))

    def _score(self, module: nn.Module) -> float | None:
        if self.evaluate is None:
            return None
        module.eval()
        with torch.no_grad(), seeded(self.seed):
            return float(self.evaluate(module))

    def _seed(self, number: int) -> int:
        return self.seed * 1_000_003 + number

    def _reseed(self, number: int) -> None:
        """A generator that the data keeps to itself starts a round anew, too."""
        generator = getattr(self.data, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(self._seed(number))

    def _same_run(self, saved: Saved) -> list[str]:
        """Notes on a state to go on from.

        Raises:
            InputError: it is of a run with other settings.
        """
        changed = compare(saved.settings, self.settings, self.directory)
        epoch = len(saved.training["losses"]) if saved.training is not None else 0
        where = (
            f"round {saved.current.number}, epoch {epoch}"
            if saved.current
            else f"round {saved.done[-1].number}"
        )
        notes = [f"went on after {where}", *changed]
        if getattr(self.data, "persistent_workers", False):
            notes.append(
                "data keeps its workers from epoch to epoch (persistent_workers), and with them random "
                "numbers: the weights may differ from those of a run that was not stopped"
            )
        return notes


class _Inputs:
    """The inputs of (inputs, targets) batches, whenever it is read."""

    def __init__(self, data: Iterable[Any]):
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        return (pair(batch, number)[0] for number, batch in enumerate(self._data))


def _own(graph: Graph) -> Graph:
    """A copy with tensors of its own."""
    return _filled(graph, graph.tensors)


def _filled(structure: Graph, values: Mapping[str, torch.Tensor]) -> Graph:
    """A graph with tensors of its own that hold ``values`` in the structure's memory layout.

    Kernels may differ with the layout, so a run that goes on must not have another one.
    """
    graph = structure.copy()
    filled = {}
    with torch.no_grad():
        for name, value in structure.tensors.items():
            fresh = torch.empty_like(value)
            fresh.copy_(values[name])
            filled[name] = fresh
    graph.set_tensors(filled)
    return graph
