"""Move the outliers of activations into weights (Xiao et al., *SmoothQuant: Accurate and Efficient
Post-Training Quantization for Large Language Models*, ICML 2023).

Some channels of what a transformer's matrix products read are tens of times larger than the rest, and one
scale for the tensor leaves the rest no integers. Weights have room:

    Y = (X diag(s)⁻¹) (diag(s) W),    s_j = max |X_j|^α / max |W_j|^(1 - α)    (eq. 3 and 4)

``X_j`` is channel ``j`` on calibration inputs, ``W_j`` all that it is multiplied with, over every product
that reads it. The division goes into what writes ``X``: the weight and bias of a layer or RMS norm, a gain,
an embedding table, or the rows of another product, with whatever positively homogeneous operators in between
(an attention is one for its values: its result is linear in them).

>>> import torch, graphprune
>>> from graphprune.pipeline import Context
>>> block = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 16),
...                             torch.nn.GELU(), torch.nn.Linear(16, 8))
>>> block[0].weight.data[3] = 50
>>> graph = graphprune.trace(block, torch.zeros(1, 8))
>>> for note in SmoothQuant().run(graph, Context(calibration=[torch.randn(1, 8)])).notes[2:]:
...     print(note.kind, note.where)
changed layer_norm → linear
refused linear → ?
refused linear_1 → ?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from graphprune.calibration import Call, read
from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.importance.readers import owners
from graphprune.operands import CONVOLUTIONS
from graphprune.pipeline import Context, Note, Pass, PassResult
from graphprune.runner import Runner

from .quantize.select import Selection
from .scaling import Segment, cast, refusals, segments


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Divide activations by their outliers, and multiply the weights that read them.

    Attributes:
        alpha: how much of the difficulty moves, 0 (none) to 1 (all of it); activations whose outliers are
            far out want more than one half.
        limit: calibration samples to read.
        ignored: operators, modules or parameters that keep their weights, by name or glob.
    """

    name: ClassVar[str] = "smooth-quant"
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    alpha: float = 0.5
    limit: int = 128
    ignored: tuple[str, ...] = ()

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Rescale weights and gains; notes say where, and why not elsewhere."""
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha must be between 0 and 1, got {self.alpha}")
        selection = Selection(graph, self.ignored, ())
        found = [(s, _refused(s, selection)) for s in segments(graph) if s.role("writer", "gain")]
        chosen, refused = [s for s, why in found if not why], refusals(found)
        if not chosen:
            nothing = Note("info", "", "no matrix product reads what a gain or another product writes")
            return PassResult(graph, False, (nothing, *refused))
        if context.calibration is None:
            raise PassError(self.name, "needs calibration inputs to see outliers in: give calibration")
        inputs = read(graph, context.calibration, self.limit)
        seen = _watch(graph, inputs.calls, chosen)
        values = {m.tensor: graph.tensors[m.tensor].detach().double() for s in chosen for m in s.members}
        notes: list[Note] = []
        for segment in chosen:
            was = peaks(segment, seen)
            factor = factors(was, segment, values, self.alpha)
            for member in segment.members:
                share = 1 / factor if member.role == "reader" else factor
                values[member.tensor] = member.scaled(values[member.tensor], share)
            # Heads and their width are two axes of the same channels: the second sees what the first left.
            for source, owner in _places(segment).items():
                seen[source] = seen[source] * torch.cat([factor, factor.new_ones(1)])[owner]
            change = f"largest over median channel {outlier(was):.3g} to {outlier(was * factor):.3g}"
            notes.append(Note("changed", str(segment), change))
        result = graph.copy()
        result.set_tensors(
            {name: cast(self.name, name, value, graph.tensors[name]) for name, value in values.items()}
        )
        said = Note("info", "", f"{len(chosen)} activations smoothed, {len(refused)} left")
        return PassResult(result, True, (said, *inputs.notes, *notes, *refused))


def _refused(segment: Segment, selection: Selection) -> str:
    if segment.refused:
        return segment.refused
    readers = segment.role("reader")
    if not readers:
        return "no matrix product reads it"
    for member in segment.members:
        assert member.node is not None
        if member.role == "reader" and member.node.target in CONVOLUTIONS:
            return f"{member.node.name}, a convolution, reads it; equalize is for those"
        why = selection.skipped(member.node)
        if why:
            return why
    return ""


def factors(seen: Tensor, segment: Segment, values: Mapping[str, Tensor], alpha: float) -> Tensor:
    """What every position of the activation is multiplied with, ``1 / s``; 1 where there is nothing.

    Args:
        seen: the largest magnitude at every position, float64 ``[positions]``.
        segment: whose weights read it.
        values: the tensors by name, float64.
        alpha: as the pass has it.
    """
    weights = [member.peaks(values[member.tensor], segment.size) for member in segment.role("reader")]
    weight = torch.stack(weights).amax(0)
    usable = (seen > 0) & (weight > 0)
    return torch.where(usable, weight ** (1 - alpha) / seen**alpha, 1.0)


def peaks(segment: Segment, seen: Mapping[fx.Node, Tensor]) -> Tensor:
    """The largest magnitude at every position over all that products read of a segment, float64."""
    found = torch.zeros(segment.size + 1, dtype=torch.float64)
    for source, owner in _places(segment).items():
        found.scatter_reduce_(0, torch.where(owner < 0, segment.size, owner), seen[source], "amax")
    return found[:-1]


def outlier(values: Tensor) -> float:
    """The largest over the median of the channels' magnitudes, zeros left out; 1 where all are zero."""
    values = values[values > 0]
    return float(values.max() / values.median()) if len(values) else 1.0


def _places(segment: Segment) -> dict[fx.Node, Tensor]:
    """What products read, and for every channel of it the position of the segment, -1 for none."""
    return {
        member.linear.source: torch.from_numpy(owners(member.linear.inputs, segment.atom))
        for member in segment.role("reader")
        if member.linear is not None
    }


def _watch(graph: Graph, calls: Sequence[Call], chosen: Sequence[Segment]) -> dict[fx.Node, Tensor]:
    """The largest magnitude of every channel that a product reads, float64 ``[channels]``."""
    sources = {source for segment in chosen for source in _places(segment)}
    wanted = [node for node in graph.fx.nodes if node in sources]
    seen: dict[fx.Node, Tensor] = {}
    for call in calls:
        runner = Runner(graph, [call], keep=wanted)
        for source in wanted:
            runner.advance(source)
            given = runner.values(source)[0].detach()
            value = given.reshape(-1, given.shape[-1]).abs().double().amax(0)
            if not bool(torch.isfinite(value).all()):
                where = graph.where(source)
                raise InputError(f"{where}: holds values that are not finite on a calibration input")
            seen[source] = torch.maximum(seen[source], value) if source in seen else value
            runner.release(source)
    return seen
