"""Hints: the student's layer, through a learned adapter, gives the teacher's value (Romero et al., 2015).

With the teacher's value u, the student's v and the adapter r, equation 3 of the paper is 1/2 ||u - r(v)||^2;
here it is a mean over elements, so that the weight does not depend on the layer's size. The adapter is a
convolution (a linear map where there are no positions) and has, as there, the kernel that makes positions
fit: student's size - teacher's size + 1. Where the student has fewer positions, the teacher's are averaged
over regions.

FitNets train in two stages, hints first: that is a distillation with ``alpha=1`` and hints alone.

>>> import torch
>>> hint = Hint("layer")
>>> hint.adapter(torch.zeros(1, 8, 4, 4), torch.zeros(1, 3, 6, 6))
Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.errors import InputError

from .term import Term, channels_first, pooled

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Hint(Term):
    """Values of the teacher's layers from the student's.

    Attributes:
        channels: which dimension they are (:func:`graphprune.train.distill.term.channels_first`).
    """

    name: ClassVar[str] = "hint"

    _: KW_ONLY
    channels: int | None = None

    def adapter(self, teacher: Tensor, student: Tensor) -> nn.Module:
        """A convolution or linear map from the student's channels to the teacher's; it is trained."""
        guide, guided = self._first(teacher), self._first(student)
        positions = guide.dim() - 2
        if positions != guided.dim() - 2 or positions > 3:
            shapes = f"{list(teacher.shape)} and {list(student.shape)}"
            raise InputError(f"{self.name}: no adapter from the student's to the teacher's of {shapes}")
        if not positions:
            return nn.Linear(guided.shape[1], guide.shape[1])
        sizes = zip(guided.shape[2:], guide.shape[2:], strict=True)
        kernel = tuple(max(1, mine - theirs + 1) for mine, theirs in sizes)
        return _CONVOLUTIONS[positions](guided.shape[1], guide.shape[1], kernel)

    def value(self, teacher: Tensor, student: Tensor, adapter: nn.Module | None) -> Tensor:
        """Half the mean square of the difference."""
        assert adapter is not None
        weight: Tensor = adapter.weight  # type: ignore[assignment]
        guide, guided = self._first(teacher.float()), self._first(student.float())
        if guided.shape[1] != weight.shape[1]:
            raise InputError(
                f"{self.name}: the student's layer has {guided.shape[1]} channels now, and its adapter was "
                f"made for {weight.shape[1]}; make a new Distillation after pruning"
            )
        made = adapter(guided)
        return F.mse_loss(made, pooled(guide, made.shape[2:], self.name)) / 2

    def _first(self, value: Tensor) -> Tensor:
        return channels_first(value, self.channels, self.name)
