"""Equalize the ranges of channels across layers (Nagel et al., *Data-Free Quantization Through Weight
Equalization and Bias Correction*, ICCV 2019, section 4.1).

Between two layers with a positively homogeneous function ``f``, ``f(s x) = s f(x)``, every channel may have
a factor of its own:

    W2 f(W1 x + b1) + b2 = (W2 S) f(S⁻¹ W1 x + S⁻¹ b1) + b2,    S = diag(s)

With ``r1`` the largest magnitude in a row of ``W1`` and ``r2`` that in a column of ``W2``,
``s = sqrt(r1 r2) / r2`` (eq. 11) makes both equal, so that one scale for a whole tensor fits all its
channels. Layers in a row are equalized in turn until nothing moves. Where several layers write or read an
axis (a residual stream without a norm), a side's range is the largest of them, relative to each tensor's own.

Two things are not of the paper. A channel that is zero on either side stays as it is. And the bias is part of
a row's range: a channel of tiny weights and an ordinary bias, as batch norms leave behind, would otherwise
give activations that no scale can hold.

>>> import torch, graphprune
>>> from graphprune.pipeline import Context
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)).double()
>>> unbalanced = torch.tensor([0.01, 1.0, 100.0])
>>> for linear, weight in ((net[0], unbalanced[:, None]), (net[2], 1 / unbalanced)):
...     linear.weight.data, linear.bias.data = weight.expand_as(linear.weight).double(), linear.bias * 0
>>> done = Equalize().run(graphprune.trace(net, torch.randn(1, 4).double()), Context())
>>> print(done.notes[1].where, "|", done.notes[1].message)
linear → linear_1 | largest over smallest range of a channel 1e+04 to 1
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graphprune.graph import Graph
from graphprune.pipeline import Context, Note, Pass, PassResult

from .quantize.select import Selection
from .scaling import Member, Segment, cast, refusals, segments

_SWEEPS = 100
_SETTLED = 0.01  # natural logarithm of the largest factor of a sweep


@dataclass(frozen=True)
class Equalize(Pass):
    """Equal ranges for all channels of the weights on both sides of every axis that allows it.

    Attributes:
        ignored: operators, modules or parameters that keep their weights, by name or glob.
    """

    name: ClassVar[str] = "equalize"
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    ignored: tuple[str, ...] = ()

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Rescale weights until nothing moves; notes say which axes, and why others not."""
        selection = Selection(graph, self.ignored, ())
        found = [(s, _refused(s, selection)) for s in segments(graph) if s.role("writer", "gain")]
        chosen, refused = [s for s, why in found if not why], refusals(found)
        if not chosen:
            nothing = Note("info", "", "no two layers with only homogeneous operators between them")
            return PassResult(graph, False, (nothing, *refused))
        names = {member.tensor for segment in chosen for member in segment.members}
        values = {name: graph.tensors[name].detach().double() for name in names}
        before = [spread(segment, values) for segment in chosen]
        sweeps = _settle(chosen, values)
        if not sweeps:
            already = Note("info", "", f"the channels of all {len(chosen)} axes have equal ranges already")
            return PassResult(graph, False, (already, *refused))
        notes = [
            Note("changed", str(segment), f"largest over smallest range of a channel {was:.3g} to {now:.3g}")
            for segment, was, now in zip(
                chosen, before, (spread(segment, values) for segment in chosen), strict=True
            )
        ]
        result = graph.copy()
        result.set_tensors(
            {name: cast(self.name, name, value, graph.tensors[name]) for name, value in values.items()}
        )
        rest = "" if sweeps < _SWEEPS else "; they still move"
        said = Note("info", "", f"{len(chosen)} axes equalized in {sweeps} sweeps, {len(refused)} left{rest}")
        return PassResult(result, True, (said, *notes, *refused))


def _refused(segment: Segment, selection: Selection) -> str:
    if segment.refused:
        return segment.refused
    if segment.role("gain"):
        return f"{segment.role('gain')[0].node} writes it with a gain, not with a weight of rows"
    if not segment.role("reader"):
        return "no convolution or matrix product reads it"
    for member in segment.members:
        why = selection.skipped(member.node) if member.node is not None else ""
        if why:
            return why
    return ""


def _settle(chosen: Sequence[Segment], values: dict[str, Tensor]) -> int:
    """Sweep over all segments until the factors are near one; returns after how many sweeps that was."""
    for sweep in range(_SWEEPS):
        moved = 0.0
        for segment in chosen:
            factor = factors(segment, values)
            moved = max(moved, float(factor.log().abs().max()))
            for member in segment.members:
                share = 1 / factor if member.role == "reader" else factor
                values[member.tensor] = member.scaled(values[member.tensor], share)
        if moved < _SETTLED:
            return sweep
    return _SWEEPS


def factors(segment: Segment, values: dict[str, Tensor]) -> Tensor:
    """What every position of what is written is multiplied with, ``1/s`` of the paper; float64."""
    written = _ranges(segment.role("writer"), values, segment.size)
    read = _ranges(segment.role("reader"), values, segment.size)
    usable = (written > 0) & (read > 0)
    for member in segment.role("shift"):
        written = torch.maximum(written, member.peaks(values[member.tensor], segment.size))
    return torch.where(usable, (read / written).sqrt(), 1.0)


def _ranges(members: Iterable[Member], values: dict[str, Tensor], size: int) -> Tensor:
    """The largest magnitude at every position over several tensors of equal say."""
    peaks = [member.peaks(values[member.tensor], size) for member in members]
    peaks = [p for p in peaks if float(p.max()) > 0] or peaks[:1]
    if len(peaks) == 1:
        return peaks[0]
    common = math.exp(sum(math.log(float(p.max())) for p in peaks) / len(peaks))
    return torch.stack([p / p.max() * common for p in peaks]).amax(0)


def spread(segment: Segment, values: dict[str, Tensor]) -> float:
    """The largest over the smallest range of a channel, the worst of all members' weights."""
    return max(_spreads(segment, values), default=1.0)


def _spreads(segment: Segment, values: dict[str, Tensor]) -> Iterator[float]:
    for member in segment.role("writer", "reader"):
        peaks = member.peaks(values[member.tensor], segment.size)
        peaks = peaks[peaks > 0]
        if len(peaks):
            yield float(peaks.max() / peaks.min())
