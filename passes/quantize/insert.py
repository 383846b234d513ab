"""Quantizers in the graph: ``dequantize(quantize(x))`` behind values, integers behind weights.

>>> import torch, graphprune
>>> from graphprune.target import get
>>> from .annotate import annotate
>>> graph = graphprune.trace(torch.nn.Linear(3, 2, bias=False), torch.zeros(1, 3)).copy()
>>> found = annotate(graph, get("cpu").integers)
>>> insert(found, {found.graph.placeholders[0]: of_range(-1.0, 1.0, UINT8)})
>>> [node.name for node in graph.nodes if node.op == "call_function"]
['dequantize_per_channel_default', 'quantize_per_tensor_default', 'dequantize_per_tensor_default', 'linear']
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import fx

from graphprune.graph import Graph
from graphprune.integers import UINT8, Format
from graphprune.kinds import clamp_range, factor, kind
from graphprune.operands import argument
from graphprune.quantization.parameters import Parameters, of_centred, of_range, of_weight, to_integers

from .annotate import Annotation, operands, weight_of

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed

__all__ = ["UINT8", "insert", "of_range"]

# What a quantizer keeps of the value that it rounds.
_KEPT = ("stack_trace", "module", "module_type")


def insert(
    found: Annotation,
    ranges: Mapping[fx.Node, Parameters],
    integers: Mapping[str, tuple[torch.Tensor, Parameters]] | None = None,
) -> None:
    """Put quantizers into the annotated graph, in place.

    Args:
        found: whose graph is changed; a copy that is the caller's own.
        ranges: of every value that others take their scale from.
        integers: weight name → integers and parameters, where they are rounded in another way than to the
            nearest.
    """
    graph = found.graph
    for node in found.runs:
        constant_operands(found, node)
    producers = {end: node for node, end in found.ends.items() if end is not node}
    for value, chief in found.values.items():
        _behind(found, value, producers.get(value), ranges[chief])
    done: dict[tuple[str, int | None], fx.Node] = {}
    for node in found.runs:
        weight = weight_of(node)
        if weight is not None:
            key = str(weight.target), channel_axis(node)
            if key not in done:
                done[key] = _weight(graph, node, weight, found.scheme.weight, integers or {})
            node.replace_input_with(weight, done[key])
            _bias(graph, node)
    graph.sweep()
    graph.propagate()


def channel_axis(node: fx.Node) -> int | None:
    """The dimension of a weight that its output channels are; ``None`` where groups share it."""
    if kind(node) == "transposed-convolution":
        return 1 if argument(node, "groups") == 1 else None
    return 1 if node.target is aten.addmm.default else 0


def _behind(found: Annotation, value: fx.Node, producer: fx.Node | None, how: Parameters) -> None:
    """Quantize one value for its readers in integers, and for all of them where its producer is, too.

    ``producer`` is the operator that the activation ``value`` stands behind, if it is one.
    """
    graph = found.graph
    readers = readers_of(found, value)
    made = _unclamped(found, value, producer, how)
    start = graph.placeholders[-1] if value.op == "placeholder" else value
    with graph.fx.inserting_after(start):
        numbers = _numbers(how)
        small = graph.fx.call_function(qd.quantize_per_tensor.default, (made, *numbers))
    with graph.fx.inserting_after(small):
        back = graph.fx.call_function(qd.dequantize_per_tensor.default, (small, *numbers))
    for part in (small, back):  # activations that it stands for are found by their module's path still
        part.meta.update({key: value.meta[key] for key in _KEPT if key in value.meta})
    for reader in readers:
        by = factor(reader)
        if by is not None and reader in found.runs:
            with graph.fx.inserting_after(back):
                other = (float(how.scale) * by, *numbers[1:])
                rescaled = graph.fx.call_function(qd.dequantize_per_tensor.default, (small, *other))
            reader.replace_all_uses_with(rescaled)
        else:
            reader.replace_input_with(value, back)


def readers_of(found: Annotation, value: fx.Node) -> list[fx.Node]:
    """Who reads a value rounded: those in integers, and all of them where its producer is, too."""
    if value in found.settled:
        return list(value.users)
    return [user for user in value.users if _in_integers(found, user)]


def _in_integers(found: Annotation, user: fx.Node) -> bool:
    if user in found.runs:
        return True
    return kind(user) in found.scheme.joined and any(_in_integers(found, u) for u in user.users)


def _unclamped(found: Annotation, value: fx.Node, producer: fx.Node | None, how: Parameters) -> fx.Node:
    """What is quantized: the operator itself where saturation does what the activations behind it did."""
    if producer is None or value not in found.settled or not saturates(value, producer, how):
        return value
    return producer


def saturates(value: fx.Node, producer: fx.Node, how: Parameters) -> bool:
    """Whether integers reach no further than the activations that ``value`` comes from ``producer`` by."""
    slack = float(how.scale) * 1e-3
    for low, high in _clamps(value, producer):
        if (low is not None and how.low < low - slack) or (high is not None and how.high > high + slack):
            return False
    return True


def saturating(found: Annotation, value: fx.Node, how: Parameters, before: Parameters) -> Parameters:
    """A scale that has grown, back to where integers reach no further than the activation behind an operator.

    A runtime runs the activation, and the operator with it, in float where they reach further. What they did
    with the scale from before training stays as it was.
    """
    producer = next((node for node, end in found.ends.items() if end is value and end is not node), None)
    if producer is None or not saturates(value, producer, before):
        return how
    scale, zero = float(how.scale), int(how.zero_point)
    first, last = how.format.range
    for low, high in _clamps(value, producer):
        if high is not None and last > zero:
            scale = min(scale, high / (last - zero))
        if low is not None and first < zero:
            scale = min(scale, low / (first - zero))
    return replace(how, scale=torch.full_like(how.scale, scale))


def _clamps(value: fx.Node, producer: fx.Node) -> Iterator[tuple[float | None, float | None]]:
    """Bounds of the activations between an operator and the value that it is quantized behind."""
    while value is not producer:
        yield clamp_range(value)
        value = value.args[0]  # type: ignore[assignment]


def constant_operands(found: Annotation, node: fx.Node) -> None:
    """Numbers and parameters that a sum or product takes become tensors of integers, in place."""
    graph = found.graph
    if factor(node) is not None or kind(node) not in ("add", "mul", "matmul"):
        return
    for place, operand in enumerate(node.args[:2]):
        if isinstance(operand, (int, float)):
            value = torch.tensor(float(operand))
            name = f"{node.name}.constant"
        elif graph.constant(operand) is not None:
            value, name = graph.constant(operand), str(operand.target)  # type: ignore[union-attr, assignment]
        else:
            continue
        value = value.detach()
        ends = float(value.min()), float(value.max())
        centred = kind(node) in found.scheme.centred  # fit for either side of a product
        how = of_centred(*ends) if centred else of_range(*ends, found.scheme.activation)
        small = graph.add_tensor(f"{name}.integers", to_integers(value, how), before=node, trainable=False)
        with graph.fx.inserting_before(node):
            back = graph.fx.call_function(qd.dequantize_per_tensor.default, (small, *_numbers(how)))
        node.args = (*node.args[:place], back, *node.args[place + 1 :])


def _weight(
    graph: Graph, node: fx.Node, weight: fx.Node, form: Format,
    integers: Mapping[str, tuple[torch.Tensor, Parameters]],
) -> fx.Node:  # fmt: skip
    name = str(weight.target)
    if name in integers:
        values, how = integers[name]
    else:
        tensor = graph.tensors[name]
        how = of_weight(tensor, form, channel_axis(node))
        values = to_integers(tensor, how)
    small = graph.add_tensor(f"{name}.integers", values, before=weight, trainable=False)
    if how.axis is None:
        with graph.fx.inserting_after(weight):
            return graph.fx.call_function(qd.dequantize_per_tensor.default, (small, *_numbers(how)))
    scale = graph.add_tensor(f"{name}.scale", how.scale, before=weight, trainable=False)
    # ONNX Runtime leaves a Gemm in float whose weight has no zero point, be it zero.
    zero = how.zero_point.to(values.dtype)
    middle = graph.add_tensor(f"{name}.zero_point", zero, before=weight, trainable=False)
    with graph.fx.inserting_after(weight):
        args: tuple[Any, ...] = (small, scale, middle, how.axis, *how.format.range, _dtype(how.format))
        return graph.fx.call_function(qd.dequantize_per_channel.default, args)


def _bias(graph: Graph, node: fx.Node) -> None:
    """The bias in the unit that products are summed in, scale of input times scale of weight, as int32.

    Without it, ONNX Runtime leaves a linear whose result is in float in float altogether.
    """
    bias, weight, value = argument(node, _name_of_bias(node)), weight_of(node), operands(node)[0]
    tensor = graph.constant(bias)
    if tensor is None or weight is None or value.target is not qd.dequantize_per_tensor.default:
        return
    if weight.target is qd.dequantize_per_channel.default:
        scale = graph.tensor(weight.args[1])  # type: ignore[arg-type]
    else:
        scale = torch.full((tensor.numel(),), float(weight.args[1]))  # type: ignore[arg-type]
    unit = (scale.double() * float(value.args[1])).float()  # type: ignore[arg-type]
    limit = 2**31 - 1
    sums = torch.round(tensor.detach().double() / unit.double()).clamp(-limit, limit).to(torch.int32)
    name = str(bias.target)
    small = graph.add_tensor(f"{name}.integers", sums, before=node, trainable=False)
    units = graph.add_tensor(f"{name}.scale", unit, before=node, trainable=False)
    with graph.fx.inserting_before(node):
        args = (small, units, None, 0, -limit - 1, limit, torch.int32)
        back = graph.fx.call_function(qd.dequantize_per_channel.default, args)
    node.replace_input_with(bias, back)


def _name_of_bias(node: fx.Node) -> str:
    return "self" if node.target is aten.addmm.default else "bias"


def _numbers(how: Parameters) -> tuple[Any, ...]:
    """One scale as the arguments of a quantizer: scale, zero point, bounds, dtype."""
    return (float(how.scale), int(how.zero_point), *how.format.range, _dtype(how.format))


def _dtype(form: Format) -> torch.dtype:
    found: torch.dtype = getattr(torch, form.dtype)
    return found
