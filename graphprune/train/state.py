"""What a training run has done, what it needs to go on after a stop, and where its network came from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from graphprune.errors import InputError
from graphprune.module import TracedModule

from .resuming import FORMAT, require_same


@dataclass(frozen=True)
class Training:
    """What a training run did.

    Attributes:
        losses: mean training loss of every epoch over its samples, penalties and distillation included.
        scores: what ``evaluate`` gave after every epoch; empty without it.
        steps: optimizer steps.
    """

    losses: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    steps: int = 0

    @property
    def epochs(self) -> int:
        """How many epochs are done."""
        return len(self.losses)


@dataclass(frozen=True)
class State:
    """A run after an epoch, as ``on_epoch`` gets it.

    Attributes:
        module: the network in eval mode, on the device it trains on; not wrapped.
        optimizer: torch's own, not Accelerate's.
        training: losses, scores and steps so far.
        main: whether this is the process that should write files.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    training: Training
    main: bool = True
    _others: Mapping[str, Any] = field(default_factory=dict, repr=False)
    _run: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return self.training.epochs

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``finetune(…, resume=…)`` needs to go on as if it had not stopped; copies.

        Tensors, numbers, strings, lists and dicts, as long as the states of the optimizer and of the
        ``after_step`` objects hold nothing else: ``torch.load`` with ``weights_only=True`` reads it.
        """
        training = self.training
        return copy.deepcopy(
            {
                "format": FORMAT,
                "run": dict(self._run),
                "module": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "losses": list(training.losses),
                "scores": list(training.scores),
                "steps": training.steps,
                **{name: _states(value) for name, value in self._others.items()},
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> State:
        """Put a saved state back into the objects of this one; returns it with the saved figures.

        Raises:
            InputError: it is no state, or of a run that began otherwise; nothing was loaded.
        """
        require_same(state, self._run)
        # First what may make the module smaller: its shapes and those of the optimizer follow.
        for name, value in self._others.items():
            _restore(value, copy.deepcopy(state[name]), name)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        saved = Training(tuple(state["losses"]), tuple(state["scores"]), state["steps"])
        return replace(self, training=saved)


class Home:
    """The device a module was on. Moving makes other buffers, and a traced one shares its with a graph."""

    def __init__(self, module: nn.Module):
        self.module, self.device = module, _device(module)

    @property
    def moved(self) -> bool:
        """Whether the module is elsewhere now."""
        return _device(self.module) != self.device

    def restore(self) -> None:
        """Move it back; its graph has the same tensors as it has, again."""
        if not self.moved or self.device is None:
            return
        self.module.to(self.device)
        if isinstance(self.module, TracedModule):
            self.module._source.tensors = self.module.captured.tensors


def _device(module: nn.Module) -> torch.device | None:
    first = next(module.parameters(), next(module.buffers(), None))
    return None if first is None else first.device


def _states(value: Any) -> Any:
    if isinstance(value, list):
        return [_states(each) for each in value]
    if isinstance(value, torch.Generator):
        return value.get_state()
    return value.state_dict() if hasattr(value, "state_dict") else None


def _restore(value: Any, state: Any, name: str) -> None:
    if isinstance(value, list):
        for index, (each, saved) in enumerate(zip(value, state, strict=True)):
            _restore(each, saved, f"{name}[{index}]")
    elif state is None:
        return
    elif isinstance(value, torch.Generator):
        value.set_state(state)
    elif hasattr(value, "load_state_dict"):
        value.load_state_dict(state)
    else:
        raise InputError(f"{name}: the saved run had a state for it, and {type(value).__name__} takes none")
