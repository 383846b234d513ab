"""ReLU6 as ReLU where hardly a value reaches its upper bound, so that ``equalize`` can go through it.

``min(max(x, 0), 6)`` is not positively homogeneous, ``max(x, 0)`` is, and Nagel et al. (*Data-Free
Quantization Through Weight Equalization and Bias Correction*, ICCV 2019, section 5.1) replace the one by the
other in MobileNetV2. How often the bound is met is counted on calibration inputs; where that is too often the
clamp stays. Trained with the bound, a network may depend on it: EfficientNet-Lite0 is left with 15 dB when
the clamps go that one value in a thousand reaches, which is worse than int8.

>>> import torch, graphprune
>>> from graphprune.pipeline import Context
>>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU6(), torch.nn.Linear(8, 2))
>>> graph = graphprune.trace(net, torch.zeros(1, 3))
>>> done = ReplaceRelu6().run(graph, Context(calibration=[torch.randn(1, 3)]))
>>> print(done.graph)
input_1: f32[1, 3]
linear: f32[1, 8] = linear(input_1, %0.weight, %0.bias)
hardtanh: f32[1, 8] = relu(linear)
linear_1: f32[1, 2] = linear(hardtanh, %2.weight, %2.bias)
return (linear_1,)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphprune.calibration import read
from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.kinds import clamp_range, kind
from graphprune.pipeline import Context, Note, Pass, PassResult
from graphprune.runner import Runner

aten = torch.ops.aten


@dataclass(frozen=True)
class ReplaceRelu6(Pass):
    """Clamps between zero and a number become ReLUs.

    Attributes:
        share: of values that may reach the upper bound on calibration inputs, 0 to 1.
        limit: calibration samples to read.
    """

    name: ClassVar[str] = "replace-relu6"
    exact: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    destroys: ClassVar[frozenset[str]] = frozenset({"trainable"})

    share: float = 0.0001
    limit: int = 128

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Replace what saturates seldom enough; notes say how often each does."""
        if not 0 <= self.share <= 1:
            raise InputError(f"share must be between 0 and 1, got {self.share}")
        result = graph.copy()
        clamps = [node for node in result.fx.nodes if _bound(node) is not None]
        if not clamps:
            return PassResult(graph, False, (Note("info", "", "no clamp between zero and a number"),))
        if context.calibration is None:
            raise PassError(self.name, "needs calibration inputs to see how often clamps saturate")
        inputs = read(graph, context.calibration, self.limit)
        met = dict.fromkeys(clamps, 0)
        total = dict.fromkeys(clamps, 0)
        for call in inputs.calls:
            runner = Runner(result, [call], keep=clamps)
            for node in clamps:
                runner.advance(node)
                value = runner.values(node)[0]
                met[node] += int((value >= _bound(node)).sum())
                total[node] += value.numel()
                runner.release(node)
        notes = []
        for node in clamps:
            share = met[node] / max(total[node], 1)
            said = f"{share:.2%} of its values reach {_bound(node):g}"
            notes.append(Note("changed" if share <= self.share else "refused", result.place(node), said))
            if share <= self.share:
                node.target, node.args, node.kwargs = aten.relu.default, (node.args[0],), {}
        changed = any(note.kind == "changed" for note in notes)
        return PassResult(result if changed else graph, changed, (*inputs.notes, *notes))


def _bound(node: fx.Node) -> float | None:
    """The upper bound of a clamp whose lower one is zero, else ``None``."""
    if kind(node) != "clamp":
        return None
    low, high = clamp_range(node)
    return float(high) if low == 0 and high is not None and high > 0 else None
