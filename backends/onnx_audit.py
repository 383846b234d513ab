"""What ONNX Runtime really executes: the graph it optimised for this host, operator by operator.

The session writes its optimised graph to a temporary file and profiles one run on zeros: the first says which
operators are left and how they hang together, the second on which provider and on which shapes each ran.
Symbolic sizes count as 1. Multiply-accumulates include the padding channels of blocked layouts, as the
processor does.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from graphprune.backend import Audit, AuditRow, Lowered
from graphprune.target import Target

from .onnx_providers import COMPILING, available, placed
from .onnx_session import options, session

PRECISION = {"float": "float32", "double": "float64"}
_INT8 = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize", "QAttention")

# Where the weight stands among the inputs of a convolution.
_CONV_WEIGHT = {"Conv": 1, "FusedConv": 1, "NhwcFusedConv": 1, "ConvInteger": 1, "QLinearConv": 3}
_MATRIX = {"Gemm", "FusedGemm", "QGemm", "MatMul", "FusedMatMul", "QLinearMatMul", "MatMulInteger",
           "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits"}  # fmt: skip
_FLOAT_ONLY = ("ConvTranspose",)
_PRODUCTS = {*_CONV_WEIGHT, *_MATRIX, "ConvTranspose"}
_BETWEEN = {"Add", "Mul", "AveragePool", "GlobalAveragePool", "Concat", "Sigmoid", "LeakyRelu"}


def audit(lowered: Lowered, target: Target) -> Audit:
    """Every operator of the optimised graph; see the module docstring.

    Raises:
        BackendError: ONNX Runtime does not open the files here.
    """
    if any(provider in COMPILING for provider in available(target)):
        from .onnx_assigned import assigned

        return assigned(lowered, target)
    with tempfile.TemporaryDirectory() as place:
        chosen = options()
        chosen.optimized_model_filepath = f"{place}/optimised.onnx"
        if len(lowered.files) > 1:
            chosen.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", "optimised.data"
            )
        chosen.enable_profiling = True
        chosen.profile_file_prefix = f"{place}/profile"
        opened = session(lowered.files, target, chosen)
        note = run_once(opened)
        profile = json.loads(Path(opened.end_profiling()).read_text())
        model = onnx.load(f"{place}/optimised.onnx", load_external_data=False)
    return Audit(executed(model, profile, target), tuple(n for n in (note, foreign(target)) if n))


def executed(
    model: onnx.ModelProto, profile: Sequence[Mapping[str, Any]], target: Target
) -> tuple[AuditRow, ...]:
    """The operators of an optimised graph, with what a profile of one run says of each."""
    events: dict[tuple[str, str], deque[Mapping[str, Any]]] = defaultdict(deque)
    for event in profile:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            events[name, event["args"]["op_name"]].append(event["args"])
    weights = {t.name: tuple(t.dims) for t in model.graph.initializer}
    around = _Around(model.graph)
    rows = []
    for node in model.graph.node:
        queue = events[node.name, node.op_type]
        rows.append(_row(node, queue.popleft() if queue else {}, weights, around, target))
    return tuple(rows)


def run_once(opened: ort.InferenceSession) -> str:
    """Run on zeros; a note when the model does not run on them."""
    feed = {}
    for value in opened.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in value.shape]
        kind = value.type.removeprefix("tensor(").removesuffix(")")
        if kind == "bfloat16":
            bits = np.zeros(shape, np.uint16)
            feed[value.name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
                bits, onnx.TensorProto.BFLOAT16
            )
        else:
            dtype = {"float": "float32", "double": "float64"}.get(kind, kind)
            feed[value.name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
    try:
        opened.run_with_ort_values([o.name for o in opened.get_outputs()], feed)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        return f"the model does not run on zeros, so multiply-accumulates are not counted: {reason}"
    return ""


def foreign(target: Target) -> str:
    if target.runs_here:
        return ""
    return f"these are the operators of this host; a {target.arch} host may fuse and place them otherwise"


def _row(
    node: onnx.NodeProto,
    ran: Mapping[str, Any],
    weights: Mapping[str, tuple[int, ...]],
    around: _Around,
    target: Target,
) -> AuditRow:
    name = node.name or next(iter(node.output), "")
    domain = "nchwc." if node.domain == "com.microsoft.nchwc" else ""
    outputs = [next(iter(shape.items())) for shape in ran.get("output_type_shape", ()) if shape]
    if node.op_type.startswith(_INT8):
        precision = "int8"
    elif node.op_type == "MatMulNBits":
        precision = f"int{_attribute(node, 'bits', 4)} weights"
    else:
        kind = outputs[0][0] if outputs else ""
        precision = PRECISION.get(kind, kind or "unknown")
    reason = placed(ran.get("provider", ""), target)
    unfused = "" if reason else around.unfused(node)
    macs = macs_of(node, ran, outputs[0][1], weights) if outputs else 0
    fell_back = bool(unfused) and node.op_type not in ("QuantizeLinear", *_FLOAT_ONLY)
    return AuditRow(name, domain + node.op_type, precision, macs, reason or unfused, fell_back)


class _Around:
    """Who makes and who reads what in an optimised graph."""

    def __init__(self, graph: onnx.GraphProto):
        self.makers = {output: node.op_type for node in graph.node for output in node.output}
        self.readers: dict[str, list[str]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node.op_type)
        self.outputs = {value.name for value in graph.output}

    def unfused(self, node: onnx.NodeProto) -> str:
        """Why an operator between quantizers is not an integer one, or empty."""
        fed = [self.makers.get(name) == "DequantizeLinear" for name in node.input if name]
        read = [kind for name in node.output for kind in self.readers[name]]
        if node.op_type in _PRODUCTS and len(fed) > 1 and all(fed[:2]):
            if node.op_type in _FLOAT_ONLY:
                return f"in float: ONNX Runtime has no integer {node.op_type}; its weight is stored as int8"
            return "in float: ONNX Runtime did not fuse the DequantizeLinear before it"
        if node.op_type in _BETWEEN and fed and all(fed) and read and set(read) == {"QuantizeLinear"}:
            return "in float: ONNX Runtime did not fuse the quantizers around it"
        if node.op_type == "QuantizeLinear" and read and set(read) == {"DequantizeLinear"}:
            return "a quantizer that is undone at once: it rounds, and nothing behind it runs in integers"
        return ""


def macs_of(
    node: onnx.NodeProto, ran: Mapping[str, Any], output: list[int], weights: Mapping[str, tuple[int, ...]]
) -> int:
    """Multiply-accumulates from the shapes an operator ran on; 0 for operators without, or unknown."""
    inputs: list[list[int]] = [next(iter(shape.values()), []) for shape in ran.get("input_type_shape", ())]
    if node.op_type in _CONV_WEIGHT:
        weight = weights.get(node.input[_CONV_WEIGHT[node.op_type]], ())
        return math.prod(output) * math.prod(weight[1:]) if weight else 0
    if node.op_type == "ConvTranspose" and len(inputs) > 1:
        return math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if node.op_type in _MATRIX and inputs and inputs[0]:
        inner = -2 if _attribute(node, "transA", 0) and len(inputs[0]) > 1 else -1
        return math.prod(output) * inputs[0][inner]
    if node.op_type in ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM") and inputs:
        used = [weights.get(name, ()) for name in node.input[1:3]]
        return math.prod(inputs[0][:2]) * sum(math.prod(w) for w in used if w)
    return 0


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)
