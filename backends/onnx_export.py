"""A graph as ONNX bytes, the same bytes for the same graph.

``torch.onnx`` does the translation. Around it: outputs that are not tensors stay out of the file, inputs and
outputs get the caller's names, symbolic sizes get names a reader understands (``batch``), whatever speaks of
the machine it was built on (stack traces, exporter metadata) is taken out, and more data than one protobuf
message can hold goes into a second file.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import fx
from torch.onnx.errors import OnnxExporterError

from graphprune import structure
from graphprune.backend import Lowered, TensorSpec
from graphprune.errors import BackendError
from graphprune.graph import Graph
from graphprune.graph_text import operator_name
from graphprune.target import Target
from graphprune.versions import installed

from .exported import exported, first_line, tensor_outputs
from .onnx_attention import four_dimensional
from .onnx_branches import own_constants
from .onnx_dynamic import dynamic
from .onnx_files import DATA_FILE, MODEL_FILE
from .onnx_integers import packed
from .onnx_pooling import pool_globally
from .onnx_precision import computable
from .onnx_strides import stride_pooling
from .onnx_translations import shared

OPSET = 20

# A protobuf message ends at 2 GiB; the graph itself needs room beside the tensors.
LARGEST_MESSAGE = 1536 * 2**20
# Tensors below this stay in the message: shape inference reads small constants.
_SMALL = 1024
_ALIGNMENT = 64

_SYMBOL = re.compile(r"\bs\d+\b")
_PACKAGES = ("onnx", "onnx-ir", "onnxruntime", "onnxscript", "torch")
_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


def export(graph: Graph, target: Target, backend: str) -> Lowered:
    """Lower ``graph`` for ``target``; see :meth:`graphprune.backends.onnxruntime.OnnxRuntime.lower`.

    Raises:
        BackendError: the graph has no weights or no tensor output, or holds an operator that the exporter
            cannot translate; names the node.
    """
    kept = tensor_outputs(graph)
    computed, notes = computable(graph, target)
    flat: tuple[Any, ...] = tuple(graph.output.args[0])  # type: ignore[arg-type]
    # Attention has other strides where gradients are recorded; the exporter derives shapes in both modes.
    with _quiet(), torch.no_grad():
        program, told = _program(computed, kept, target)
        model = _translate(computed, program)
    pool_globally(model)
    _strip(model)
    named = structure.names(structure.of_spec(graph.signature.out_spec), "output")
    _rename(model, graph.signature.names, [named.get(i, f"output_{i}") for i in kept])
    _name_symbols(model)
    if _bytes(model) <= LARGEST_MESSAGE:
        own_constants(model)
    results = iter(model.graph.outputs)
    return Lowered(
        backend=backend,
        inputs=tuple(
            _spec(value, node.meta["val"])
            for value, node in zip(model.graph.inputs, graph.placeholders, strict=True)
        ),
        outputs=tuple(_spec(next(results), v.meta["val"]) if isinstance(v, fx.Node) else v for v in flat),
        files=_files(model),
        versions={package: found for package in _PACKAGES if (found := installed(package))},
        notes=(*notes, *told),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings and log lines to itself; what matters of them is raised or noted."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _program(
    graph: Graph, kept: Sequence[int], target: Target
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """The graph with the outputs ``kept``, exported, as the translation wants it; and notes on it."""
    graph = graph.copy()
    notes = stride_pooling(graph, target)
    four_dimensional(graph)
    dynamic(graph)
    notes += packed(graph)
    return exported(graph, kept), notes


def _translate(graph: Graph, program: torch.export.ExportedProgram) -> ir.Model:
    try:
        with shared():
            done = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=OPSET)
    except OnnxExporterError as error:
        raise BackendError(_untranslatable(graph, error)) from error
    assert done is not None
    return done.model


def _untranslatable(graph: Graph, error: BaseException) -> str:
    """Which node the exporter stopped at, in the words of the graph it came from, and why."""
    node, cause = None, error
    link: BaseException | None = error
    while link is not None:
        cause = link
        trace = link.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_name == "_translate_fx_graph":
                node = trace.tb_frame.f_locals.get("node", node)
            trace = trace.tb_next
        link = link.__cause__
    reason = first_line(cause).partition(" Failure message:")[0]
    advice = "write that part of the model with other operators, or use another backend"
    if not isinstance(node, fx.Node):
        return f"the graph does not translate to ONNX: {reason}; {advice}"
    own = {n.name: n for n in graph.nodes}
    names = [node.name, *(source.name for source in node.meta.get("from_node", ()))]
    at = next((graph.where(own[name]) for name in reversed(names) if name in own), node.name)
    return f"{at} cannot become ONNX, {operator_name(node)!r} has no translation: {reason}; {advice}"


def _strip(model: ir.Model) -> None:
    """Remove what names the exporter's inner life or this machine."""
    model.metadata_props.clear()
    for graph in _graphs(model):
        graph.metadata_props.clear()
        for value in [*graph.inputs, *graph.outputs]:
            value.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    for node in _nodes(model):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in _graphs(model):
        yield from ir.traversal.RecursiveGraphIterator(graph)


