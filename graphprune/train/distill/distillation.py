"""A teacher's part in the loss of a student.

    loss = (1 - alpha) task + alpha sum of soft targets + sum of weight x value over all other terms

(for a single soft target of weight 1 this is Hinton's sum; without soft targets and ``alpha`` the task's loss
counts whole, as in the papers of the other terms).

>>> import torch
>>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
>>> inputs, targets = torch.rand(8, 4), torch.randint(3, (8,))
>>> with Distillation(teacher, student, [SoftTargets(temperature=2.0)], alpha=0.9) as distillation:
...     outputs = student(inputs)
...     task = torch.nn.functional.cross_entropy(outputs, targets)
...     loss = distillation.loss(inputs, outputs, targets, task)
>>> sorted(distillation.parts)
['soft-targets', 'task']
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.errors import InputError
from graphprune.module import TracedModule
from graphprune.signature import Slot
from graphprune.train.batches import call
from graphprune.train.state import Home

from .soft_targets import SoftTargets
from .taps import Taps, first_tensor
from .term import Term


class Distillation:
    """Compares a student with its teacher, batch by batch; attached to both inside ``with``.

    Args:
        teacher: any module, often the original; runs in eval mode and without gradients.
        student: the module that is trained, often ``result.module``; another object than the teacher.
        terms: what is compared; names are checked at once.
        alpha: share of the soft targets, 0 to 1; 0.5 with and 0 without them by default.
        example: inputs of one batch, which give hints' adapters their shapes; a traced student has its own.
        seed: of the adapters' first weights.

    Attributes:
        parts: every part of the last loss by name, before its weight; detached.

    Raises:
        InputError: a layer is unknown (the nearest are named), ``alpha`` is out of range, an example is
            missing, or the two networks are one.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, terms: Sequence[Term], *,
        alpha: float | None = None, example: Any = None, seed: int = 0,
    ):  # fmt: skip
        if teacher is student:
            raise InputError("teacher and student are one module; pass copy.deepcopy of it as the teacher")
        if not terms:
            raise InputError("a distillation needs terms, as in [SoftTargets(), AttentionTransfer('layer1')]")
        if isinstance(terms, Term) or not all(isinstance(term, Term) for term in terms):
            raise InputError(f"terms is a list of them, as in [SoftTargets()], got {terms!r:.80}")
        if alpha is None:
            alpha = 0.5 if any(isinstance(term, SoftTargets) for term in terms) else 0.0
        if not 0 <= alpha <= 1:
            raise InputError(f"alpha must be from 0 to 1, got {alpha}")
        self.teacher, self.student, self.terms, self.alpha = teacher, student, tuple(terms), alpha
        for term in self.terms:
            if not term.pairs:
                raise InputError(f"{term.name}: no layers given")
        pairs = [pair for term in self.terms for pair in term.pairs]
        self._taps = (
            Taps(teacher, [theirs for theirs, _ in pairs if theirs], "teacher"),
            Taps(student, [mine for _, mine in pairs if mine], "student"),
        )
        self.parts: dict[str, Tensor] = {}
        self._entered = 0
        self._open = ExitStack()
        self.adapters = nn.ModuleDict(self._adapters(example, seed))

    # ---- attached or not -------------------------------------------------------------------------

    def __enter__(self) -> Distillation:
        self._entered += 1
        if self._entered == 1:
            self._open.callback(Home(self.teacher).restore)
            self._open.enter_context(_evaluating(self.teacher))
            for taps in self._taps:
                self._open.callback(taps.detach)
            self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self._entered -= 1
        if not self._entered:
            self._open.close()

    def attach(self) -> None:
        """Begin to catch values, also after the student's graph was replaced (pruned in place)."""
        for taps in self._taps:
            taps.attach()

    # ---- the loss --------------------------------------------------------------------------------

    def loss(self, inputs: Any, outputs: Any, targets: Any, task_loss: Tensor) -> Tensor:
        """The student's loss on one batch, right after it ran on it.

        Args:
            inputs: what the student was called with; the teacher is called with the same.
            outputs: what the student gave.
            targets: not used here; distillations of other kinds may.
            task_loss: the loss of outputs and targets.

        Raises:
            InputError: the student did not run inside ``with``, or shapes do not compare.
        """
        with torch.no_grad():
            theirs = self._values(call(self.teacher, inputs), 0)
        mine = self._values(outputs, 1)
        total = (1 - self.alpha) * task_loss
        self.parts = {"task": task_loss.detach()}
        for index, term in enumerate(self.terms):
            value = torch.zeros((), device=task_loss.device)
            for number, (teacher, student) in enumerate(term.pairs):
                adapter = dict(self.adapters.items()).get(_key(index, number))
                value = value + term.value(theirs[teacher], mine[student], adapter)
            share = self.alpha if isinstance(term, SoftTargets) else 1.0
            total = total + share * term.weight * value
            name = term.name if term.name not in self.parts else f"{term.name} {index}"
            self.parts[name] = value.detach()
        return total

    def _values(self, outputs: Any, which: int) -> dict[str, Tensor]:
        taps = self._taps[which]
        return {**taps.take(), "": _logits(outputs, taps.role)}

    # ---- what is trained beside the student ------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the adapters; an optimizer needs them beside the student's."""
        return self.adapters.parameters()

    def to(self, device: Any) -> Distillation:
        """Move teacher and adapters; the teacher returns at the end of ``with``."""
        self.teacher.to(device)
        self.adapters.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """The adapters' parameters."""
        return self.adapters.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the adapters' parameters back."""
        self.adapters.load_state_dict(state)

    def _adapters(self, example: Any, seed: int) -> dict[str, nn.Module]:
        if all(type(term).adapter is Term.adapter for term in self.terms):
            return {}
        if example is None and not isinstance(self.student, TracedModule):
            raise InputError("hints need the layers' shapes: pass example=, one batch's inputs")
        values = self._example_values(example)
        made: dict[str, nn.Module] = {}
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            for index, term in enumerate(self.terms):
                for number, (teacher, student) in enumerate(term.pairs):
                    adapter = term.adapter(values[0][teacher], values[1][student])
                    if adapter is not None:
                        made[_key(index, number)] = adapter.to(values[1][student].device)
        return made

    def _example_values(self, example: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = []
        if example is None:
            assert isinstance(self.student, TracedModule)
            graph = self.student.captured
            example = _example_call(graph.signature.arguments, graph.examples)
        with self, torch.no_grad():
            for which, network in enumerate((self.teacher, self.student)):
                with _evaluating(network):
                    found.append(self._values(call(network, example), which))
        return found[0], found[1]


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode; every module has its own mode again afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        network.train(modes[0][1])
        for module, training in modes:
            module.training = training


def _example_call(arguments: Mapping[str, Any], examples: Sequence[Tensor]) -> dict[str, Any]:
    """The keyword arguments that a graph was captured with."""

    def filled(leaf: Any) -> Any:
        return examples[leaf.index] if isinstance(leaf, Slot) else leaf

    return {name: pytree.tree_map(filled, value) for name, value in arguments.items()}


def _logits(outputs: Any, role: str) -> Tensor:
    """The network's result: ``logits`` of what has them (transformers), else the first tensor."""
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    return named if isinstance(named, Tensor) else first_tensor(outputs, f"the {role}")


def _key(term: int, layer: int) -> str:
    return f"{term}_{layer}"
