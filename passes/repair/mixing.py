r"""Operators too wide for a fit of their own: their inputs are put back together, channel by channel.

A convolution with 1,024 channels under a kernel of 64 has 65,536 inputs, and least squares would need their
moments. What the removed channels were is nearly the same question at every tap, so it is asked once: with
``u`` the original's channels at one position and ``x`` the pruned network's there, ``M`` and ``m`` minimise

    sum |u - x (S + M) - m|^2 + n lambda |M|^2,

where ``S`` takes the channels that stayed for themselves. The original's weight on what is left is then

    W'[o, c, k] = sum_i (S + M)[c, i] W[o, i, k],

and the bias takes what the result lacks on average. That costs moments of channels, not of channels times
taps; it is not the best weight, as it asks for the inputs instead of the result.

The same goes for a linear behind a flattened image, where a tap is a position of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from graphprune.passes.affine import Refusal
from torch import fx

from graphprune.axes.terms import Product, resolve
from graphprune.graph import Graph

from .rows import CHUNK, form, operands
from .solve import RIDGE
from .units import Compute, Record, Refit, widened


@dataclass
class _Side:
    """What one weight leaves of the target: its sum ``[out]``, its sum of squares, and of how many rows."""

    total: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    error: float = 0.0
    rows: int = 0

    def add(self, rest: torch.Tensor) -> None:
        """Take ``[rows, out]`` in."""
        self.total = self.total.to(rest.device) + rest.sum(0, dtype=torch.float64)
        self.error += float(rest.square().sum(dtype=torch.float64))
        self.rows += len(rest)

    def left(self, intercept: bool) -> tuple[torch.Tensor, float]:
        """The best constant (0 without an intercept), and the sum of squares that it leaves."""
        shift = self.total / self.rows * intercept
        return shift, max(0.0, self.error - self.rows * float(shift.square().sum()))


@dataclass
class Mix(Refit):
    """One wide operator.

    Attributes:
        source: what the original's operator reads.
        kept: which of its channels are left, ``[channels]``.
        full: the original's weight ``[out, channels, taps]``: outputs cut by the plan, inputs all there.
    """

    source: fx.Node = field(kw_only=True)
    kept: torch.Tensor = field(kw_only=True)
    full: torch.Tensor = field(kw_only=True)
    _new: dict[str, torch.Tensor] = field(default_factory=dict)
    _old_side: _Side = field(default_factory=_Side)
    _new_side: _Side = field(default_factory=_Side)
    _signal: float = 0.0

    def begin(self, graph: Graph, seed: int) -> None:
        """Forget what was seen."""
        super().begin(graph, seed)
        self._old_side, self._new_side, self._signal = _Side(), _Side(), 0.0

    def read(self, x: torch.Tensor, original: torch.Tensor) -> None:
        """Take one batch of inputs in, the pruned network's and the original's.

        Raises:
            Refusal: their shapes do not belong together.
        """
        channels = int(self.kept.sum())
        x, original = self._positions(x, channels), self._positions(original, len(self.kept))
        if x.shape[:2] != original.shape[:2]:
            raise Refusal(
                f"it reads {tuple(x.shape[:2])} positions, the original {tuple(original.shape[:2])}"
            )
        picked = self._draw(*x.shape[:2]).to(x.device)
        step = max(1, CHUNK // (picked.shape[1] * original.shape[2]))
        for start in range(0, len(x), step):
            chosen = picked[start : start + step]
            sample = torch.arange(start, start + len(chosen), device=x.device).unsqueeze(1)
            rows = widened(x[sample, chosen].flatten(0, 1))
            rest = widened(original[sample, chosen].flatten(0, 1))
            target = rest.clone()
            rest[:, self.kept] -= rows
            self.gram.add(rows.unsqueeze(0), rest.unsqueeze(0), target)

    def _positions(self, value: torch.Tensor, channels: int) -> torch.Tensor:
        """``[images, positions, channels]``."""
        if form(self.nodes[0]).kind in ("linear", "product"):
            return value.reshape(-1, channels, value.shape[-1] // channels).mT
        images = value if value.dim() == self._old[self.weight].dim() else value.unsqueeze(0)
        return images.flatten(2).mT

    def mix(self) -> None:
        """Put the weight together from the moments of the inputs.

        Raises:
            Refusal: an input is not finite.
        """
        if not self.gram.finite:
            raise Refusal("its input or target is not finite on calibration inputs")
        change, _ = self.gram.solve(RIDGE if self.options.ridge is None else self.options.ridge, True)
        mixture = change[0]  # [kept, channels]
        mixture[torch.arange(len(mixture)), self.kept.nonzero().flatten()] += 1
        full, old = widened(self.full), self._old[self.weight]
        weight = torch.einsum("ci,oit->oct", mixture.to(full.dtype), full)
        self._new = {**self._old, self.weight: like_weight(form(self.nodes[0]).kind, weight, old)}

    def compare(self, wanted: torch.Tensor, whole: torch.Tensor, compute: Compute) -> None:
        """Take one batch of results in: what is wanted, with its scale, and what computes them.

        Raises:
            Refusal: they have another shape than the target.
        """
        old, new = compute(self._old), compute(self._new)
        if old.shape != wanted.shape:
            raise Refusal(f"it gives {tuple(old.shape)}, where the plan leaves {tuple(wanted.shape)}")
        channel = (
            -1 if form(self.nodes[0]).kind in ("linear", "product") else 1 - self._old[self.weight].dim()
        )
        for side, found in zip((self._old_side, self._new_side), (old, new), strict=True):
            side.add((widened(wanted) - widened(found)).movedim(channel, -1).flatten(0, -2))
        self._signal += float(widened(whole).square().sum(dtype=torch.float64))

    def settle(self, graph: Graph) -> Record | None:
        """Write weight and bias into ``graph``; ``None`` where there is nothing to repair.

        Where mixing brings the result no nearer than the old weight, that stays, and the bias alone moves.

        Raises:
            Refusal: the result would be no nearer.
        """
        before = self._old_side.error
        if self.exact(before, self._signal):
            self.restore(graph)
            return None
        sides = {self.weight: self._new_side.left(self.intercept), "": self._old_side.left(self.intercept)}
        chosen = min(sides, key=lambda name: sides[name][1])
        shift, after = sides[chosen]
        if not after < before:
            raise Refusal("what is left of its input tells nothing of what was removed")
        self.write(graph, (self._new if chosen else self._old)[self.weight], shift)
        before, after = (math.sqrt(v / (self._signal or math.nan)) for v in (before, after))
        name = self.nodes[0].name
        return Record((name,), "mixing", graph.where(self.nodes[0]), self.gram.rows, before, after)


def like_weight(kind: str, weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``[out, channels, taps]`` in the layout of a weight."""
    if kind == "transposed":
        return weight.transpose(0, 1).reshape(like.shape)
    if kind == "product":
        return weight.flatten(1).mT.reshape(like.shape)
    return weight.reshape(like.shape)