def _graphs(model: ir.Model) -> list[ir.Graph | ir.Function]:
    return [model.graph, *model.functions.values()]


def _values(model: ir.Model) -> list[ir.Value]:
    """Every named value, once."""
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in _nodes(model):
        values += [*node.inputs, *node.outputs]  # type: ignore[list-item]
    return [*dict.fromkeys(value for value in [*values, *model.graph.outputs] if value is not None)]


def _rename(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give inputs and outputs the caller's names; what has such a name already gets another."""
    wanted: dict[ir.Value, str] = {}
    taken: set[str] = set()
    for value, name in [*zip(model.graph.inputs, inputs, strict=True),
                        *zip(model.graph.outputs, outputs, strict=True)]:  # fmt: skip
        wanted[value] = _free(name, taken)
        taken.add(wanted[value])
    others = [value for value in _values(model) if value not in wanted]
    in_use = taken | {value.name or "" for value in others}
    for value in others:
        if value.name in taken:
            value.name = _free(value.name or "", in_use)
            in_use.add(value.name)
    # In two steps: an initializer may not take a name that another one still has.
    for index, value in enumerate(wanted):
        value.name = _free(f"graphprune_{index}", in_use)
    for value, name in wanted.items():
        value.name = name


def _free(name: str, taken: set[str]) -> str:
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _name_symbols(model: ir.Model) -> None:
    """Rename the exporter's symbols: the first leading dimension is ``batch``, others say where they are."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for position, size in enumerate(value.shape or ()):
            symbol = None if isinstance(size, int) else size.value
            if symbol and _SYMBOL.fullmatch(symbol) and symbol not in names:
                first = position == 0 and "batch" not in names.values()
                names[symbol] = "batch" if first else f"{value.name}_dim{position}"
    for value in _values(model):
        if value.shape is not None and any(not isinstance(size, int) for size in value.shape):
            value.shape = ir.Shape([_renamed(size, names) for size in value.shape])


def _renamed(size: Any, names: dict[str, str]) -> Any:
    if isinstance(size, int) or size.value is None:
        return size
    return _SYMBOL.sub(lambda match: names.get(match.group(), match.group()), size.value)


def _spec(value: ir.Value, meta: Any) -> TensorSpec:
    """The specification of one input or output; a symbolic number has the dtype ``int``."""
    if not isinstance(meta, torch.Tensor):
        return TensorSpec(value.name or "", (), "int")
    sizes: list[Any] = [None] * meta.dim() if value.shape is None else list(value.shape)
    shape = tuple(s if isinstance(s, int) else getattr(s, "value", None) or "?" for s in sizes)
    return TensorSpec(value.name or "", shape, str(meta.dtype).removeprefix("torch."))


def _bytes(model: ir.Model) -> int:
    """What the constants of the main graph take."""
    values = [value.const_value for value in model.graph.initializers.values()]
    return sum(tensor.nbytes for tensor in values if tensor is not None)


def _files(model: ir.Model) -> dict[str, bytes]:
    """The model as bytes, its larger tensors in a second file where one message cannot hold them."""
    tensors = [(v, v.const_value) for v in model.graph.initializers.values() if v.const_value is not None]
    files: dict[str, bytes] = {}
    if _bytes(model) > LARGEST_MESSAGE:
        chunks, offset = [], 0
        for value, tensor in tensors:
            if tensor.nbytes < _SMALL:
                continue
            start = offset + -offset % _ALIGNMENT
            chunks += [bytes(start - offset), tensor.tobytes()]
            value.const_value = ir.ExternalTensor(
                DATA_FILE, start, tensor.nbytes, tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()), name=value.name or "",
            )  # fmt: skip
            offset = start + tensor.nbytes
        files[DATA_FILE] = b"".join(chunks)
    return {MODEL_FILE: ir.serde.serialize_model(model).SerializeToString(deterministic=True), **files}
