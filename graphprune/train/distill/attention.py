"""Attention transfer: the student looks where the teacher looks (Zagoruyko & Komodakis, 2017).

The attention map of a layer's value A is the vector of Q_i = sum_c |A_ci|^p over its positions i. With the
maps of teacher and student in layers j, equation 2 of the paper adds

    beta / 2  sum_j || Q_Sj / ||Q_Sj||_2  -  Q_Tj / ||Q_Tj||_2 ||_2

to the loss, here as a mean over the samples. Channels are summed over, so that a pruned student's numbers of
them do not matter. Maps of different sizes are averaged over regions down to the smaller one.

>>> import torch
>>> value = torch.rand(2, 3, 4, 4)
>>> float(AttentionTransfer("layer").value(value, 2 * value[:, :1].expand(-1, 5, -1, -1), None)) > 0
True
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.errors import InputError

from .term import Term, channels_first, pooled


@dataclass(frozen=True)
class AttentionTransfer(Term):
    """Equal attention maps.

    Attributes:
        layers: convolutions' or blocks', with positions to attend to; sequences of transformers too.
        weight: beta of the equation above.
        power: p.
        channels: which dimension they are (:func:`graphprune.train.distill.term.channels_first`).
    """

    name: ClassVar[str] = "attention-transfer"

    _: KW_ONLY
    weight: float = 1.0
    power: float = 2.0
    channels: int | None = None

    def value(self, teacher: Tensor, student: Tensor, adapter: nn.Module | None) -> Tensor:
        """Half the distance of the normalised maps, mean over samples."""
        maps = [self.map(each) for each in (teacher, student)]
        if maps[0].dim() != maps[1].dim():
            shapes = f"{list(teacher.shape)} and {list(student.shape)}"
            raise InputError(f"{self.name}: values of {shapes} have no positions in common")
        size = [min(sizes) for sizes in zip(*(each.shape[2:] for each in maps), strict=True)]
        unit = [F.normalize(pooled(each, size, self.name).flatten(1), dim=1) for each in maps]
        return torch.linalg.vector_norm(unit[1] - unit[0], dim=1).mean() / 2

    def map(self, value: Tensor) -> Tensor:
        """The attention map ``[batch, 1, *positions]`` of a layer's value."""
        if value.dim() < 3:
            raise InputError(
                f"{self.name}: a value of shape {list(value.shape)} has no positions to attend to"
            )
        first = channels_first(value.float(), self.channels, self.name)
        return first.abs().pow(self.power).sum(1, keepdim=True)
