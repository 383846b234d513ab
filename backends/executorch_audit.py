"""What a ``.pte`` file executes, read from the file: XNNPACK's subgraphs, and operators outside of them.

The file says in which type each tensor of a subgraph is held, and that decides XNNPACK's kernel: it has no
other for a convolution of ``qint8`` with a ``qcint8`` filter than one in integers. Operators outside run on
ExecuTorch's own kernels, in the type of what they write. ``operators.json`` says what the graph asked for;
products are matched to it in order, by multiply-accumulates.
"""

from __future__ import annotations

import json
import math
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from torch import fx

from graphprune.backend import Audit, AuditRow, Lowered
from graphprune.cost import node_macs
from graphprune.errors import BackendError
from graphprune.graph import Graph
from graphprune.kinds import kind
from graphprune.target import Target

from .executorch_integers import asks_for_integers
from .executorch_program import PROGRAM_FILE, quiet
from .exported import at_sizes, first_line

OPERATORS_FILE = "operators.json"

_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_SCALARS = {0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32",
            7: "float64", 11: "bool", 15: "bfloat16"}  # fmt: skip
_CONVOLUTIONS = {"XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d"}
_PRODUCTS = {"XNNFullyConnected", "XNNBatchMatrixMultiply", "XNNScaledDotProductAttention"}
_OWN_CONVOLUTIONS = ("convolution",)
_OWN_PRODUCTS = ("mm", "bmm", "addmm", "linear", "matmul")
_FALLEN = "in float: XNNPACK has no integer kernel for it as it stands (its result has to be quantized, too)"
_INFINITE = re.compile(r"(?<=: )-?(?:inf|nan)\b")  # limits of activations, which JSON has no word for
_FIRST = ("input1_id", "input_id", "query_id")
_MAGIC = b"XH00"  # of the header before a subgraph


