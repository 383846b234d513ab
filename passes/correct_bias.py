"""Take the mean error out that quantization leaves behind (Finkelstein et al., *Fighting Quantization Bias
With Bias*, 2019; Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias Correction*,
ICCV 2019, section 4.2).

Rounded weights and inputs shift the mean of what an operator gives, the same way for every sample, and the
layers behind add such shifts up. The mean is known from calibration inputs,

    b'_c = b_c - mean(y'_c - y_c)

with ``y`` of the float network and ``y'`` of the quantized one, channel by channel, and operator by operator:
each is measured on what the corrected ones before it give. Biases stay integers, in the unit they have. Where
the outputs as a whole would be further off on the calibration inputs, nothing is changed, and a note says so.

>>> import torch, graphprune
>>> from graphprune.pipeline import Context, Pipeline
>>> _ = torch.manual_seed(0)
>>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> graph = graphprune.trace(net, torch.zeros(1, 8), dynamic_batch=True)
>>> given = Context(calibration=[torch.randn(32, 8)])
>>> quantized = Pipeline.parse("quantize").run(graph, given).graph
>>> CorrectBias().run(quantized, given).notes[0].message.partition(":")[0]
'the mean error of 2 operators taken out'
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx

from graphprune.calibration import Call, read
from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.importance.readers import Linear, linears
from graphprune.operands import CONVOLUTIONS, argument, set_argument
from graphprune.pipeline import Context, Note, Pass, PassResult
from graphprune.runner import Runner

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed

_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Correct the bias of every quantized convolution and linear operator.

    Attributes:
        limit: calibration samples to read.
    """

    name: ClassVar[str] = "correct-bias"
    exact: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({"quantized"})
    destroys: ClassVar[frozenset[str]] = frozenset({"trainable"})

    limit: int = 128

    def run(self, graph: Graph, context: Context) -> PassResult:
        """The graph with other biases; notes say how large the mean errors were."""
        if graph.floating is None:
            raise PassError(
                self.name,
                "the graph does not know the float network; run it behind quantize, in one pipeline",
            )
        if context.calibration is None:
            raise PassError(self.name, "needs calibration inputs to measure on: give calibration")
        inputs = read(graph, context.calibration, self.limit)
        result = graph.copy()
        chosen, refused = _pairs(result, graph.floating)
        if not chosen:
            nothing = Note("info", "", "no quantized convolution or linear operator to correct")
            return PassResult(graph, False, (nothing, *refused))
        biases = [_Bias.of(result, node) for node, _ in chosen]
        notes = list(_correct(result, graph.floating, chosen, biases, inputs.calls))
        for bias in biases:
            bias.store(result)
        result.propagate()
        before, after = (_off(g, graph.floating, inputs.calls) for g in (graph, result))
        change = f"the outputs' error on calibration inputs from {before:.2%} to {after:.2%}"
        if after > before:
            # Weights rounded to make up for the layers before them (GPTQ) may count on the errors there.
            worse = Note("refused", "", f"biases stay: corrected, they take {change}")
            return PassResult(graph, False, (worse, *inputs.notes, *refused))
        said = Note("info", "", f"the mean error of {len(chosen)} operators taken out: {change}")
        return PassResult(result, True, (said, *inputs.notes, *notes, *refused))


def _off(graph: Graph, floating: Graph, calls: Sequence[Call]) -> float:
    """The relative error of all outputs: the root of squared differences over the float network's squares."""
    difference = reference = 0.0
    for call in calls:
        for found, wanted in zip(graph.run(*call), floating.run(*call), strict=True):
            if isinstance(wanted, Tensor) and wanted.is_floating_point():
                difference += float((found.double() - wanted.double()).square().sum())
                reference += float(wanted.double().square().sum())
    return math.sqrt(difference / reference) if reference else 0.0


def _pairs(graph: Graph, floating: Graph) -> tuple[list[tuple[fx.Node, Linear]], list[Note]]:
    """Quantized operators with the float ones of the same name, and those without."""
    known = {linear.node.name: linear for linear in linears(floating)}
    found: list[tuple[fx.Node, Linear]] = []
    refused: list[Note] = []
    for node in graph.fx.nodes:
        weight = _weight(node)
        if weight is None or not _dequantizes(weight):
            continue
        linear = known.get(node.name)
        bias = _bias(node)
        if linear is None or linear.node.target is not node.target:
            refused.append(Note("refused", node.name, "the float network has no such operator"))
        elif bias is not None and bias.op == "get_attr" and len(graph.readers(str(bias.target))) > 1:
            refused.append(Note("refused", node.name, f"its bias {bias.target!r} is shared"))
        else:
            found.append((node, linear))
    return found, refused


