"""LSTMs as :mod:`graphprune.quantization.recurrent` computes them; no other recurrent layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graphprune.passes.affine import Refusal
from graphprune.passes.quantize_weights.places import RECURRENT
from graphprune.passes.quantize_weights.writing import call, constant
from torch import Tensor, fx

from graphprune.graph import Graph
from graphprune.operands import argument
from graphprune.pipeline import Note
from graphprune.quantization.parameters import INT8, of_weight, to_integers
from graphprune.quantization.recurrent import dynamic_lstm

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Recurrent:
    """An LSTM whose weights are tensors.

    Attributes:
        node: the operator.
        names: of its tensors: for each layer and direction two weights and, if it has them, two biases.
    """

    node: fx.Node
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def readers(self) -> tuple[fx.Node, ...]:
        return (self.node,)


def recurrents(graph: Graph) -> tuple[list[Recurrent], list[Note]]:
    """The LSTMs that can run in integers, and notes on recurrent layers that cannot."""
    found, notes = [], []
    for node in graph.find(*RECURRENT):
        try:
            found.append(_recurrent(graph, node))
        except Refusal as refusal:
            notes.append(Note("refused", graph.where(node), f"stays in float: {refusal}"))
    return found, notes


def _recurrent(graph: Graph, node: fx.Node) -> Recurrent:
    kind = str(node.target).split(".")[1]
    if node.target is not aten.lstm.input:
        raise Refusal(f"ONNX Runtime runs an LSTM in integers, and no {kind.upper().partition('_')[0]}")
    params: Any = argument(node, "params")
    tensors = [graph.constant(p) for p in params]
    if any(tensor is None for tensor in tensors):
        raise Refusal("its weights are computed; fold-parameters may help")
    if any(tensor is not None and tensor.dtype != torch.float32 for tensor in tensors):
        raise Refusal("its weights are not float32; convert the model with model.float()")
    each = (4 if argument(node, "has_biases") else 2) * (1 + bool(argument(node, "bidirectional")))
    if len(params) != each * int(argument(node, "num_layers")):
        raise Refusal("it projects its hidden state, and ONNX Runtime's LSTM does not")
    if argument(node, "train") and argument(node, "dropout"):
        raise Refusal("it drops out between layers")
    if node.args[0].meta["val"].dim() != 3:  # type: ignore[union-attr]
        raise Refusal("it runs over a sequence without a batch dimension")
    return Recurrent(node, tuple(str(p.target) for p in params))


def write(graph: Graph, found: Recurrent) -> float:
    """Replace an LSTM in place; returns how far its weights are off, relative to them."""
    node = found.node
    each = 4 if argument(node, "has_biases") else 2
    weights: list[fx.Node] = []
    scales: list[fx.Node] = []
    biases: list[fx.Node] = []
    noise = signal = 0.0
    for start in range(0, len(found.names), each):
        names = found.names[start : start + each]
        for name in names[:2]:
            weight = graph.tensors[name].detach()
            how = of_weight(weight, INT8, 0)
            integers = to_integers(weight, how)
            noise += float((integers * how.scale[:, None] - weight).double().square().sum())
            signal += float(weight.double().square().sum())
            weights.append(constant(graph, node, f"{name}_integers", integers))
            scales.append(constant(graph, node, f"{name}_scale", how.scale))
        if each == 4:
            total: Tensor = graph.tensors[names[2]].detach() + graph.tensors[names[3]].detach()
            biases.append(constant(graph, node, f"{names[2]}_sum", total))
    states: Any = argument(node, "hx")
    flags = (bool(argument(node, "bidirectional")), bool(argument(node, "batch_first")))
    with graph.fx.inserting_before(node):
        operands: Sequence[Any] = (node.args[0], *states, weights, scales, biases, *flags)
        fresh = call(graph, node, dynamic_lstm._opoverload, operands)
    node.replace_all_uses_with(fresh)
    graph.fx.erase_node(node)
    return (noise / signal) ** 0.5 if signal else 0.0
