"""What ONNX Runtime really executes: the graph it optimised for this host, operator by operator.

The session writes its optimised graph to a temporary file and profiles runs on zeros: the first says which
operators are left and how they hang together, the second on which provider and on which shapes each ran.
Symbolic sizes count as 1. Multiply-accumulates include the padding channels of blocked layouts, as the
processor does. The operators of both sides of a decision are listed, made to run by :mod:`.onnx_sides`; as in
the cost of a graph, the side counts that costs most.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from graphprune.backend import Audit, AuditRow, Lowered
from graphprune.target import Target

from .onnx_assigned import assigned
from .onnx_files import MODEL_FILE
from .onnx_operators import PRECISION, PRODUCTS, attribute, macs_of
from .onnx_providers import COMPILING, available, foreign, placed
from .onnx_session import options, run_on_zeros, session
from .onnx_sides import NOTE, STEERING, counted, reads, sides, steered

_INT8 = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize", "QAttention")
_FLOAT_ONLY = ("ConvTranspose",)
_BETWEEN = {"Add", "Mul", "AveragePool", "GlobalAveragePool", "Concat", "Sigmoid", "LeakyRelu"}


def audit(lowered: Lowered, target: Target) -> Audit:
    """Every operator of the optimised graph; see the module docstring.

    Raises:
        BackendError: ONNX Runtime does not open the files here.
    """
    if any(provider in COMPILING for provider in available(target)):
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
        content, runs = steered(lowered.files[MODEL_FILE])
        opened = session({**lowered.files, MODEL_FILE: content}, target, chosen)
        notes = [run_on_zeros(opened, given) for given in runs]
        profile = json.loads(Path(opened.end_profiling()).read_text())
        model = onnx.load(f"{place}/optimised.onnx", load_external_data=False)
    notes += [NOTE if len(runs) > 1 else "", foreign(target)]
    return Audit(executed(model, profile, target), tuple(n for n in dict.fromkeys(notes) if n))


def executed(
    model: onnx.ModelProto, profile: Sequence[Mapping[str, Any]], target: Target
) -> tuple[AuditRow, ...]:
    """The operators of an optimised graph, with what a profile of its runs says of each."""
    events: _Events = defaultdict(deque)
    for event in profile:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            events[name, event["args"]["op_name"]].append(event["args"])
    return tuple(_rows(_Scope(model.graph), events, target))


_Events = defaultdict[tuple[str, str], deque[Mapping[str, Any]]]


def _rows(scope: _Scope, events: _Events, target: Target) -> list[AuditRow]:
    rows = []
    for node in scope.graph.node:
        if node.name.startswith(STEERING):
            continue
        queue = events[node.name, node.op_type]
        rows.append(_row(node, queue.popleft() if queue else {}, scope, target))
        rows += counted([_rows(_Scope(side, scope), events, target) for side in sides(node)])
    return rows


def _row(node: onnx.NodeProto, ran: Mapping[str, Any], scope: _Scope, target: Target) -> AuditRow:
    name = node.name or next(iter(node.output), "")
    domain = "nchwc." if node.domain == "com.microsoft.nchwc" else ""
    outputs = [next(iter(shape.items())) for shape in ran.get("output_type_shape", ()) if shape]
    if node.op_type.startswith(_INT8):
        precision = "int8"
    elif node.op_type == "MatMulNBits":
        precision = f"int{attribute(node, 'bits', 4)} weights"
    else:
        kind = outputs[0][0] if outputs else ""
        precision = PRECISION.get(kind, kind or "unknown")
    reason = placed(ran.get("provider", ""), target)
    unfused = "" if reason else scope.unfused(node)
    inputs: list[list[int]] = [next(iter(shape.values()), []) for shape in ran.get("input_type_shape", ())]
    macs = macs_of(node, inputs, outputs[0][1], scope.weights) if outputs else 0
    fell_back = bool(unfused) and node.op_type not in ("QuantizeLinear", *_FLOAT_ONLY)
    if scope.within and not ran and node.op_type in PRODUCTS:
        unfused = unfused or "its side of the If was not taken, so its multiply-accumulates are not counted"
    return AuditRow(name, domain + node.op_type, precision, macs, reason or unfused, fell_back)


class _Scope:
    """Who makes and who reads what in an optimised graph, and the shapes of its constants.

    A side of a decision sees what the graph around it has, too.
    """

    def __init__(self, graph: onnx.GraphProto, outer: _Scope | None = None):
        self.graph, self.within = graph, outer is not None
        self.makers = {output: node.op_type for node in graph.node for output in node.output}
        self.weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        if outer is not None:
            self.makers = {**outer.makers, **dict.fromkeys(self.weights, ""), **self.makers}
            self.weights = {**outer.weights, **self.weights}
        self.readers: dict[str, list[str]] = defaultdict(list)
        for name, kind in reads(graph):
            self.readers[name].append(kind)

    def unfused(self, node: onnx.NodeProto) -> str:
        """Why an operator between quantizers is not an integer one, or empty."""
        fed = [self.makers.get(name) == "DequantizeLinear" for name in node.input if name]
        read = [kind for name in node.output for kind in self.readers[name]]
        if node.op_type in PRODUCTS and len(fed) > 1 and all(fed[:2]):
            if node.op_type in _FLOAT_ONLY:
                return f"in float: ONNX Runtime has no integer {node.op_type}; its weight is stored as int8"
            return "in float: ONNX Runtime did not fuse the DequantizeLinear before it"
        if node.op_type in _BETWEEN and fed and all(fed) and read and set(read) == {"QuantizeLinear"}:
            return "in float: ONNX Runtime did not fuse the quantizers around it"
        if node.op_type == "QuantizeLinear" and read and set(read) == {"DequantizeLinear"}:
            return "a quantizer that is undone at once: it rounds, and nothing behind it runs in integers"
        return ""
