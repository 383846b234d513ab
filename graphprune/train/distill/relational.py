"""Relations between the samples of a batch, which the student should keep: their manifold, not their values.

With a layer's values flattened to t_i (teacher) and s_i (student), one row a sample:

* distances (Park et al., 2019, equations 6 to 8): psi_ij = ||t_i - t_j|| / mean of them over all pairs,
* angles (Park et al., 2019, equations 9 to 11): cos of the angle at t_j between t_i and t_k,
* similarities (Tung & Mori, 2019, equations 1 to 4): G = T T^T with every row divided by its norm, T of rows
  t_i, and the same of the student; the loss is ||G_T - G_S||_F^2 / b^2 for b samples.

The first two compare with the Huber loss (delta 1), as a mean over pairs, or triples, of different samples.
None of them asks for equal numbers of channels or positions. Of several processes each compares its own part
of a batch.

>>> import torch
>>> teacher = torch.rand(5, 3)
>>> float(RelationalDistance("layer").value(teacher, 2 * teacher + 1, None)) < 1e-6  # a scale is no relation
True
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.errors import InputError

from .term import Term


@dataclass(frozen=True)
class RelationalDistance(Term):
    """Equal distances between samples, up to a common factor; two samples have only one, so from three on."""

    name: ClassVar[str] = "relational-distance"

    _: KW_ONLY
    weight: float = 25.0

    def value(self, teacher: Tensor, student: Tensor, adapter: nn.Module | None) -> Tensor:
        """Huber loss of the normalised distances, mean over pairs of different samples."""
        theirs, mine = (_distances(_flat(each, self.name, 3)) for each in (teacher, student))
        different = ~torch.eye(len(mine), dtype=torch.bool, device=mine.device)
        theirs, mine = theirs[different], mine[different]
        return F.smooth_l1_loss(mine / mine.mean(), theirs / theirs.mean())


@dataclass(frozen=True)
class RelationalAngle(Term):
    """Equal angles in the triangles of three samples. Memory grows with the cube of the batch size."""

    name: ClassVar[str] = "relational-angle"

    _: KW_ONLY
    weight: float = 50.0

    def value(self, teacher: Tensor, student: Tensor, adapter: nn.Module | None) -> Tensor:
        """Huber loss of the cosines, mean over triples of different samples."""
        theirs, mine = (_cosines(_flat(each, self.name, 3)) for each in (teacher, student))
        same = torch.eye(len(mine), dtype=torch.bool, device=mine.device)
        different = ~(same[:, :, None] | same[:, None, :] | same[None, :, :])
        return F.smooth_l1_loss(mine[different], theirs[different])


@dataclass(frozen=True)
class SimilarityPreserving(Term):
    """Samples that activate the teacher alike activate the student alike."""

    name: ClassVar[str] = "similarity-preserving"

    _: KW_ONLY
    weight: float = 3000.0

    def value(self, teacher: Tensor, student: Tensor, adapter: nn.Module | None) -> Tensor:
        """Mean square difference of the row-normalised similarities."""
        theirs, mine = (_similarities(_flat(each, self.name, 1)) for each in (teacher, student))
        return F.mse_loss(mine, theirs)


def _flat(value: Tensor, name: str, least: int) -> Tensor:
    if len(value) < least:
        raise InputError(f"{name}: needs {least} samples in a batch, got {len(value)}")
    return value.float().flatten(1)


def _distances(rows: Tensor) -> Tensor:
    """``[b, b]``; samples that are equal have a distance of almost 0, with a gradient."""
    return _squares(_gram(rows)).clamp_min(1e-12).sqrt()


def _cosines(rows: Tensor) -> Tensor:
    """``[j, i, k]``: cos of the angle at j between i and k, from inner products alone."""
    gram = _gram(rows)
    products = gram[None, :, :] - gram[:, :, None] - gram[:, None, :] + gram.diagonal()[:, None, None]
    lengths = _squares(gram).clamp_min(1e-12).sqrt()
    return products / (lengths[:, :, None] * lengths[:, None, :])


def _gram(rows: Tensor) -> Tensor:
    """Inner products of what is left after the mean is taken off, which changes no difference."""
    rows = rows - rows.mean(0, keepdim=True)
    return rows @ rows.T


def _squares(gram: Tensor) -> Tensor:
    return gram.diagonal()[:, None] + gram.diagonal()[None, :] - 2 * gram


def _similarities(rows: Tensor) -> Tensor:
    return F.normalize(rows @ rows.T, dim=1)
