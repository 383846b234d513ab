"""Training with rounding in the loop, and back to the graph that runs in integers.

:func:`prepare` puts a fake quantizer wherever :class:`~graphprune.passes.quantize.Quantize` would put a real
one: forward it rounds, backward it lets gradients through (Jacob et al., CVPR 2018, section 3). Scales are
trained along, by the gradient of Esser et al. (*Learned Step Size Quantization*, ICLR 2020, eq. 3), which is
what makes four bits and fewer work. Batch norms are folded before, so that the weights that are rounded in
training are those that are rounded in the end; their statistics are those of the finished model.

:func:`convert` gives the graph that ``quantize`` would have made of the trained weights and scales. Loop,
optimizer and data parallel wrappers are the caller's; copies and wrapped modules convert, too.

>>> import torch, graphprune
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> aware = prepare(model, torch.zeros(1, 8), calibration=[torch.randn(1, 8) for _ in range(16)], bits=4)
>>> optimizer = torch.optim.Adam(aware.module.parameters(), lr=1e-3)
>>> aware.module(torch.randn(1, 8)).square().sum().backward()
>>> optimizer.step()
>>> graph = convert(aware)
>>> int(graph.tensors["0.weight.integers"].abs().max()) <= 7
True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphprune.calibration import replayed
from graphprune.errors import InputError, PassError
from graphprune.frontend.capture import capture
from graphprune.graph import Graph
from graphprune.notes import Note
from graphprune.pipeline import LOSSLESS, Context, PassResult, Pipeline
from graphprune.quantization.fake import FAKE
from graphprune.quantization.parameters import TINY, Parameters, of_weight, to_integers
from graphprune.target import Target, get

from . import Quantize, summary
from .annotate import Annotation, weight_of
from .insert import channel_axis, constant_operands, readers_of, saturating
from .staged import Staged, float_notes
from .weights import searched


@dataclass
class QuantizationAware:
    """A network with fake quantizers.

    Attributes:
        module: trainable, with the original's arguments and parameter names; the scales are parameters
            ``NAME_scale``, too.
        staged: the float network, what runs in integers in it, and the ranges it started from.
        notes: what runs in integers, what does not, and what was odd about the calibration inputs.
    """

    module: torch.nn.Module
    staged: Staged = field(repr=False)
    notes: tuple[Note, ...] = ()


def prepare(
    model: torch.nn.Module | Graph, example_inputs: Any = None, *,
    calibration: Iterable[Any] | None, target: str | Target = "cpu", **options: Any,
) -> QuantizationAware:  # fmt: skip
    """A network to be trained with rounding.

    Args:
        model: a module, or a graph whose batch norms are folded.
        example_inputs: as :func:`graphprune.trace` takes them; of a module.
        calibration: inputs that the first ranges are taken from.
        target: whose runtime decides what is rounded.
        options: of :class:`~graphprune.passes.quantize.Quantize`; ``rounding`` plays no part.

    Raises:
        InputError: an option or a calibration input does not fit.
        PassError: nothing in the network runs in integers on the target.
    """
    if not isinstance(model, Graph):
        model = Pipeline.parse(LOSSLESS).run(capture(model, example_inputs)).graph
    step = Quantize(**options)
    staged = step.staged(model, Context(target=get(target), calibration=replayed(calibration)))
    if not staged.found.runs:
        raise PassError(step.name, "nothing in this network runs in integers on the target")
    work, found = staged.twin()
    _insert(found, staged.carried(staged.found, found))
    notes = (summary(staged.found), *staged.notes, *float_notes(staged.found))
    return QuantizationAware(work.module, staged, notes)


def convert(aware: QuantizationAware, module: torch.nn.Module | None = None, *, tables: bool = True) -> Graph:
    """The graph with quantizers, of trained weights and scales.

    Args:
        aware: what :func:`prepare` gave.
        module: a copy of ``aware.module`` or a wrapper around one (``DistributedDataParallel``), where that
            was trained instead.
        tables: whether embeddings are kept as integers, too.

    Raises:
        InputError: the module lacks a parameter, or one of them is not finite.
    """
    state = _state(aware.module if module is None else module)
    staged = aware.staged
    missing = [name for name in staged.graph.tensors if name not in state]
    if missing:
        raise InputError(
            f"the module has no {missing[0]!r}: it is not the one that was prepared, nor a copy of it"
        )
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{name!r} is not finite: training diverged; lower the learning rate")
    work, found = staged.twin()
    work.set_tensors({name: state[name].to(value.dtype) for name, value in work.tensors.items()})
    ranges = {}
    for chief, own in zip(found.values.values(), staged.found.values.values(), strict=True):
        scale = state[f"{chief.name}_scale"].abs().clamp_min(TINY).float()
        before = staged.ranges[own]
        ranges[chief] = Parameters(scale, before.zero_point, before.format)
    for (end, chief), own in zip(found.values.items(), staged.found.values.values(), strict=True):
        ranges[chief] = saturating(found, end, ranges[chief], staged.ranges[own])
    weights = {}
    for node in found.runs:
        weight = weight_of(node)
        if weight is not None:
            name, axis = str(weight.target), channel_axis(node)
            scale = state[f"{name}_scale"].abs().clamp_min(TINY).float()
            how = Parameters(scale, torch.zeros_like(scale, dtype=torch.int32), staged.scheme.weight, axis)
            weights[name] = to_integers(work.tensors[name], how), how
    trained = Staged(work, staged.scheme, found, ranges, staged.calibration, staged.observer, staged.options,
                     unstored=staged.unstored)  # fmt: skip
    return trained.quantized(weights=weights, tables=tables)[0]


@dataclass(frozen=True)
class QuantizeAware(Quantize):
    """``prepare``, the caller's training, ``convert``, as a pass.

    Attributes:
        function: ``module -> anything``, trains it in place; from Python.

    The others are those of :class:`~graphprune.passes.quantize.Quantize`.
    """

    name: ClassVar[str] = "quantize-aware"

    function: Callable[[Any], Any] | None = None

    def run(self, graph: Graph, context: Context) -> PassResult:
        """The graph with quantizers, of what the function made of its weights and scales."""
        if self.function is None:
            raise PassError(self.name, "needs a function that trains a module, which only Python can give")
        options = {f.name: getattr(self, f.name) for f in fields(Quantize)}
        aware = prepare(graph, calibration=context.calibration, target=context.target, **options)
        with torch.enable_grad():
            self.function(aware.module)
        return PassResult(convert(aware, tables=self.embeddings), True, aware.notes)


def _state(module: torch.nn.Module) -> dict[str, Tensor]:
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    wrapped = state and all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if wrapped else name: v.detach().cpu() for name, v in state.items()}


def _insert(found: Annotation, ranges: Mapping[fx.Node, Parameters]) -> None:
    """Fake quantizers in place."""
    graph = found.graph
    for node in found.runs:
        constant_operands(found, node)
    scales: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    first = next(iter(n for n in graph.fx.nodes if n.op == "call_function"))
    for value, chief in found.values.items():
        how = ranges[chief]
        if chief not in scales:
            scales[chief] = (
                graph.add_tensor(f"{chief.name}_scale", how.scale.reshape(1), before=first, trainable=True),
                graph.add_tensor(
                    f"{chief.name}_zero_point",
                    how.zero_point.float().reshape(1),
                    before=first,
                    trainable=False,
                ),
            )
        readers = readers_of(found, value)
        low, high = how.format.range
        size = math.prod(int(s) if isinstance(s, int) else 1 for s in value.meta["val"].shape[1:]) or 1
        start = graph.placeholders[-1] if value.op == "placeholder" else value
        with graph.fx.inserting_after(start):
            args = (value, *scales[chief], -1, low, high, 1 / math.sqrt(size * high))
            fake = graph.fx.call_function(FAKE, args)
        for reader in readers:
            reader.replace_input_with(value, fake)
    done: dict[str, fx.Node] = {}
    for node in found.runs:
        weight = weight_of(node)
        if weight is None:
            continue
        name = str(weight.target)
        if name not in done:
            done[name] = _fake_weight(graph, node, weight, found)
        node.replace_input_with(weight, done[name])
    _in_order(graph)
    graph.propagate()


def _fake_weight(graph: Graph, node: fx.Node, weight: fx.Node, found: Annotation) -> fx.Node:
    name = str(weight.target)
    numbers, axis = graph.tensors[name].detach(), channel_axis(node)
    how = searched(node, numbers, of_weight(numbers, found.scheme.weight, axis), None)
    low, high = how.format.range
    scale = graph.add_tensor(f"{name}_scale", how.scale.reshape(-1), before=weight, trainable=True)
    zero = graph.add_tensor(
        f"{name}_zero_point", torch.zeros(scale.meta["val"].shape), before=weight, trainable=False
    )
    factor = 1 / math.sqrt(numbers.numel() * high / max(1, how.scale.numel()))
    with graph.fx.inserting_after(weight):
        args = (weight, scale, zero, -1 if axis is None else axis, low, high, factor)
        return graph.fx.call_function(FAKE, args)


def _in_order(graph: Graph) -> None:
    """Constants before everything: a scale may be read before the operator it was made for."""
    place = next(iter(graph.fx.nodes))
    for node in [n for n in graph.fx.nodes if n.op == "get_attr"]:
        if node is not place:
            place.prepend(node)
