"""Static quantization: quantizers around every operator that the target's runtime computes in integers.

Weights become symmetric integers with one scale an output channel, values between operators integers with
one scale each, taken from calibration inputs (Jacob et al., *Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference*, CVPR 2018; Nagel et al., *A White Paper on Neural Network
Quantization*, 2021). Which operators are quantized, and which values share a scale, follows from what the
target's runtime fuses (:mod:`.annotate`), so that no quantizer is left to run on its own in the middle of a
network. The graph computes the rounded numbers in float, as every runtime that reads it does.

>>> import torch, graphprune
>>> from graphprune.pipeline import Context
>>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> graph = graphprune.trace(net, torch.zeros(1, 8))
>>> done = Quantize().run(graph, Context(calibration=[torch.randn(1, 8) for _ in range(32)]))
>>> sorted(str(t.dtype) for t in done.graph.tensors.values() if t.dim() == 2)
['torch.int8', 'torch.int8']
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from graphprune.calibration import read
from graphprune.errors import PassError
from graphprune.graph import Graph
from graphprune.integers import Scheme
from graphprune.kinds import kind
from graphprune.pipeline import Context, Note, Pass, PassResult

from .annotate import Annotation, annotate
from .calibrate import calibrate
from .insert import insert
from .prepare import attention_refusal, has_parts, written_out
from .select import Selection


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantize to what the target's runtime computes in integers.

    Attributes:
        observer: what a range is taken from (:mod:`graphprune.quantization.observers`).
        percentile: of that observer.
        averaging: of ``moving-average``.
        bits: of weights, 2 to 8; fewer than 8 are stored as int8.
        attention: write attention out, so that its products run in integers, too.
        ignored: operators, modules or parameters that stay in float, by name or glob.
        only: operators, modules or parameters that alone are quantized, by name or glob.
        limit: calibration samples to read.
    """

    name: ClassVar[str] = "quantize"
    exact: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    ensures: ClassVar[frozenset[str]] = frozenset({"quantized"})
    destroys: ClassVar[frozenset[str]] = frozenset({"float", "trainable"})

    observer: str = "mse"
    percentile: float = 99.99
    averaging: float = 0.01
    bits: int = 8
    attention: bool = True
    ignored: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    limit: int = 128

    def run(self, graph: Graph, context: Context) -> PassResult:
        """A graph with quantizers; notes say what runs in integers, and what does not and why."""
        scheme = context.target.integers
        if scheme is None:
            raise PassError(self.name, f"nothing is known of integers on target {context.target.name!r}")
        if context.calibration is None:
            raise PassError(
                self.name,
                "needs calibration inputs to take ranges from: give calibration, some tens of typical inputs",
            )
        scheme = replace(scheme, weight=replace(scheme.weight, bits=self.bits))
        skipped = Selection(graph, self.ignored, self.only).skipped
        ready, notes = prepared(graph, scheme, skipped, attention=self.attention)
        found = annotate(ready, scheme, skipped)
        if not found.runs:
            nothing = Note("refused", "", "nothing in this network runs in integers on the target")
            return PassResult(graph, False, (nothing, *_floats(found)))
        inputs = read(ready, context.calibration, self.limit)
        options = {"percentile": {"percentile": self.percentile},
                   "moving-average": {"averaging": self.averaging}}.get(self.observer, {})  # fmt: skip
        ranges, odd = calibrate(found, inputs.calls, self.observer, options)
        insert(found, ranges)
        kinds = Counter(kind(node) for node in found.runs)
        said = Note("changed", "", ", ".join(f"{count} {what}" for what, count in kinds.most_common()))
        return PassResult(ready, True, (said, *inputs.notes, *notes, *odd, *_floats(found)))


def prepared(
    graph: Graph, scheme: Scheme, skipped: Callable[[fx.Node], str], *, attention: bool
) -> tuple[Graph, tuple[Note, ...]]:
    """A copy with operators written out whose parts run in integers, and what was not."""
    graph, notes = graph.copy(), []
    for node in graph.nodes:
        if kind(node) != "attention" or not attention or "matmul" not in scheme.inputs or skipped(node):
            continue
        reason = attention_refusal(node)
        if reason:
            notes.append(Note("refused", node.name, f"attention stays in float: {reason}"))
        else:
            written_out(graph, node)
    graph.propagate()
    for node in annotate(graph, scheme, skipped).runs:
        if has_parts(node):
            written_out(graph, node)
    return graph.propagate(), tuple(notes)


def _floats(found: Annotation) -> tuple[Note, ...]:
    return tuple(
        Note("refused", node.name, f"{kind(node)} stays in float: {reason}")
        for node, reason in found.floats.items()
        if kind(node) != "rescale"
    )
