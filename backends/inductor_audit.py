"""What a package of AOTInductor executes: the kernels its generated source calls.

The compiler's own source is in the package. A call of oneDNN or ATen stands there by name, fused loops are
called ``cpp_fused_…``, or ``triton_…`` on a GPU. Multiply-accumulates are those of the graph's operators,
matched in order within convolutions and within matrix products; the compiler may swap two that do not depend
on each other.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphprune.backend import Audit, AuditRow
from graphprune.cost import node_macs
from graphprune.errors import BackendError
from graphprune.graph import Graph
from graphprune.operands import CONVOLUTIONS

PACKAGE_FILE = "model.pt2"
OPERATORS_FILE = "operators.json"

_CALL = re.compile(r"\b(?:aoti_torch_(?:cpu|cuda)_+(\w+)|(cpp_fused_\w+)|call_(triton_\w+))\(")
_CONVOLUTION = ("convolution", "qconv")
_PRODUCT = ("linear", "addmm", "mm_out", "baddbmm", "bmm", "scaled_dot_product", "_flash_attention")


def asked(graph: Graph) -> list[dict[str, Any]]:
    """The graph's convolutions and matrix products: family, MACs, whether in integers, the result's dtype."""
    found = []
    for node in graph.fx.nodes:
        macs = node_macs(node)
        if macs:
            sources = [s for s in node.all_input_nodes if "val" in s.meta and s.meta["val"].dim() > 1][:2]
            integers = len(sources) == 2 and all("dequantize" in str(s.target) for s in sources)
            family = "convolution" if node.target in CONVOLUTIONS else "product"
            dtype = str(node.meta["val"].dtype).removeprefix("torch.") if _is_tensor(node) else "float32"
            found.append({
                "name": node.name, "family": family, "macs": macs, "integers": integers, "dtype": dtype,
            })  # fmt: skip
    return found


def read(files: Mapping[str, bytes]) -> Audit:
    """The kernels of a package, in order.

    Raises:
        BackendError: the files are not a package of ours.
    """
    try:
        wanted = json.loads(files[OPERATORS_FILE])
        with zipfile.ZipFile(io.BytesIO(files[PACKAGE_FILE])) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".wrapper.cpp"))
            source = archive.read(name).decode()
    except (KeyError, StopIteration, ValueError, zipfile.BadZipFile) as error:
        raise BackendError(f"the package cannot be audited: {type(error).__name__}: {error}") from error
    calls = [found.group(1) or found.group(2) or found.group(3) for found in _CALL.finditer(_body(source))]
    notes: list[str] = []
    matched: dict[int, tuple[dict[str, Any], str]] = {}
    for family, words in (("convolution", _CONVOLUTION), ("product", _PRODUCT)):
        operators = [o for o in wanted if o["family"] == family]
        places = [
            i for i, call in enumerate(calls) if not call.startswith(("cpp_", "triton_")) and _is(call, words)
        ]
        if len(operators) != len(places):
            notes.append(
                f"{len(operators)} operators of the graph are {len(places)} calls ({family}s): the rest is "
                "inside fused kernels, and multiply-accumulates of these are not known"
            )
            matched.update(_unmatched(operators, places, calls))
            continue
        for place, operator in zip(places, operators, strict=True):
            late = operator["integers"] and not _integer(calls[place])
            reason = "in float: inductor did not fuse the quantizers around it" if late else ""
            matched[place] = operator, reason
    # What a fused loop computes in is not said; a network in one precision has it there, too.
    kinds = {operator.get("dtype", "float32") for operator in wanted}
    floats = kinds.pop() if len(kinds) == 1 else "float32"
    rows = []
    for place, call in enumerate(calls):
        operator, reason = matched.get(place, ({}, ""))
        precision = "int8" if _integer(call) else operator.get("dtype", floats)
        rows.append(AuditRow(
            operator.get("name", f"{call}_{place}"), call, precision, operator.get("macs", 0), reason,
            bool(reason),
        ))  # fmt: skip
    return Audit(tuple(rows), tuple(notes))


def _unmatched(
    operators: Sequence[dict[str, Any]], places: Sequence[int], calls: Sequence[str]
) -> dict[int, tuple[dict[str, Any], str]]:
    """Fewer integer calls than were asked for: the calls in float are what fell back."""
    missing = sum(o["integers"] for o in operators) - sum(_integer(calls[p]) for p in places)
    floats = [p for p in places if not _integer(calls[p])]
    reason = "in float: fewer integer kernels than the graph has operators in integers"
    return {place: ({}, reason) for place in floats[: max(missing, 0)]}


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _body(source: str) -> str:
    """The function that runs the network, without the declarations before it."""
    start = source.find("::run_impl(")
    return source[start:] if start >= 0 else source


def _is(call: str, words: Sequence[str]) -> bool:
    return any(word in call for word in words)


def _integer(call: str) -> bool:
    return call.startswith(("qconv", "qlinear", "_qconv", "_qlinear")) or "int8" in call
