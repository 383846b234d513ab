"""Whether a saved state is of the run that is to go on from it; said before anything of it is loaded.

A state loads piece by piece, and most of what does not fit would be noticed late or never: another seed,
parameters in another order, a scheduler that starts from its beginning. So a state holds what its run
started with, and a run that goes on from it must have started with the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import InputError

FORMAT = "graphprune finetune 1"


def beginning(
    module: nn.Module, optimizer: Optimizer, seed: int, lr: float | None, others: Mapping[str, Any]
) -> dict[str, Any]:
    """What a run starts with: numbers, strings, lists and dicts.

    Args:
        lr: of the default optimizer, ``None`` where another one was given.
        others: what else has a state, by name, as :class:`~graphprune.train.state.State` holds it.
    """
    distillation = others["distillation"]
    adapters = list(distillation.parameters()) if hasattr(distillation, "parameters") else []
    names = {id(p): name for name, p in module.named_parameters()}
    names |= {id(p): f"an adapter's {list(p.shape)}" for p in adapters}
    return {
        "seed": seed,
        "module": {k: list(v.shape) for k, v in module.state_dict().items() if isinstance(v, Tensor)},
        "optimizer": type(optimizer).__name__,
        "lr": lr,
        "parameters of the optimizer": [
            [names.get(id(p), f"another's {list(p.shape)}") for p in group["params"]]
            for group in optimizer.param_groups
        ],
        "scheduler": _kind(others["scheduler"]),
        "after_step": [_kind(each) for each in others["after_step"]],
        "distillation": _kind(distillation),
        "adapters": [list(p.shape) for p in adapters],
        "generator of the data": others["generator"] is not None,
    }


def require_same(state: Any, mine: Mapping[str, Any]) -> None:
    """Say in what a saved state differs from the run that is to go on.

    Args:
        state: what the caller gave for it.
        mine: :func:`beginning` of this run.

    Raises:
        InputError: it is no state, or another run's.
    """
    if not isinstance(state, Mapping):
        raise InputError(
            "resume= takes the state itself, as in torch.load('run.pt', weights_only=True), and got "
            f"{type(state).__name__} {state!r:.80}"
        )
    if state.get("format") != FORMAT:
        keys = ", ".join(map(repr, list(state)[:4]))
        raise InputError(
            f"resume= takes what on_epoch's state.state_dict() gave, in this version's form ({FORMAT!r}), "
            f"and got a mapping with {keys or 'nothing in it'}"
        )
    theirs = state["run"]
    for key, value in mine.items():
        own = key == "lr" and None in (theirs[key], value)  # an optimizer of the caller's brings its own
        if theirs[key] != value and not own:
            where, saved, now = _difference(key, theirs[key], value)
            raise InputError(
                f"resume: the saved run began with {where} = {saved!r:.80}, and this one with {now!r:.80}; a "
                "run goes on with the arguments that it began with"
            )


def _difference(name: str, saved: Any, now: Any) -> tuple[str, Any, Any]:
    """Where in nested dicts and lists two values first differ, and how."""
    if isinstance(saved, dict) and isinstance(now, dict):
        key = next(key for key in {**saved, **now} if saved.get(key) != now.get(key))
        return _difference(f"{name} {key}", saved.get(key), now.get(key))
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        place = next(i for i in range(len(now)) if saved[i] != now[i])
        if isinstance(now[place], (list, str)):
            return _difference(f"{name}[{place}]", saved[place], now[place])
    return name, saved, now


def _kind(value: Any) -> str | None:
    return None if value is None else type(value).__name__
