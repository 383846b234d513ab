"""What OpenVINO really executes: the graph it compiled for this host, operator by operator.

The compiled model is run once on zeros (symbolic sizes are 1) and asked for its runtime graph, where each
operator says which kernel it has (``brgconv_avx512_I8``: integers) and which operators of the file it stands
for. The file says what OpenVINO was given: how many multiply-accumulates a product has, and whether both its
operands are integers that were dequantized. A product whose name the runtime graph has lost is looked for
where its result goes, which is the fused operator that took it in.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphprune.backend import Audit, AuditRow, Lowered
from graphprune.errors import BackendError
from graphprune.target import Target

from .openvino_model import read, runtime
from .openvino_session import OpenVinoRunner, zeros

_PRECISION = {
    "I8": "int8", "i8": "int8", "u8": "int8", "f32": "float32", "f64": "float64", "f16": "float16",
    "bf16": "bfloat16", "i32": "int32", "i64": "int64", "u32": "uint32", "boolean": "bool",
}  # fmt: skip
_BYTES, _BITS = ("i8", "u8"), {"i8": 8, "u8": 8, "i4": 4, "u4": 4}
_NO_WORK = ("Const", "Input", "Output")

_CONVOLUTIONS = {"Convolution": 1, "GroupConvolution": 2}  # axes of the weight before what is summed over
_TRANSPOSED = {"ConvolutionBackpropData": 1, "GroupConvolutionBackpropData": 2}
_RECURRENT = {"LSTMSequence": 4, "GRUSequence": 3, "RNNSequence": 3}  # which input is the first matrix
_PRODUCTS = {*_CONVOLUTIONS, *_TRANSPOSED, *_RECURRENT, "MatMul"}

# What stands between a dequantizer and its reader without computing.
_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Convert", "Slice", "StridedSlice", "Gather",
          "Broadcast", "MaxPool"}  # fmt: skip
_GATHERS = {"Concat", "Split", "VariadicSplit"}


def audit(lowered: Lowered, target: Target) -> Audit:
    """Every operator of the runtime graph; see the module docstring.

    Raises:
        BackendError: OpenVINO does not open the files here.
    """
    runner = OpenVinoRunner(lowered.files, lowered.inputs, lowered.outputs, profile=True)
    notes = []
    try:
        runner(*zeros(lowered.inputs))
    except BackendError as error:
        notes.append(f"the model does not run on zeros, so kernels may be missing: {error}")
    ran = {op.get_friendly_name(): op for op in runner.compiled.get_runtime_model().get_ordered_ops()}
    work = {name: op for name, op in ran.items() if _said(op, "layerType") not in _NO_WORK}
    inside, lost = _placed(_products(lowered), work)
    if lost:
        names = ", ".join(product.name for product in lost)
        notes.append(f"not found in the graph that runs, so neither counted nor judged: {names}")
    if any(_said(op, "layerType") == "If" for op in work.values()):
        notes.append("OpenVINO does not show what it runs in the sides of an If: neither counted nor judged")
    if not target.runs_here:
        notes.append(
            f"these are the operators of this host; a {target.arch} host may fuse and place them otherwise"
        )
    return Audit(tuple(_row(name, op, inside[name]) for name, op in work.items()), tuple(notes))


@dataclass(frozen=True)
class _Product:
    """One product of the file.

    Attributes:
        name: its name there.
        macs: with every symbolic size 1; 0 where a size depends on data.
        integers: whether its operands (of a recurrence: its matrices) are dequantized integers.
        bits: of a weight that is stored in integers, else 0.
        readers: names of what its result goes to, nearest first.
    """

    name: str
    macs: int
    integers: bool
    bits: int
    readers: tuple[str, ...]


def _row(name: str, op: Any, products: Sequence[_Product]) -> AuditRow:
    kernel = _said(op, "primitiveType").rpartition("_")[2]
    kind = kernel if kernel in _PRECISION else _said(op, "runtimePrecision")
    precision = _PRECISION.get(kind, kind or "unknown")
    fallen = [p.name for p in products if p.integers] if precision != "int8" else []
    if fallen:
        said = f"in float: OpenVINO dequantizes the integers that {', '.join(fallen)} multiplies"
    else:
        said = ""
        bits = {p.bits for p in products if p.bits}
        if bits and precision != "int8":
            precision = f"int{min(bits)} weights"
    return AuditRow(
        name, _said(op, "layerType"), precision, sum(p.macs for p in products), said, bool(fallen)
    )


def _said(op: Any, key: str) -> str:
    """What the runtime graph says of an operator, or nothing."""
    info = op.rt_info
    return str(info[key].astype(str)) if key in info else ""


def _placed(
    products: Sequence[_Product], ran: Mapping[str, Any]
) -> tuple[Mapping[str, list[_Product]], list[_Product]]:
    """Which products each operator that ran stands for, and those that none does."""
    owners: dict[str, str] = {}
    for name, op in ran.items():
        for own in (name, *_said(op, "originalLayersNames").split(",")):
            owners.setdefault(own, name)
            owners.setdefault(re.sub(r"/Dequantization\w+$", "", own), name)
    inside: dict[str, list[_Product]] = defaultdict(list)
    lost = []
    for product in products:
        owner = next((owners[n] for n in (product.name, *product.readers) if n in owners), None)
        if owner is None:
            lost.append(product)
        else:
            inside[owner].append(product)
    return inside, lost


def _products(lowered: Lowered) -> list[_Product]:
    """Every product of the file, its symbolic sizes 1."""
    model = read(runtime().Core(), lowered.files)
    model.reshape({i: list(value.shape) for i, value in enumerate(zeros(lowered.inputs))})
    found = []
    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        if kind not in _PRODUCTS:
            continue
        operands = [op.input_value(i) for i in range(op.get_input_size())]
        if kind in _RECURRENT:
            operands = operands[_RECURRENT[kind] : _RECURRENT[kind] + 2]
        sources = [_source(operand) for operand in operands[:2]]
        integers = all(source in _BYTES for source in sources)
        bits = 0 if integers else _BITS.get(sources[1], 0)
        found.append(_Product(op.get_friendly_name(), _macs(op), integers, bits, tuple(_readers(op))))
    return found


def _source(value: Any) -> str:
    """The type of the integers that a value was dequantized from, or nothing.

    ``scale * (convert(integers) - zero_point)``, moved around; one scale and one zero point, so that a
    product of the network's own does not pass for a dequantizer.
    """
    steps = {"Multiply": 1, "Subtract": 1}
    while True:
        node = value.get_node()
        kind = node.get_type_name()
        if kind == "Convert" and node.input(0).get_element_type().get_type_name() in _BITS:
            return str(node.input(0).get_element_type().get_type_name())
        if steps.get(kind):
            steps[kind] -= 1
        elif kind in _GATHERS:
            pass
        elif kind not in _MOVES:
            return ""
        value = node.input_value(1 if kind == "Multiply" and _is_constant(node.input_value(0)) else 0)


def _is_constant(value: Any) -> bool:
    return bool(value.get_node().get_type_name() == "Constant")


def _readers(op: Any, most: int = 24) -> Iterator[str]:
    """Names of the operators that a result goes to, nearest first."""
    waiting, seen = deque([op]), set[str]()
    while waiting and len(seen) < most:
        for output in waiting.popleft().outputs():
            for reader in output.get_target_inputs():
                node = reader.get_node()
                name = node.get_friendly_name()
                if name not in seen:
                    seen.add(name)
                    waiting.append(node)
                    yield name


def _macs(op: Any) -> int:
    """Multiply-accumulates by shape; 0 where a size depends on data."""
    kind = op.get_type_name()
    shapes = [_shape(op.input_value(i)) for i in range(op.get_input_size())]
    result = _shape(op.output(0))
    if kind in _CONVOLUTIONS and result and shapes[1]:
        return math.prod(result) * math.prod(shapes[1][_CONVOLUTIONS[kind] :])
    if kind in _TRANSPOSED and shapes[0] and shapes[1]:
        return math.prod(shapes[0]) * math.prod(shapes[1][_TRANSPOSED[kind] :])
    if kind in _RECURRENT and shapes[0]:
        first = _RECURRENT[kind]
        return math.prod(shapes[0][:2]) * sum(math.prod(s) for s in shapes[first : first + 2] if s)
    if kind == "MatMul" and result is not None and shapes[0]:
        turned = op.get_attributes()["transpose_a"] and len(shapes[0]) > 1
        return math.prod(result) * shapes[0][-2 if turned else -1]
    return 0


def _shape(value: Any) -> list[int] | None:
    shape = value.get_partial_shape()
    return [int(n) for n in shape.to_shape()] if shape.is_static else None
