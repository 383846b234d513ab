"""Distillation: a student learns a teacher's probabilities, attention maps, values or relations."""

from __future__ import annotations

from .attention import AttentionTransfer
from .distillation import Distillation
from .hints import Hint
from .relational import RelationalAngle, RelationalDistance, SimilarityPreserving
from .soft_targets import SoftTargets
from .term import Term

__all__ = [
    "AttentionTransfer", "Distillation", "Hint", "RelationalAngle", "RelationalDistance",
    "SimilarityPreserving", "SoftTargets", "Term",
]  # fmt: skip