def _correct(
    graph: Graph, floating: Graph, chosen: Sequence[tuple[fx.Node, Linear]], biases: Sequence[_Bias],
    calls: Sequence[Call],
) -> Iterator[Note]:  # fmt: skip
    """Run both networks side by side and give every bias its new value."""
    work = graph.copy()
    twins = dict(zip(graph.fx.nodes, work.fx.nodes, strict=True))
    names = []
    for (node, _), bias in zip(chosen, biases, strict=True):
        # A parameter of its own in place of dequantized integers: it changes while the network runs.
        twin = twins[node]
        place = work.add_tensor(f"{node.name}.bias", bias.value.float(), before=twin, trainable=False)
        set_argument(twin, _name_of_bias(twin), place)
        names.append(str(place.target))
    wanted, found = Runner(floating, calls), Runner(work, calls)
    for (node, linear), bias, name in zip(chosen, biases, names, strict=True):
        twin = twins[node]
        wanted.advance(linear.node, inclusive=False)
        found.advance(twin, inclusive=False)
        total, square, count = torch.zeros(()), torch.zeros(()), 0
        spread = torch.zeros(())
        for batch in range(len(calls)):
            exact = linear.rows(wanted.compute(linear.node, batch, {})).double()
            error = linear.rows(found.compute(twin, batch, {})).double() - exact
            total, square, count = total + error.sum(0), square + exact.square().sum(0), count + len(exact)
            spread = spread + exact.sum(0)
        mean = total / count
        if not bool(torch.isfinite(mean).all()):
            raise InputError(f"{graph.where(node)}: gives values that are not finite on a calibration input")
        bias.subtract(mean)
        work.set_tensor(name, bias.value.float())
        deviation = (square / count - (spread / count).square()).clamp_min(0).mean().sqrt()
        share = float(mean.square().mean().sqrt() / deviation.clamp_min(1e-30))
        yield Note("changed", node.name, f"mean error {share:.2%} of its standard deviation")


@dataclass
class _Bias:
    """An operator's bias while it is corrected.

    Attributes:
        node: the operator.
        value: the numbers, float64 ``[channels]``.
        unit: what an integer of it stands for, float64 ``[channels]``; ``None`` for a bias in float.
        tensor: where it is kept, ``None`` where there is none yet.
    """

    node: fx.Node
    value: Tensor
    unit: Tensor | None
    tensor: str | None

    @staticmethod
    def of(graph: Graph, node: fx.Node) -> _Bias:
        """The bias that an operator of a quantized graph has, or zeros."""
        given = _bias(node)
        if isinstance(given, fx.Node) and _dequantizes(given):
            integers, unit = (graph.tensor(given.args[i]).detach() for i in (0, 1))  # type: ignore[arg-type]
            return _Bias(node, integers.double() * unit.double(), unit.double(), str(given.args[0].target))  # type: ignore[union-attr]
        value = graph.constant(given)
        if value is not None:
            return _Bias(node, value.detach().double(), None, str(given.target))  # type: ignore[union-attr]
        return _Bias(node, torch.zeros(_channels(node), dtype=torch.float64), _unit(graph, node), None)

    def subtract(self, error: Tensor) -> None:
        """Take an error off, as far as the unit allows."""
        self.value = self.value - error
        if self.unit is not None:
            self.value = self._integers().double() * self.unit

    def store(self, graph: Graph) -> None:
        """Write the new numbers into the graph."""
        kept = self.value.float() if self.unit is None else self._integers()
        if self.tensor is not None:
            graph.set_tensor(self.tensor, kept.to(graph.tensors[self.tensor].dtype))
            return
        name = f"{self.node.name}.bias"
        if self.unit is None:
            bias = graph.add_tensor(name, kept, before=self.node, trainable=False)
        else:
            small = graph.add_tensor(f"{name}.integers", kept, before=self.node, trainable=False)
            unit = graph.add_tensor(f"{name}.scale", self.unit.float(), before=self.node, trainable=False)
            with graph.fx.inserting_before(self.node):
                args = (small, unit, None, 0, -_LARGEST - 1, _LARGEST, torch.int32)
                bias = graph.fx.call_function(qd.dequantize_per_channel.default, args)
        set_argument(self.node, _name_of_bias(self.node), bias)

    def _integers(self) -> Tensor:
        assert self.unit is not None
        return torch.round(self.value / self.unit).clamp(-_LARGEST, _LARGEST).to(torch.int32)


def _unit(graph: Graph, node: fx.Node) -> Tensor | None:
    """Scale of the input times scale of the weight; ``None`` where the input is in float."""
    value, weight = _input(node), _weight(node)
    assert weight is not None
    if value.target is not qd.dequantize_per_tensor.default:
        return None
    if weight.target is qd.dequantize_per_channel.default:
        scale = graph.tensor(weight.args[1]).detach().double()  # type: ignore[arg-type]
    else:
        scale = torch.full((_channels(node),), float(weight.args[1]), dtype=torch.float64)  # type: ignore[arg-type]
    return scale * float(value.args[1])  # type: ignore[arg-type]


def _channels(node: fx.Node) -> int:
    weight = _weight(node)
    assert weight is not None
    shape = weight.meta["val"].shape
    if node.target is aten.addmm.default:
        return int(shape[1])
    if node.target is aten.linear.default:
        return int(shape[0])
    return int(node.meta["val"].shape[1 - len(shape)])


def _input(node: fx.Node) -> fx.Node:
    found = node.args[1 if node.target is aten.addmm.default else 0]
    assert isinstance(found, fx.Node)
    return found


def _weight(node: fx.Node) -> fx.Node | None:
    """The operand that holds a convolution's or linear operator's weight."""
    if node.target is aten.addmm.default:
        found = node.args[2]
    elif node.target is aten.linear.default or node.target in CONVOLUTIONS:
        found = argument(node, "weight")
    else:
        return None
    return found if isinstance(found, fx.Node) else None


def _bias(node: fx.Node) -> fx.Node | None:
    found = argument(node, _name_of_bias(node))
    return found if isinstance(found, fx.Node) else None


def _name_of_bias(node: fx.Node) -> str:
    return "self" if node.target is aten.addmm.default else "bias"


def _dequantizes(node: fx.Node) -> bool:
    return node.target in (qd.dequantize_per_tensor.default, qd.dequantize_per_channel.default)
