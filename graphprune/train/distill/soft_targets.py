"""Soft targets: the student imitates the teacher's probabilities (Hinton, Vinyals & Dean, 2015).

With temperature T, teacher's logits v and student's logits z,

    L = T^2 KL(softmax(v / T) || softmax(z / T)),

mean over samples. Gradients of the divergence shrink with 1 / T^2, which the factor undoes (section 2.1
there), so that its part beside the labels' loss does not depend on the temperature.

>>> import torch
>>> term = SoftTargets(temperature=2.0)
>>> float(term.value(torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 0.0]]), None))
0.0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.errors import InputError

from .term import Layer, Term


@dataclass(frozen=True)
class SoftTargets(Term):
    """The teacher's probabilities as targets. Its share of the loss is the distillation's ``alpha``.

    Attributes:
        layers: where the logits are; the networks' results by default.
        temperature: above 1 it brings out what the teacher holds of the classes that are not the right one.
        classes: which dimension they are; by default the last of up to three, and the second otherwise.
    """

    name: ClassVar[str] = "soft-targets"

    layers: Layer | Sequence[Layer] = ""
    _: KW_ONLY
    temperature: float = 4.0
    classes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise InputError(f"{self.name}: temperature must be above 0, got {self.temperature}")

    def value(self, teacher: Tensor, student: Tensor, adapter: nn.Module | None) -> Tensor:
        """T² times the divergence, mean over everything but the classes."""
        if teacher.shape != student.shape:
            shapes = f"{list(teacher.shape)} and {list(student.shape)}"
            raise InputError(f"{self.name}: logits of teacher and student have different shapes, {shapes}")
        classes = self.classes if self.classes is not None else (-1 if student.dim() < 4 else 1)
        targets = (teacher.float() / self.temperature).log_softmax(classes)
        given = (student.float() / self.temperature).log_softmax(classes)
        divergence = F.kl_div(given, targets, reduction="none", log_target=True).sum(classes)
        return divergence.mean() * self.temperature**2