def wide(
    original: Graph, twin: fx.Node, gone: Any, weight: torch.Tensor
) -> tuple[fx.Node, torch.Tensor, torch.Tensor]:
    """Source, kept channels and full weight of a :class:`Mix`.

    Args:
        original: the graph before removal.
        twin: its operator.
        gone: type of a dimension → mask of what is removed from it.
        weight: the operator's weight, cut in its outputs alone.

    Raises:
        Refusal: its inputs cannot be put together channel by channel.
    """
    shape, source = form(twin), operands(twin)[0]
    if shape.groups != 1:
        raise Refusal("its groups are too wide to be fitted")
    dims: Any = original.typing.dims[source]
    if shape.kind in ("convolution", "transposed"):
        full = weight.transpose(0, 1) if shape.kind == "transposed" else weight
        kept = ~gone(dims[1 - weight.dim()])
        return source, torch.from_numpy(kept), full.flatten(2)
    term = resolve(dims[-1])
    channels = term.factors[0].size if isinstance(term, Product) else term.size
    by_channel = ~gone(term).reshape(channels, -1)
    if not np.array_equal(by_channel.all(1), by_channel.any(1)):
        raise Refusal("its inputs are too many to be fitted, and are not removed channel by channel")
    matrix = weight.mT if shape.kind == "product" else weight
    return source, torch.from_numpy(by_channel.all(1)), matrix.unflatten(1, (channels, -1))
