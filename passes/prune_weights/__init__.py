"""Zeros in weights: single entries, N of every M, or blocks; what stays makes up for them.

An entry's score is its magnitude, or magnitude times gradient (Molchanov et al., *Importance Estimation for
Neural Network Pruning*, CVPR 2019, eq. 8). With calibration inputs the entries that stay are corrected by
the Gram matrix of what the weight is multiplied with, layer after layer, each on what the pruned layers
before it give (:mod:`graphprune.sparsity.compensation`, after Frantar and Alistarh, *SparseGPT*, ICML
2023).

Every pruned weight is multiplied with its mask in the graph, so that training moves what stays and never
brings back what went. ``fold-parameters`` multiplies masks in for deployment, ``strip-masks`` does so and
leaves the rest trainable. Zeros make no runtime here faster by themselves: the file compresses better, and
outputs that are zero as a whole (``1x*``) are what ``remove-dead-channels`` takes out.

>>> import torch, graphprune
>>> from graphprune.pipeline import Context
>>> graph = graphprune.trace(torch.nn.Linear(4, 2), torch.zeros(1, 4))
>>> done = PruneWeights(pattern="2:4").run(graph, Context()).graph
>>> print(done)
input_1: f32[1, 4]
mul_tensor: f32[2, 4] = mul.Tensor(%weight, %weight_mask)
linear: f32[1, 2] = linear(input_1, mul_tensor, %bias)
return (linear,)
>>> done.tensors["weight_mask"].sum(1).tolist()
[2.0, 2.0]
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from graphprune.calibration import read
from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.pipeline import Context, Note, Pass, PassResult
from graphprune.sparsity.patterns import Anywhere, Blocks, NofM, Pattern, mask_among

from .masks import Weight, masked, there_of, value_of, weights
from .selection import chosen, corrected, scores

PATTERN = re.compile(r"(?P<n>\d+):(?P<m>\d+)|(?P<rows>\d+)x(?P<columns>\d+|\*)")
SCOPES = ("local", "global")
IMPORTANCES = ("magnitude", "gradient")
SPARSITY = 0.5  # where neither a share nor a threshold is asked for


@dataclass(frozen=True)
class PruneWeights(Pass):
    """Set entries of linear and convolution weights to zero.

    Attributes:
        sparsity: share of the entries (with ``RxC`` of the blocks) that becomes zero, half by default; N:M
            has its own.
        pattern: ``anywhere``, ``N:M`` (of every M neighbouring inputs N stay), or ``RxC`` blocks of R
            outputs and C inputs; ``1x*`` takes whole outputs.
        threshold: instead of a share, entries whose score is below go; 0 or more, with ``anywhere`` alone.
        scope: ``local`` (the share of every weight) or ``global`` (one ranking over all weights).
        importance: ``magnitude`` or ``gradient`` (weight times gradient of ``loss``, or without one of the
            randomly projected outputs on calibration inputs).
        correct: refit what stays; without calibration inputs nothing is.
        loss: from Python, ``module -> loss`` or an iterator of losses.
        ignored, only: weights, operators or modules, by name or glob.
        limit: calibration samples to read.
        positions: of an image or a sequence that are taken of each, for the correction.
    """

    name: ClassVar[str] = "prune-weights"
    exact: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    sparsity: float | None = None
    pattern: str = "anywhere"
    threshold: float | None = None
    scope: str = "local"
    importance: str = "magnitude"
    correct: bool = True
    loss: Callable[[Any], Any] | None = None
    ignored: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    limit: int = 128
    positions: int | None = 64

    def run(self, graph: Graph, context: Context) -> PassResult:
        """The graph with masks; notes say how much of every weight is zero, and how it was corrected.

        Raises:
            InputError: an option is out of range, a name matches nothing, or a calibration input does not
                fit.
            PassError: gradients are asked for without a loss and without calibration inputs.
        """
        pattern = self.asked()
        found, notes = weights(graph, pattern, self.ignored, self.only)
        if not found:
            return PassResult(graph, False, (*notes, Note("refused", "", "there is no weight to prune")))
        calls = None
        if context.calibration is not None:
            inputs = read(graph, context.calibration, self.limit)
            calls, notes = inputs.calls, [*notes, *inputs.notes]
        if self.importance == "gradient" and self.loss is None and calls is None:
            raise PassError(self.name, "ranks by gradients: give a loss, or calibration inputs")
        ranked = None
        if self.importance == "gradient" or self.scope == "global" or self.threshold is not None:
            ranked = scores(graph, found, pattern, self.importance, calls or (), self.loss, context.seed)
        given = None if ranked is None else chosen(ranked, pattern, self.scope, self.threshold)
        if self.correct and calls is not None:
            values, said = corrected(graph, found, pattern, given, calls, self.positions, context.seed)
        else:
            values, said = _plain(graph, found, pattern, given), []
            why = "without calibration inputs" if calls is None else "correct=false"
            said.append(Note("info", "", f"{why} entries are set to zero and no other changes"))
        result = masked(graph, values)
        for weight in found:
            mask = weight.matrix(values[weight.name][1])
            share, empty = 1 - float(mask.double().mean()), int((~mask.any(1)).sum())
            whole = (
                f"; {empty:,} of {len(mask):,} outputs have no other: strip-masks,remove-dead-channels takes "
                "out what can go of them" if empty else ""
            )  # fmt: skip
            notes.append(
                Note("changed", weight.name, f"{share:.1%} of {mask.numel():,} entries are zero{whole}")
            )
        return PassResult(result, True, (*notes, *said))

    def asked(self) -> Pattern:
        """What the options ask for.

        Raises:
            InputError: an option is unknown or out of range, or two do not go together.
        """
        for what, value, known in (
            ("scope", self.scope, SCOPES),
            ("importance", self.importance, IMPORTANCES),
        ):
            if value not in known:
                raise InputError(f"{what} must be one of {', '.join(known)}, got {value!r}")
        if self.threshold is not None and self.sparsity is not None:
            raise InputError(
                f"sparsity={self.sparsity} and threshold={self.threshold} both say what goes; leave one out"
            )
        if self.threshold is not None and not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise InputError(
                f"threshold is what scores are compared with, finite and at least 0, got {self.threshold}"
            )
        sparsity = SPARSITY if self.sparsity is None else self.sparsity
        if self.pattern == "anywhere":
            return Anywhere(sparsity)
        parts = PATTERN.fullmatch(self.pattern)
        if parts is None:
            raise InputError(
                f"pattern must be anywhere, N:M as in 2:4, or RxC as in 4x4 or 1x*, got {self.pattern!r}"
            )
        if self.threshold is not None:
            raise InputError(f"a threshold takes single entries, and pattern is {self.pattern!r}")
        if parts["n"]:
            if self.scope == "global":
                raise InputError(f"{self.pattern} has its share in every group, so scope is local")
            found = NofM(int(parts["n"]), int(parts["m"]))
            if self.sparsity is not None and abs(self.sparsity - found.sparsity) > 1e-6:
                raise InputError(
                    f"{self.pattern} makes {found.sparsity:g} of the entries zero, and sparsity is "
                    f"{self.sparsity}; leave it out, or give another pattern"
                )
            return found
        columns = None if parts["columns"] == "*" else int(parts["columns"])
        return Blocks(sparsity, int(parts["rows"]), columns)


def _plain(
    graph: Graph, found: list[Weight], pattern: Pattern, given: Mapping[str, Tensor] | None
) -> dict[str, tuple[Tensor, Tensor]]:
    values = {}
    for weight in found:
        own = value_of(graph, weight.name)
        matrix, there = weight.matrix(own), there_of(graph, weight)
        mask = given[weight.name] & there if given is not None else mask_among(pattern, matrix.abs(), there)
        values[weight.name] = own, weight.back(mask, own)
    return values