def asked(graph: Graph, planned_for: Mapping[Any, int]) -> dict[str, Any]:
    """The graph's products, and how many times more work the file's sizes are than one sample.

    Args:
        graph: as the backend was given it.
        planned_for: symbolic size → what it is in the file.
    """
    products, one, all_ = [], 0, 0
    for node in graph.fx.nodes:
        alone, planned = (_work(node, sizes) for sizes in (dict.fromkeys(planned_for, 1), planned_for))
        one, all_ = one + sum(alone), all_ + sum(planned)
        name = str(node.name)
        integers = asks_for_integers(node)
        products += [{"name": name, "macs": macs, "integers": integers} for macs in planned]
    return {"products": products, "times": all_ // one if one else 1}


def _work(node: fx.Node, symbols: Mapping[Any, int]) -> list[int]:
    """Multiply-accumulates of each product that an operator is, where symbolic sizes have these values."""

    def shape(value: Any) -> tuple[int, ...]:
        return tuple(at_sizes(size, symbols) for size in value.meta["val"].shape)

    macs = node_macs(node, shape)
    if kind(node) == "attention" and macs:
        query, key, value = (shape(operand) for operand in node.args[:3])
        return [math.prod(query[:-1]) * key[-2] * width for width in (query[-1], value[-1])]
    return [macs] if macs else []


def audit(lowered: Lowered, target: Target) -> Audit:
    """Every operator of the file, in the order of execution.

    Raises:
        BackendError: the files are not a program of ours.
    """
    try:
        document = json.loads(lowered.files[OPERATORS_FILE])
        wanted, times = document["products"], int(document["times"])
        steps = list(_steps(lowered.files[PROGRAM_FILE]))
    except (KeyError, ValueError, struct.error, IndexError) as error:
        raise BackendError(f"the program cannot be audited: {type(error).__name__}: {error}") from error
    products = [i for i, step in enumerate(steps) if step.product]
    found = _matched(wanted, [steps[i] for i in products])
    names = dict(zip(products, found, strict=True))
    notes = []
    placed = {id(operator) for operator in found if operator is not None}
    lost = [operator["name"] for operator in wanted if operator["integers"] and id(operator) not in placed]
    if lost:
        notes.append(f"not found in the program, so neither counted nor judged: {', '.join(lost)}")
    outside = sorted({step.kind for step in steps if not step.delegated})
    if outside:
        notes.append(f"on ExecuTorch's own kernels, which XNNPACK does not take: {', '.join(outside)}")
    if not target.runs_here:
        notes.append(f"read from the file; which of XNNPACK's kernels a {target.arch} host takes is its own")
    return Audit(tuple(_row(i, step, names.get(i), times) for i, step in enumerate(steps)), tuple(notes))


def operators(program: bytes) -> list[str]:
    """Names of the operators that a file calls outside its delegates.

    Raises:
        BackendError: it is not a file of ExecuTorch.
    """
    return [_full_name(operator) for plan in _parsed(program).execution_plan for operator in plan.operators]


@dataclass(frozen=True)
class _Step:
    """One operator: its kind, the type it computes in, its multiply-accumulates, and whose kernel it is."""

    kind: str
    precision: str
    macs: int
    delegated: bool
    product: bool


def _row(number: int, step: _Step, operator: Mapping[str, Any] | None, times: int) -> AuditRow:
    name = operator["name"] if operator else f"{step.kind}_{number}"
    fell_back = bool(operator and operator["integers"] and step.precision != "int8")
    reason = _FALLEN if fell_back else "" if step.delegated else "on ExecuTorch's own kernel, not XNNPACK's"
    return AuditRow(name, step.kind, step.precision, step.macs // times, reason, fell_back)


def _matched(wanted: Sequence[Mapping[str, Any]], steps: Sequence[_Step]) -> list[Mapping[str, Any] | None]:
    """Which operator of the graph each product of the file is: the first that is left with its work.

    Nothing runs in integers that was not asked to, so those find theirs first.
    """
    left = list(wanted)
    found: list[Mapping[str, Any] | None] = [None] * len(steps)
    for place in sorted(range(len(steps)), key=lambda i: steps[i].precision != "int8"):
        step = steps[place]
        fits = [o for o in left if o["macs"] == step.macs]
        if step.precision == "int8":
            fits = [o for o in fits if o["integers"]]
        if fits:
            found[place] = fits[0]
            left.remove(fits[0])
    return found


def _steps(program: bytes) -> Iterator[_Step]:
    from executorch.exir.schema import DelegateCall, KernelCall

    whole = _parsed(program)
    for plan in whole.execution_plan:
        for chain in plan.chains:
            for instruction in chain.instructions:
                call = instruction.instr_args
                if isinstance(call, DelegateCall):
                    reference = plan.delegates[call.delegate_index].processed
                    yield from _delegated(bytes(whole.backend_delegate_data[reference.index].data))
                elif isinstance(call, KernelCall):
                    yield _own(plan, call)


def _delegated(blob: bytes) -> Iterator[_Step]:
    """The operators of one of XNNPACK's subgraphs."""
    graph = _subgraph(blob)
    values: dict[int, tuple[str, list[int]]] = {}
    for entry in graph["xvalues"]:
        value = entry["xvalue_union"]
        tensor = value.get("tensor_value", value)
        values[tensor["id_out"]] = tensor["datatype"].removeprefix("xnn_datatype_"), tensor["dims"]
    for entry in graph["xnodes"]:
        called, node = entry["xnode_union_type"], entry["xnode_union"]
        first = next(values[node[key]] for key in _FIRST if key in node)
        output = values[node["output_id" if "output_id" in node else "output_value_id"]]
        macs = _macs(called, node, values, output[1])
        product = called in _CONVOLUTIONS | _PRODUCTS
        whole = "int" in first[0] and (product or "int" in output[0])
        precision = "int8" if whole else _TYPES.get(first[0], _TYPES.get(output[0], output[0]))
        yield _Step(called.removeprefix("XNN"), precision, macs, True, product)


def _macs(called: str, node: Mapping[str, int], values: Mapping[int, Any], output: Sequence[int]) -> int:
    if called in _CONVOLUTIONS:
        taps = node["kernel_height"] * node["kernel_width"] * node["group_input_channels"]
        places = values[node["input1_id"]][1] if called == "XNNConvTranspose2d" else output
        channels = node["groups"] * node["group_output_channels"]
        return math.prod(places[:3]) * channels * taps
    if called == "XNNFullyConnected":
        return math.prod(output) * values[node["filter_id"]][1][-1]
    if called == "XNNBatchMatrixMultiply":
        return math.prod(output) * values[node["input1_id"]][1][-1]
    if called == "XNNScaledDotProductAttention":
        query, key = values[node["query_id"]][1], values[node["key_id"]][1]
        return 2 * math.prod(query) * key[-2]
    return 0


def _own(plan: Any, call: Any) -> _Step:
    """An operator outside of every subgraph."""
    operator = plan.operators[call.op_index]
    tensors = [plan.values[i].val for i in call.args if hasattr(plan.values[i].val, "scalar_type")]
    called = operator.name.rpartition("::")[2]
    precision = _SCALARS.get(int(tensors[-1].scalar_type), "unknown") if tensors else "unknown"
    sizes = [list(tensor.sizes) for tensor in tensors]
    macs = 0
    if called in _OWN_PRODUCTS and len(sizes) > 1:
        macs = math.prod(sizes[-1]) * sizes[1 if called == "addmm" else 0][-1]
    elif called in _OWN_CONVOLUTIONS:
        macs = math.prod(sizes[-1]) * math.prod(sizes[1][1:])
    return _Step(called, precision, macs, False, bool(macs))


def _full_name(operator: Any) -> str:
    return f"{operator.name}.{operator.overload}" if operator.overload else str(operator.name)


def _parsed(program: bytes) -> Any:
    with quiet():
        from executorch.exir._serialize._program import deserialize_pte_binary

        try:
            return deserialize_pte_binary(program).program
        except Exception as error:
            raise BackendError(f"{PROGRAM_FILE} does not parse: {first_line(error)}") from error


def _subgraph(blob: bytes) -> Any:
    """One of XNNPACK's subgraphs as JSON, by the schema that comes with the package."""
    with quiet():
        from executorch.backends.xnnpack import serialization
        from executorch.exir._serialize._flatbuffer import _flatc_decompile

    start, size = struct.unpack("<II", blob[10:18]) if blob[4:8] == _MAGIC else (0, len(blob))
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        place = Path(folder)
        (place / "schema.fbs").write_bytes((resources.files(serialization) / "schema.fbs").read_bytes())
        (place / "graph.bin").write_bytes(blob[start : start + size])
        _flatc_decompile(folder, str(place / "schema.fbs"), str(place / "graph.bin"), ["--raw-binary"])
        return json.loads(_INFINITE.sub("null", (place / "graph.json").read_text()))
