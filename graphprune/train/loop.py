"""The epochs of ``finetune``: batches, gradients and steps, on what Accelerate prepared.

With ``gradient_accumulation_steps`` above 1 a step comes after so many batches, counted anew in every epoch,
and after an epoch's last batch, so that no gradient is lost or carried into the next. Every batch counts the
same: a step after fewer batches, at the end, is as much smaller, as it is in Accelerate's own loaders.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import GraphpruneError, InputError

from .batches import call, pair, samples, share
from .optimizer_state import require_held
from .randomness import Numbers
from .state import State


class Loop:
    """One epoch after the other, on what Accelerate prepared."""

    def __init__(
        self, accelerator: Any, state: State, numbers: Numbers, loss: Any, clip: float | None,
        scheduler: Any, after_step: Sequence[Any], penalties: Sequence[Any], distillation: Any,
    ):  # fmt: skip
        self.accelerator, self.module, self.numbers = accelerator, state.module, numbers
        self.loss, self.clip, self.scheduler = loss, clip, scheduler
        self.after_step, self.penalties, self.distillation = after_step, penalties, distillation
        settings = accelerator.gradient_state.plugin_kwargs
        self._every_batch = settings.get("sync_each_batch", False)  # less memory, more to send
        self.adapters = list(distillation.parameters()) if hasattr(distillation, "parameters") else []
        self.optimizer = accelerator.prepare_optimizer(state.optimizer)
        self._wrap()
        if hasattr(distillation, "to"):
            distillation.to(accelerator.device)

    def _wrap(self) -> None:
        self.wrapped = self.accelerator.prepare_model(self.module)
        self._shapes = self._parameters()

    def _parameters(self) -> list[tuple[int, torch.Size]]:
        return [(id(p), p.shape) for p in self.module.parameters()]

    def epoch(self, number: int, data: Iterable[Any]) -> tuple[float, int]:
        """Mean loss over the samples, and the optimizer's steps; the module is in eval mode afterwards."""
        accelerator = self.accelerator
        self.numbers.epoch(number, process=accelerator.process_index)
        self.module.train()
        self.wrapped.train()
        accelerator.sync_gradients = True  # or there would be no zero_grad, after a run that was stopped
        self.optimizer.zero_grad()
        total = torch.zeros((), device=accelerator.device)
        seen = steps = 0
        for inputs, targets, synchronised in self._batches(data):
            size = samples(inputs)
            inputs, targets = share(
                (inputs, targets), size, index=accelerator.process_index, count=accelerator.num_processes
            )
            accelerator.sync_gradients = synchronised
            with nullcontext() if synchronised or self._every_batch else accelerator.no_sync(self.wrapped):
                total += self._step(inputs, targets, size) * size
            if synchronised:
                self._after()
                steps += 1
                self.optimizer.zero_grad()  # only now: what follows a step may read gradients
            seen += size
        if not seen:
            raise InputError(
                f"the training data gave no batch in epoch {number + 1}; a generator gives its batches once: "
                "pass a list, a DataLoader or an object whose __iter__ starts anew"
            )
        self._synchronise()
        self.module.eval()
        self.wrapped.eval()
        mean = float(accelerator.reduce(total, "sum")) / seen / accelerator.num_processes
        if not math.isfinite(mean):
            raise GraphpruneError(
                f"the training loss of epoch {number + 1} is {mean}: lower lr, or give clip="
            )
        return mean, steps

    def _batches(self, data: Iterable[Any]) -> Iterator[tuple[Any, Any, bool]]:
        """Inputs, targets, and whether a step follows."""
        from accelerate.utils import send_to_device

        each = self.accelerator.gradient_accumulation_steps
        with self.numbers.data():
            batches = iter(data)
        batch, number = self._next(batches), 0
        while batch is not _END:
            due = (number + 1) % each == 0
            # Whether a batch is the last says the next one; nobody asks where every batch has its step.
            ahead = None if due else self._next(batches)
            inputs, targets = send_to_device(pair(batch, number), self.accelerator.device)
            yield inputs, targets, due or ahead is _END
            batch, number = self._next(batches) if due else ahead, number + 1

    def _next(self, batches: Iterator[Any]) -> Any:
        with self.numbers.data():
            return next(batches, _END)

    def _step(self, inputs: Any, targets: Any, size: int) -> Tensor:
        """Gradients of one batch and the optimizer's step; this process's part of the batch's mean loss."""
        accelerator, count = self.accelerator, self.accelerator.num_processes
        outputs = call(self.wrapped, inputs)
        value = self.loss(outputs, targets)
        if self.distillation is not None:
            value = self.distillation.loss(inputs, outputs, targets, value)
        if size >= count:  # processes are averaged, and parts may differ by one
            value = value * (samples(inputs) * count / size)
        for penalty in self.penalties:
            value = value + penalty()
        accelerator.backward(value)
        if accelerator.sync_gradients:
            for parameter in self.adapters if count > 1 else ():
                if parameter.grad is not None:
                    parameter.grad = accelerator.reduce(parameter.grad, "mean")
            if self.clip is not None:
                groups = self.optimizer.param_groups
                accelerator.clip_grad_norm_([p for group in groups for p in group["params"]], self.clip)
        self.optimizer.step()
        return value.detach()

    def _after(self) -> None:
        if self.scheduler is not None and not self.optimizer.step_was_skipped:
            self.scheduler.step()
        for each in self.after_step:
            each.step()
        if self.after_step and hasattr(self.distillation, "attach"):
            self.distillation.attach()  # a shrinker gives the module another graph
        if self.after_step and self._parameters() != self._shapes:
            require_held(self.optimizer.optimizer, self.module, self.adapters)
            self.release()  # what averages gradients was made for parameters of other shapes
            self._wrap()
            self.wrapped.train()

    def _synchronise(self) -> None:
        """Buffers of the first process for all: batch norm's statistics differ after the last step."""
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast

            with torch.no_grad():
                broadcast(list(self.module.buffers()))

    def release(self) -> None:
        """Take everything of Accelerate's off the module."""
        self.accelerator.sync_gradients = True
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.module.__dict__.pop("_is_accelerate_prepared", None)  # or it would not be wrapped the next time
        for kept, mine in (
            (self.accelerator._models, self.wrapped),
            (self.accelerator._optimizers, self.optimizer),
        ):
            kept[:] = [each for each in kept if each is not mine]


_END = object()
