r"""Running statistics of batch norms whose input has changed.

Taken from calibration inputs alone (``replaced``), mean and variance also carry over how few those are
and how they differ from what the network was trained on; the original would not give its own outputs with
them. So by default (``corrected``) the statistics are moved as far as the moments of the calibration
inputs moved, in the mean by difference and in the variance by ratio::

    mean' = mean + (E[pruned] - E[original])        var' = var · Var[pruned] / Var[original]

Where pruned and original read the same, nothing moves. Behind an operator that was just fitted only the mean
moves: least squares has chosen the spread, for the batch norm as it is, and what is missing of the original's
is what the operator cannot tell; blown up to the full variance, the error would grow with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from graphprune.passes.affine import Refusal
from torch import fx

from graphprune.graph import Graph

from .units import EQUAL, Record, names_of, widened

MODES = ("corrected", "replaced", "kept")


@dataclass
class Moments:
    """Mean and sum of squared deviations of every channel, in float64.

    Batches are merged exactly (Chan, Golub and LeVeque, 1983), so that a large mean does not drown a
    small variance.

    >>> moments = Moments()
    >>> moments.add(torch.tensor([[1.0], [3.0]]))          # [N, C, …]
    >>> moments.add(torch.tensor([[8.0]]))
    >>> moments.count, moments.mean.tolist(), moments.variance.tolist()
    (3, [4.0], [13.0])
    """

    count: int = 0
    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: torch.Tensor) -> None:
        """Take values ``[N, C, …]`` in."""
        count = x.numel() // x.shape[1]
        around = [dim for dim in range(x.dim()) if dim != 1]
        variance, mean = torch.var_mean(x.double(), dim=around, correction=0)
        squares = variance * count
        if self.count:
            total, step = self.count + count, mean - self.mean
            squares = self.squares + squares + step.square() * (self.count * count / total)
            mean = self.mean + step * (count / total)
        self.mean, self.squares, self.count = mean, squares, self.count + count

    @property
    def variance(self) -> torch.Tensor:
        """The unbiased variance ``[C]``."""
        return self.squares / (self.count - 1)


@dataclass
class Recalibrate:
    """Batch norms that share running statistics.

    Attributes:
        nodes: in execution order.
        mean, variance: names of the buffers.
        mode: ``corrected`` or ``replaced``.
        rescale: whether ``corrected`` moves variances, too; not where what they read was just fitted.
        base: the original's statistics, by name: those to correct, also where that was done before.
    """

    nodes: list[fx.Node]
    mean: str
    variance: str
    mode: str
    base: Mapping[str, torch.Tensor]
    rescale: bool = True
    _found: Moments = field(default_factory=Moments)
    _wanted: Moments = field(default_factory=Moments)
    _error: float = 0.0
    _signal: float = 0.0

    def begin(self, graph: Graph, seed: int) -> None:
        """Forget what was seen."""
        self._found, self._wanted, self._error, self._signal = Moments(), Moments(), 0.0, 0.0

    def observe(self, x: torch.Tensor, wanted: torch.Tensor) -> None:
        """Take one batch in: the input ``[N, C, …]`` of the pruned network, and of the original.

        Raises:
            Refusal: their shapes differ.
        """
        if x.shape != wanted.shape:
            raise Refusal(
                f"it reads {tuple(x.shape)}, where the plan leaves {tuple(wanted.shape)} of the original"
            )
        self._found.add(x)
        self._wanted.add(wanted)
        self._error += float((widened(x) - widened(wanted)).square_().sum(dtype=torch.float64))
        self._signal += float(widened(wanted).square().sum(dtype=torch.float64))

    def settle(self, graph: Graph) -> Record | None:
        """Write the statistics into ``graph``; ``None`` where the input is still the original's.

        Raises:
            Refusal: there are too few values, or some are not finite.
        """
        old_mean, old_variance = self.base[self.mean], self.base[self.variance]
        if self._error <= EQUAL.get(old_mean.dtype, 0.0) ** 2 * self._signal:
            graph.set_tensors({self.mean: old_mean, self.variance: old_variance})
            return None
        found, wanted = self._found, self._wanted
        if found.count < 2:
            raise Refusal("a single value a channel has no variance")
        mean, variance = found.mean, found.variance
        if self.mode == "corrected":
            mean = old_mean.double() + (mean - wanted.mean)
            # A channel that is constant in the original says nothing of how its variance changed.
            varies = wanted.variance > 1e-12 * (wanted.mean.square() + old_variance.double())
            base = wanted.variance.where(varies, torch.ones_like(variance))
            ratio = (variance / base).where(varies & self.rescale, torch.ones_like(variance))
            variance = old_variance.double() * ratio
        if not bool(torch.isfinite(mean).all() and torch.isfinite(variance).all()):
            raise Refusal("its input is not finite on calibration inputs")
        values = {self.mean: mean.to(old_mean.dtype), self.variance: variance.to(old_variance.dtype)}
        graph.set_tensors(values)
        before = math.sqrt(self._error / self._signal) if self._signal else math.nan
        return Record(
            names_of(self.nodes), "statistics", graph.where(self.nodes[0]), found.count, before, math.nan
        )
