"""The epochs of ``finetune``: batches, gradients and steps, on what Accelerate prepared.

With ``gradient_accumulation_steps`` above 1 a step comes after so many batches, counted anew in every epoch,
and after an epoch's last batch, so that no gradient is lost or carried into the next. Every batch counts the
same: a step after fewer batches, at the end, is as much smaller, as it is in Accelerate's own loaders.

Before every step loss and gradients have to be finite, in all processes. Where they are not, there is no
step, and the module is what it was before its batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from graphprune.errors import GraphpruneError, InputError

from .batches import call, finite, pair, samples, share
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
        begins = True
        for batch, (inputs, targets, synchronised) in enumerate(self._batches(data), 1):
            if begins:
                self._remember()
            begins = synchronised
            size = samples(inputs)
            inputs, targets = share(
                (inputs, targets), size, index=accelerator.process_index, count=accelerator.num_processes
            )
            accelerator.sync_gradients = synchronised
            with nullcontext() if synchronised or self._every_batch else accelerator.no_sync(self.wrapped):
                value, norm = self._gradients(inputs, targets, size)
            total += value * size
            if synchronised:
                self._require_finite(total, norm, inputs, f"epoch {number + 1}, batch {batch}")
                self.optimizer.step()
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
        return float(accelerator.reduce(total, "sum")) / seen / accelerator.num_processes, steps

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

    def _gradients(self, inputs: Any, targets: Any, size: int) -> tuple[Tensor, Tensor | None]:
        """This process's part of a batch's mean loss, and the norm of all gradients where a step follows."""
        accelerator, count = self.accelerator, self.accelerator.num_processes
        outputs = call(self.wrapped, inputs)
        value = _scalar(self.loss(outputs, targets), "the loss function")
        if self.distillation is not None:
            value = self.distillation.loss(inputs, outputs, targets, value)
        if size >= count:  # processes are averaged, and parts may differ by one
            value = value * (samples(inputs) * count / size)
        for penalty in self.penalties:
            value = value + penalty()
        value = _scalar(value, "the loss with distillation and penalties")
        if not value.requires_grad:
            raise InputError(
                "the loss has no gradient: it was detached or made of numbers (.item()), or nothing that is "
                "trained takes part in it"
            )
        accelerator.backward(value)
        return value.detach(), self._norm() if accelerator.sync_gradients else None

    def _norm(self) -> Tensor:
        """Of all gradients together, before they are clipped."""
        accelerator = self.accelerator
        for parameter in self.adapters if accelerator.num_processes > 1 else ():
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.clip is not None:
            return accelerator.clip_grad_norm_(parameters, self.clip)
        slopes = [p.grad for p in parameters if p.grad is not None]
        return get_total_norm([g.coalesce().values() if g.is_sparse else g for g in slopes])

    def _remember(self) -> None:
        """What the batches of a step write into before it: batch norm's statistics."""
        self._before = [(buffer, buffer.detach().clone()) for buffer in self.module.buffers()]

    def _require_finite(self, total: Tensor, norm: Tensor | None, inputs: Any, where: str) -> None:
        """Raise, in every process, before a step that would ruin the module; its statistics are put back.

        Raises:
            GraphpruneError: the loss is not finite, or a gradient; a scaler leaves out the latter's step.
        """
        accelerator = self.accelerator
        losses = torch.isfinite(total)
        slopes = losses if norm is None or accelerator.scaler is not None else torch.isfinite(norm)
        if bool(accelerator.reduce((losses & slopes).float(), "mean") == 1):
            return
        with torch.no_grad():
            for buffer, value in self._before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        self.optimizer.optimizer.zero_grad()
        what = (
            "training loss"
            if not bool(losses)
            else "gradient"
            if not bool(slopes)
            else "other process's loss"
        )
        if not finite(inputs):
            cause = "the batch's inputs are not finite, either"
        elif not finite(list(self.module.parameters())):
            cause = "the module's parameters were not finite before"
        else:
            cause = "lower lr, or give clip="
        raise GraphpruneError(
            f"the {what} is not finite ({where}), and the module is as it was before that step: {cause}"
        )

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


def _scalar(value: Any, what: str) -> Tensor:
    if isinstance(value, Tensor) and not value.dim():
        return value
    given = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise InputError(
        f"{what} gave {given}; it must be a scalar tensor, the mean over the batch (reduction='mean'), with "
        "the gradient that float() and .item() drop"
    )
