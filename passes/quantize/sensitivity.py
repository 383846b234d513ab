"""How much of a network's error each operator in integers is to blame for.

Every operator is put into integers alone, all others in float, and the network's outputs are compared with
those in float: the signal to quantization-noise ratio of Nagel et al. (*A White Paper on Neural Network
Quantization*, 2021, section 3.6). What comes before an operator is computed once, whichever operator is
asked about.

>>> import torch, graphprune
>>> from graphprune.passes.quantize import Quantize
>>> from graphprune.pipeline import Context
>>> _ = torch.manual_seed(0)
>>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
>>> net[0].weight.data[:, 0] = 0.0                 # it ignores its largest input
>>> inputs = [torch.rand(1, 8) * torch.tensor([300.0] + 7 * [1.0]) for _ in range(8)]
>>> graph = graphprune.trace(net, torch.zeros(1, 8))
>>> staged = Quantize().staged(graph, Context(calibration=inputs))
>>> [row.node.name for row in ranked(staged, {})]
['linear', 'linear_1']
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.cost import node_macs
from graphprune.quantization.parameters import Parameters, of_weight, to_integers, to_numbers

from .annotate import operands, weight_of
from .insert import channel_axis
from .staged import Staged

SAMPLES = 16  # calls of the calibration inputs that are looked at


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """One operator.

    Attributes:
        node: of the staged graph.
        sqnr: of the network's outputs when this operator alone is in integers, dB.
        macs: its multiply-accumulates.
    """

    node: fx.Node
    sqnr: float
    macs: int


def ranked(staged: Staged, weights: Mapping[str, tuple[Tensor, Parameters]]) -> list[Sensitivity]:
    """Every operator that multiplies, and every sum and product of values, the most harmful first.

    Args:
        staged: the network.
        weights: integers by the weight's name, where they are not the nearest.
    """
    asked = [node for node, role in staged.found.runs.items() if role != "shares"]
    noise = dict.fromkeys(asked, 0.0)
    signal = 0.0
    simulated = _Simulation(staged, weights)
    for call in staged.calibration.calls[:SAMPLES]:
        wanted, values = simulated.run(call)
        signal += sum(float(w.double().square().sum()) for w in wanted)
        for node in asked:
            found = simulated.rerun(node, values)
            noise[node] += sum(
                float((a.double() - b.double()).square().sum()) for a, b in zip(found, wanted, strict=True)
            )
    rows = [Sensitivity(node, _decibel(signal, noise[node]), node_macs(node)) for node in asked]
    return sorted(rows, key=lambda row: row.sqnr)


def _decibel(signal: float, noise: float) -> float:
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


class _Simulation:
    """The float network, in which any one operator can be computed on rounded numbers."""

    def __init__(self, staged: Staged, weights: Mapping[str, tuple[Tensor, Parameters]]):
        self._graph, self._found = staged.graph, staged.found
        self._ranges = {value: staged.ranges[chief] for value, chief in staged.found.values.items()}
        self._nodes = [n for n in self._graph.fx.nodes if n.op == "call_function"]
        self._place = {node: place for place, node in enumerate(self._nodes)}
        self._outputs = [n for n in self._graph.output.args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]
        self._weights: dict[fx.Node, Tensor] = {}
        for node in staged.found.runs:
            weight = weight_of(node)
            if weight is None:
                continue
            name = str(weight.target)
            numbers = self._graph.tensors[name].detach()
            if name in weights:
                self._weights[node] = to_numbers(*weights[name])
            else:
                how = of_weight(numbers, staged.scheme.weight, channel_axis(node))
                self._weights[node] = to_numbers(to_integers(numbers, how), how)

    @torch.no_grad()
    def run(self, call: Sequence[Tensor]) -> tuple[list[Tensor], dict[fx.Node, Any]]:
        """Outputs in float, and every value on the way."""
        values: dict[fx.Node, Any] = dict(zip(self._graph.placeholders, call, strict=True))
        for node in self._nodes:
            values[node] = self._compute(node, values)
        return self._floats(values), values

    @torch.no_grad()
    def rerun(self, changed: fx.Node, values: Mapping[fx.Node, Any]) -> list[Tensor]:
        """Outputs with one operator in integers."""
        fresh: dict[fx.Node, Any] = {}
        end = self._found.ends[changed]
        # A linear's result is rounded for who reads it, a convolution's because it could not be float.
        rounds = end in self._found.settled and self._found.runs[changed] != "inputs"
        for node in self._nodes[self._place[changed] :]:
            if node is not changed and not any(source in fresh for source in node.all_input_nodes):
                continue
            around = _Both(fresh, values)
            if node is changed:
                # Padding that the operator takes in adds zeros, and zero is exact.
                behind = {v: self._found.through(v) for v in operands(node)}
                rounded = {
                    v: self._rounded(v, self._ranges[b], values)
                    for v, b in behind.items()
                    if b in self._ranges
                }
                weight = weight_of(node)
                if weight is not None:
                    rounded[weight] = self._weights[node]
                fresh[node] = self._compute(node, _Both(rounded, values))
            else:
                fresh[node] = self._compute(node, around)
            if node is end and rounds:
                how = self._ranges[node]
                fresh[node] = to_numbers(to_integers(fresh[node], how), how)
        return self._floats(_Both(fresh, values))

    def _rounded(self, value: fx.Node, how: Parameters, values: Mapping[fx.Node, Any]) -> Tensor:
        return to_numbers(to_integers(self._value(values, value), how), how)

    def _compute(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(values, n))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _value(self, values: Mapping[fx.Node, Any], node: fx.Node) -> Any:
        if node in values:
            return values[node]
        name = str(node.target)
        return self._graph.bodies[name] if name in self._graph.bodies else self._graph.tensors[name]

    def _floats(self, values: Mapping[fx.Node, Any]) -> list[Tensor]:
        found = [self._value(values, node) for node in self._outputs]
        return [v for v in found if isinstance(v, Tensor) and v.is_floating_point()]


class _Both(Mapping[fx.Node, Any]):
    """One mapping before another; copies neither."""

    def __init__(self, first: Mapping[fx.Node, Any], then: Mapping[fx.Node, Any]):
        self._first, self._then = first, then

    def __getitem__(self, node: fx.Node) -> Any:
        return self._first[node] if node in self._first else self._then[node]

    def __contains__(self, node: object) -> bool:
        return node in self._first or node in self._then

    def __iter__(self) -> Any:
        return iter({**self._first, **self._then})

    def __len__(self) -> int:
        return len({**self._first, **self._then})
