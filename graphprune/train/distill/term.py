"""What every term of a distillation has: layers to compare, a weight, and a value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.errors import InputError

Layer = str | tuple[str, str]


@dataclass(frozen=True)
class Term(ABC):
    """One way in which a student should resemble its teacher; all but the layers by keyword.

    Attributes:
        layers: a name for both networks, or a pair (teacher's name, student's name); see
            :mod:`graphprune.train.distill.taps` for what a name means. One alone needs no tuple.
        weight: what the term's value is multiplied with in the loss.

    Raises:
        InputError: layers are no names, or the weight is below 0.
    """

    name: ClassVar[str]

    layers: Layer | Sequence[Layer] = ()
    _: KW_ONLY
    weight: float = 1.0

    def __post_init__(self) -> None:
        layers = (self.layers,) if isinstance(self.layers, str) else self.layers
        for each in layers if isinstance(layers, Sequence) else (layers,):
            pair = (
                isinstance(each, (tuple, list)) and len(each) == 2 and all(isinstance(n, str) for n in each)
            )
            if not isinstance(each, str) and not pair:
                raise InputError(
                    f"{self.name}: layers are names, or pairs (teacher's, student's) of them, got {each!r}; "
                    "everything else is given by keyword, as in SoftTargets(temperature=4.0)"
                )
        if not self.weight >= 0:
            raise InputError(f"{self.name}: weight must be at least 0, got {self.weight}")

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(teacher's name, student's name) of every layer."""
        layers = (self.layers,) if isinstance(self.layers, str) else self.layers
        return tuple((each, each) if isinstance(each, str) else (each[0], each[1]) for each in layers)

    def adapter(self, teacher: Tensor, student: Tensor) -> nn.Module | None:
        """What learns to make the teacher's value of the student's, for one layer; ``None`` by default."""
        return None

    @abstractmethod
    def value(self, teacher: Tensor, student: Tensor, adapter: nn.Module | None) -> Tensor:
        """How far apart the two values of one layer are: a scalar."""


def channels_first(value: Tensor, channels: int | None, where: str) -> Tensor:
    """``[batch, channels, *positions]`` of a layer's value.

    Args:
        value: from three dimensions on, or two for a vector per sample.
        channels: which dimension the channels are. By default the last of three (sequences: batch, position,
            feature) and the second otherwise (convolutions).
        where: what errors call it.

    Raises:
        InputError: the value has one dimension, or ``channels`` is none of its.
    """
    if value.dim() < 2:
        raise InputError(f"{where}: a value of shape {list(value.shape)} has no channels")
    if channels is None:
        channels = -1 if value.dim() == 3 else 1
    if not -value.dim() < channels < value.dim() or channels % value.dim() == 0:
        raise InputError(f"{where}: channels={channels} is no dimension of {list(value.shape)} but the batch")
    return value.movedim(channels, 1)


def pooled(value: Tensor, size: Sequence[int], where: str) -> Tensor:
    """``[batch, channels, *positions]`` averaged over regions down to ``size`` positions (1 to 3 of them)."""
    if tuple(value.shape[2:]) == tuple(size):
        return value
    if value.dim() - 2 != len(size):
        raise InputError(
            f"{where}: positions of shapes {list(value.shape[2:])} and {list(size)} do not compare"
        )
    pools: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
    return pools[len(size)](value, list(size))
