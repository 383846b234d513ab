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
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.kinds import kind
from graphprune.pipeline import Context, Note, Pass, PassResult
from graphprune.quantization.parameters import Parameters
from graphprune.quantization.rounding import METHODS

from .annotate import Annotation
from .select import Selection
from .staged import Staged, float_notes

__all__ = ["Quantize", "Staged"]

# Outputs that sum over more numbers than this are rounded to the nearest at 8 bits, unless asked otherwise.
NARROW = 256


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantize to what the target's runtime computes in integers.

    Attributes:
        observer: what a range is taken from (:mod:`graphprune.quantization.observers`).
        percentile: of that observer.
        averaging: of ``moving-average``.
        bits: of weights, 2 to 8; fewer than 8 are stored as int8.
        rounding: of weights: ``nearest``, ``gptq``, ``adaround``, or ``auto``: ``gptq`` below 8 bits, and at
            8 ``adaround`` for outputs that sum over few numbers, as depthwise convolutions do: there one
            rounding weighs most.
        embeddings: keep the tables of embeddings, and weights of operators without an integer kernel, as
            integers, too.
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
    for_runtime: ClassVar[bool] = True

    observer: str = "mse"
    percentile: float = 99.99
    averaging: float = 0.01
    bits: int = 8
    rounding: str = "auto"
    embeddings: bool = True
    attention: bool = True
    ignored: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    limit: int = 128

    def run(self, graph: Graph, context: Context) -> PassResult:
        """A graph with quantizers; notes say what runs in integers, and what does not and why."""
        staged = self.staged(graph, context)
        found = staged.found
        if not found.runs:
            nothing = Note("refused", "", "nothing in this network runs in integers on the target")
            return PassResult(graph, False, (nothing, *float_notes(found)))
        weights = self.weights(staged, context.seed)
        result, tables = staged.quantized(weights=weights, tables=self.embeddings)
        notes = (summary(found), *staged.notes, *tables, *float_notes(found))
        return PassResult(result, True, notes)

    def staged(self, graph: Graph, context: Context) -> Staged:
        """The network with everything that quantizing it takes.

        Raises:
            PassError: the target computes nothing in integers, or there are no calibration inputs.
            InputError: an option or a calibration input does not fit.
        """
        scheme = context.target.integers
        if scheme is None:
            raise PassError(self.name, f"nothing is known of integers on target {context.target.name!r}")
        if self.rounding not in ("auto", *METHODS):
            raise InputError(f"rounding must be auto or one of {', '.join(METHODS)}, got {self.rounding!r}")
        if context.calibration is None:
            raise PassError(
                self.name,
                "needs calibration inputs to take ranges from: give calibration, some tens of typical inputs",
            )
        if graph.is_meta:
            raise PassError(self.name, "the weights are on the meta device; load them first")
        return Staged.of(
            graph,
            replace(scheme, weight=replace(scheme.weight, bits=self.bits)),
            context.calibration,
            skipped=Selection(graph, self.ignored, self.only).skipped,
            attention=self.attention,
            observer=self.observer,
            options={
                "percentile": {"percentile": self.percentile},
                "moving-average": {"averaging": self.averaging},
            }.get(self.observer, {}),
            limit=self.limit,
        )

    def weights(self, staged: Staged, seed: int) -> dict[str, tuple[Tensor, Parameters]]:
        """Integers of weights that are not rounded to the nearest, by name."""
        if self.rounding != "auto":
            return staged.rounded(staged.found, self.rounding, seed)
        if self.bits < 8:
            return staged.rounded(staged.found, "gptq", seed)
        return staged.rounded(staged.found, "adaround", seed, NARROW)


def summary(found: Annotation) -> Note:
    """How many operators of each kind run in integers."""
    kinds = Counter(kind(node) for node in found.runs if kind(node) != "rescale")
    return Note("changed", "", "in integers: " + ", ".join(f"{n} {what}" for what, n in kinds.most_common()))
