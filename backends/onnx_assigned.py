"""Which execution provider runs which operator, where providers compile parts of the graph.

What a provider like OpenVINO's has compiled is one operator to ONNX Runtime, which cannot write the graph
down any more. It does record, operator by operator, whom it gave the graph to; the file's own shapes,
symbolic sizes 1, say how much work each is. In which precision a compiled part computes what the graph has in
integers is the provider's own affair, and stands as ``unknown``.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from graphprune.backend import Audit, AuditRow, Lowered
from graphprune.target import Target

from .onnx_audit import PRECISION, foreign, macs_of, run_once
from .onnx_files import DATA_FILE, MODEL_FILE
from .onnx_providers import COMPILING, placed
from .onnx_session import options, session

_RECORD = "session.record_ep_graph_assignment_info"


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
        note = run_once(opened)
        profile = json.loads(Path(opened.end_profiling()).read_text())
        placements = _placements(opened, profile)
    model = _typed(lowered)
    rows = [_row(model, name, kind, provider, target) for name, kind, provider in placements]
    counts = Counter(provider for _, _, provider in placements)
    shares = ", ".join(f"{count} on {provider}" for provider, count in counts.most_common())
    return Audit(tuple(rows), tuple(n for n in (note, f"operators: {shares}", foreign(target)) if n))


def _placements(opened: Any, profile: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Name, kind and provider of each operator; of compiled parts as wholes before onnxruntime 1.24."""
    if hasattr(opened, "get_provider_graph_assignment_info"):
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
    """The file's operators by name, and the type and shape of each value in it."""

    def __init__(self, model: onnx.ModelProto):
        graph = model.graph
        self.nodes = {node.name: node for node in graph.node}
        self.makers = {output: node.op_type for node in graph.node for output in node.output}
        self.values: dict[str, tuple[str, list[int]]] = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
            self.values[value.name] = kind, [max(d.dim_value, 1) for d in tensor.shape.dim]
        for tensor in graph.initializer:
            kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
            self.values[tensor.name] = kind, list(tensor.dims)
        # Of weights that are dequantized, too.
        self.shapes = {name: tuple(shape) for name, (_, shape) in self.values.items()}


def _typed(lowered: Lowered) -> _Typed:
    model = onnx.load_from_string(lowered.files[MODEL_FILE])
    for value in model.graph.input:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_value = 1
    for value in (*model.graph.output, *model.graph.value_info):
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    if DATA_FILE in lowered.files:
        return _Typed(onnx.shape_inference.infer_shapes(model, data_prop=False))
    return _Typed(onnx.shape_inference.infer_shapes(model, data_prop=True))


def _row(model: _Typed, name: str, kind: str, provider: str, target: Target) -> AuditRow:
    reason = placed(provider, target)
    node = model.nodes.get(name)
    if node is None:
        return AuditRow(name, kind, "unknown", 0, reason)
    result = model.values.get(node.output[0], ("", []))
    inputs = [dict([model.values[i]]) for i in node.input if i in model.values]
    macs = macs_of(node, {"input_type_shape": inputs}, result[1], model.shapes)
    precision = PRECISION.get(result[0], result[0] or "unknown")
    integers = macs and all(model.makers.get(i) == "DequantizeLinear" for i in node.input[:2])
    if integers and provider in COMPILING:
        precision = "unknown"
        reason = reason or f"in integers or in float: {provider} does not say"
    return AuditRow(name, kind, precision, macs, reason)
