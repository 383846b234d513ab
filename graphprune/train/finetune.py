"""Train a network, pruned or not, on Hugging Face Accelerate; in several processes by ``accelerate launch``.

Every batch is divided among the processes and their gradients are averaged, weighted by how much of the batch
each had, so that several processes give what one gives (to rounding), provided that the loss is a mean over
samples and that nothing in the network looks across the batch. Batch norm in training mode does, and each
process normalises its own part.

>>> import torch
>>> module = torch.nn.Linear(2, 1)
>>> batches = [(x := torch.randn(8, 2), x.sum(1, keepdim=True)) for _ in range(20)]
>>> training = finetune(module, batches, torch.nn.functional.mse_loss, lr=0.1, epochs=3)
>>> training.steps, training.losses[-1] < training.losses[0]
(60, True)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import InputError, MissingExtraError

from .loop import Loop
from .optimizer_state import require_held
from .randomness import seeded
from .resuming import beginning
from .state import Home, State, Training


def finetune(
    module: nn.Module,
    data: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    *,
    optimizer: torch.optim.Optimizer | Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    epochs: int = 1,
    lr: float = 1e-4,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    clip: float | None = None,
    after_step: Sequence[Any] = (),
    penalties: Sequence[Callable[[], Tensor]] = (),
    distillation: Any = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    seed: int = 0,
    on_epoch: Callable[[State], Any] | None = None,
    resume: Mapping[str, Any] | None = None,
    accelerator: Any = None,
) -> Training:
    """Train a network in place; it is the same object afterwards, in eval mode, on the device it was on.

    Args:
        module: any ``nn.Module``; ``result.module`` of a pruned network.
        data: (inputs, targets) batches, iterated anew every epoch; inputs are a tensor, a tuple of positional
            or a dict of keyword arguments. Every process reads all batches and takes its part of each.
        loss: of outputs and targets, a mean over samples.
        optimizer: one that holds the module's parameters, or a function that makes it from a list of them;
            AdamW by default.
        epochs: how many in all, those before a resumption included.
        lr: learning rate of the default optimizer.
        scheduler: makes one of ``torch.optim.lr_scheduler`` for the optimizer; stepped after every step.
        clip: largest norm of all gradients together.
        after_step: objects whose ``step()`` runs after the optimizer's: sparsifiers, shrinkers.
        penalties: added to the loss: regularisers.
        distillation: a :class:`graphprune.train.Distillation`, which gives a teacher a part in the loss.
        evaluate: scores the network (eval mode, no gradients) after every epoch.
        seed: of everything random: order and augmentation of the data, dropout.
        on_epoch: called with a :class:`State` after every epoch, in every process; to save, to report.
        resume: a ``State.state_dict()`` to go on from, with the other arguments as they were (``epochs`` and
            ``clip`` may change).
        accelerator: an ``accelerate.Accelerator`` with settings of your own (mixed precision; accumulation,
            where an epoch's last batch always has a step).

    Raises:
        MissingExtraError: accelerate is not installed.
        InputError: the data is empty or no pairs, an argument is out of range, or the optimizer trains
            another network than the module; one that trains a part of it (a head) is fine. Or ``resume`` is
            no state, or of a run with other arguments; nothing was loaded.
        GraphpruneError: the loss or a gradient is infinite or not a number; the module is as it was before
            that step.
    """
    whole = isinstance(epochs, int) and not isinstance(epochs, bool) and epochs >= 0
    if not whole or not lr > 0 or (clip is not None and not clip > 0):
        raise InputError(
            f"epochs={epochs!r}, lr={lr}, clip={clip}: epochs is a whole number from 0, lr and clip above 0"
        )
    accelerator = accelerator or _accelerator()
    home = Home(module)
    with seeded(seed) as numbers, ExitStack() as attached:
        chosen = _optimizer(module, distillation, optimizer, lr)
        _check_step(chosen)
        steady = scheduler(chosen) if scheduler else None
        others = {
            "scheduler": steady,
            "after_step": list(after_step),
            "distillation": distillation,
            "generator": getattr(data, "generator", None),
        }
        run = beginning(module, chosen, seed, lr if optimizer is None else None, others)
        state = State(module, chosen, Training(), accelerator.is_main_process, others, run)
        if resume is not None:
            state = state.load_state_dict(resume)
        # Only now: a shrinker's state gives the module another graph, where nothing would be caught.
        attached.enter_context(distillation or nullcontext())
        if hasattr(distillation, "attach"):
            distillation.attach()  # also to one that the caller entered before
        loop = Loop(accelerator, state, numbers, loss, clip, steady, after_step, penalties, distillation)
        try:
            for epoch in range(state.epoch, epochs):
                total, steps = loop.epoch(epoch, data)
                training = state.training
                scores = training.scores
                if evaluate is not None:
                    with torch.no_grad():
                        scores = (*scores, _score(evaluate(module)))
                training = Training((*training.losses, total), scores, training.steps + steps)
                state = replace(state, training=training)
                if on_epoch is not None:
                    on_epoch(state)
        finally:
            loop.release()
            home.restore()
            module.eval()
    return state.training


def _score(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        given = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise InputError(f"evaluate gave {given:.80}, and a score is one number") from None


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingExtraError("accelerate", "train", "finetune") from error
    return Accelerator()


def _optimizer(module: nn.Module, distillation: Any, given: Any, lr: float) -> torch.optim.Optimizer:
    """The optimizer, with the parameters of the distillation's adapters among its own."""
    adapters = list(distillation.parameters()) if hasattr(distillation, "parameters") else []
    parameters = [p for p in module.parameters() if p.requires_grad] + adapters
    if not parameters:
        raise InputError("the module has no parameter that can be trained (requires_grad)")
    if given is None:
        return torch.optim.AdamW(parameters, lr)
    if not isinstance(given, torch.optim.Optimizer):
        made = given(parameters) if callable(given) else given
        if not isinstance(made, torch.optim.Optimizer):
            raise InputError(
                f"optimizer is one of torch.optim, or a function that makes it from a list of parameters, "
                f"and this gave {type(made).__name__}"
            )
        require_held(made, module, adapters)
        return made
    require_held(given, module, adapters)
    known = {id(p) for group in given.param_groups for p in group["params"]}
    missing = [p for p in adapters if id(p) not in known]
    if missing:
        given.add_param_group({"params": missing})
    return given


def _check_step(optimizer: torch.optim.Optimizer) -> None:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise InputError(
            f"{type(optimizer).__name__} computes the loss anew within a step (closure), which finetune does "
            "not do; use it in a loop of your own"
        )
