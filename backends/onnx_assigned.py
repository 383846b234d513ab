"""Which execution provider runs which operator, where providers compile parts of the graph.

What a provider like OpenVINO's has compiled is one operator to ONNX Runtime, which cannot write the graph
down any more. It does record, operator by operator, whom it gave the graph to, in both sides of a decision;
the file's own shapes, symbolic sizes 1, say how much work each is. In which precision a compiled part
computes what the graph has in integers is the provider's own affair, and stands as ``unknown``.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from graphprune.backend import Audit, AuditRow, Lowered
from graphprune.target import Target

from .onnx_files import DATA_FILE, MODEL_FILE
from .onnx_operators import PRECISION, macs_of
from .onnx_providers import COMPILING, foreign, placed
from .onnx_session import options, run_on_zeros, session
from .onnx_sides import NOTE, counted, graphs, sides

_RECORD = "session.record_ep_graph_assignment_info"
_PLACEMENTS = "get_provider_graph_assignment_info"
_UNTOLD = "onnxruntime before 1.24 says nothing of the side of an If that zeros do not take"


def assigned(lowered: Lowered, target: Target) -> Audit:
    """Every operator with the provider that runs it.

    Raises:
        BackendError: ONNX Runtime does not open the files here.
    """
    with tempfile.TemporaryDirectory() as place:
        chosen = options()
        chosen.add_session_config_entry(_RECORD, "1")
        chosen.enable_profiling = True
        chosen.profile_file_prefix = f"{place}/profile"
        opened = session(lowered.files, target, chosen)
        note = run_on_zeros(opened)
        profile = json.loads(Path(opened.end_profiling()).read_text())
        placements = _placements(opened, profile)
    model = _typed(lowered)
    rows = _rows(model, model.graph, {name: provider for name, _, provider in placements}, target)
    # What the runtime has made itself, and before 1.24 what a provider has compiled, is not in the file.
    rows += [
        AuditRow(name, kind, "unknown", 0, placed(provider, target))
        for name, kind, provider in placements
        if name not in model.nodes
    ]
    counts = Counter(provider for _, _, provider in placements)
    shares = ", ".join(f"{count} on {provider}" for provider, count in counts.most_common())
    decides = any(node.op_type == "If" for node in model.nodes.values())
    sided = (NOTE if hasattr(opened, _PLACEMENTS) else _UNTOLD) if decides else ""
    notes = note, f"operators: {shares}", sided, foreign(target)
    return Audit(tuple(rows), tuple(n for n in notes if n))


def _placements(opened: Any, profile: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Name, kind and provider of each operator; of compiled parts as wholes before onnxruntime 1.24."""
    if hasattr(opened, _PLACEMENTS):
        return [
            (node.name, node.op_type, part.ep_name)
            for part in opened.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ]
    ran = [e for e in profile if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    return [
        (e["name"].removesuffix("_kernel_time"), e["args"]["op_name"], e["args"]["provider"]) for e in ran
    ]


class _Typed:
    """The file's operators by name, those of the sides of decisions, too, and what is known of each value."""

    def __init__(self, model: onnx.ModelProto):
        self.graph = model.graph
        self.nodes: dict[str, onnx.NodeProto] = {}
        self.makers: dict[str, str] = {}
        self.values: dict[str, tuple[str, list[int]]] = {}
        for graph in graphs(model.graph):
            self.nodes |= {node.name: node for node in graph.node}
            self.makers |= {output: node.op_type for node in graph.node for output in node.output}
            for value in (*graph.input, *graph.value_info, *graph.output):
                tensor = value.type.tensor_type
                shape = [max(size.dim_value, 1) for size in tensor.shape.dim]
                self.values[value.name] = _kind(tensor.elem_type), shape
            for constant in graph.initializer:
                self.values[constant.name] = _kind(constant.data_type), list(constant.dims)
        # Of weights that are dequantized, too.
        self.shapes = {name: tuple(shape) for name, (_, shape) in self.values.items()}

    def macs(self, node: onnx.NodeProto) -> int:
        """Multiply-accumulates of one operator."""
        inputs = [self.values[name][1] for name in node.input if name in self.values]
        return macs_of(node, inputs, self.values.get(node.output[0], ("", []))[1], self.shapes)


def _kind(number: int) -> str:
    return onnx.TensorProto.DataType.Name(number).lower()


def _typed(lowered: Lowered) -> _Typed:
    model = onnx.load_from_string(lowered.files[MODEL_FILE])
    for value in model.graph.input:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_value = 1
    for graph in graphs(model.graph):
        for value in graph.output:
            value.type.tensor_type.ClearField("shape")
        del graph.value_info[:]
    if DATA_FILE in lowered.files:
        return _Typed(onnx.shape_inference.infer_shapes(model, data_prop=False))
    return _Typed(onnx.shape_inference.infer_shapes(model, data_prop=True))


def _rows(
    model: _Typed, graph: onnx.GraphProto, providers: Mapping[str, str], target: Target, within: str = ""
) -> list[AuditRow]:
    """The operators that somebody runs, in the file's order.

    ``within`` is who has compiled the decision that they are a side of, and them with it.
    """
    rows = []
    for node in graph.node:
        provider = providers.get(node.name, within)
        if provider:
            rows.append(_row(model, node, provider, target))
        inner = provider if provider in COMPILING else ""
        rows += counted([_rows(model, side, providers, target, inner) for side in sides(node)])
    return rows


def _row(model: _Typed, node: onnx.NodeProto, provider: str, target: Target) -> AuditRow:
    reason, macs = placed(provider, target), model.macs(node)
    found = model.values.get(node.output[0], ("", []))[0]
    precision = PRECISION.get(found, found or "unknown")
    integers = macs and all(model.makers.get(i) == "DequantizeLinear" for i in node.input[:2])
    if integers and provider in COMPILING:
        precision = "unknown"
        reason = reason or f"in integers or in float: {provider} does not say"
    return AuditRow(node.name, node.op_type, precision, macs, reason)
