"""What works with the caller's training loop: schedules, sparsity, regularisers, distillation, fine-tuning.

Each is an object that the loop calls: ``loss.backward(); optimizer.step(); pruner.step()``.
"""

from __future__ import annotations

from .finetune import finetune
from .schedules import Constant, Cubic, Exponential, OneCycle, Polynomial, Schedule
from .sparsify import Sparsify
from .state import State, Training

__all__ = [
    "Constant",
    "Cubic",
    "Exponential",
    "OneCycle",
    "Polynomial",
    "Schedule",
    "Sparsify",
    "State",
    "Training",
    "finetune",
]
