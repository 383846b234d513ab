"""What works with the caller's training loop: schedules, sparsity, regularisers, distillation, fine-tuning.

Each is an object that the loop calls: ``loss.backward(); optimizer.step(); pruner.step()``.
"""

from __future__ import annotations

from .distill import (
    AttentionTransfer,
    Distillation,
    Hint,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
    SoftTargets,
)
from .finetune import finetune
from .iterate import iterate
from .regularize import GroupLasso, Growing, Slimming
from .rounds import Iterated, Round
from .schedules import Constant, Cubic, Exponential, OneCycle, Polynomial, Schedule
from .shrink import Shrink, remove
from .sparsify import Sparsify
from .state import State, Training
from .stochastic_depth import StochasticDepth

__all__ = [
    "AttentionTransfer",
    "Constant",
    "Cubic",
    "Distillation",
    "Exponential",
    "GroupLasso",
    "Growing",
    "Hint",
    "Iterated",
    "OneCycle",
    "Polynomial",
    "RelationalAngle",
    "RelationalDistance",
    "Round",
    "Schedule",
    "Shrink",
    "SimilarityPreserving",
    "Slimming",
    "SoftTargets",
    "Sparsify",
    "State",
    "StochasticDepth",
    "Training",
    "finetune",
    "iterate",
    "remove",
]
