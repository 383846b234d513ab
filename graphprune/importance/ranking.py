"""In which order the positions of an axis go, and what each costs.

>>> Ranking.of(torch.tensor([3.0, 1.0, 2.0]))
Ranking(order=(1, 2, 0), costs=(1.0, 2.0, 3.0))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ranking:
    """Every position of one axis, the first to go first.

    Attributes:
        order: the positions.
        costs: ``costs[k]`` is what removing ``order[k]`` costs once those before it are gone.
    """

    order: tuple[int, ...]
    costs: tuple[float, ...]

    @staticmethod
    def of(scores: torch.Tensor) -> Ranking:
        """The ranking of scores ``[size]`` that do not depend on what else is gone."""
        order = scores.argsort(stable=True)
        return Ranking(tuple(order.tolist()), tuple(scores[order].tolist()))
