"""A graph as a Relax module, through TVM's importer of ``ExportedProgram``.

What the importer has no form for is refused with the reason, before it fails with its own.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch

from graphprune.errors import BackendError
from graphprune.graph import Graph
from graphprune.graph_text import operator_name

from .exported import exported, first_line, tensor_outputs
from .tvm_package import package

_OTHER = "use backend='onnxruntime'"
_UNKNOWN = re.compile(r"Unsupported function types \[(.*)\]")


def imported(graph: Graph) -> Any:
    """``tvm.IRModule`` with one function ``main``, which returns a tuple of the outputs that are computed.

    Raises:
        BackendError: the graph is in integers, has symbolic sizes, or has an operator that TVM does not know.
    """
    kept = tensor_outputs(graph)
    _check(graph)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = exported(graph.copy(), kept)
        package()
        from tvm.relax.frontend.torch import from_exported_program

        try:
            return from_exported_program(program, keep_params_as_input=False, unwrap_unit_return_tuple=False)
        except Exception as error:
            unknown = _UNKNOWN.search(str(error))
            what = f"no {unknown[1]}" if unknown else f"no form for the graph: {first_line(error)}"
            raise BackendError(f"TVM's importer has {what}; {_OTHER}") from error


def _check(graph: Graph) -> None:
    if graph.is_dynamic:
        raise BackendError(
            "TVM libraries are compiled for fixed sizes, because their loops are; build without "
            f"dynamic_batch=True, with an example of the batch size that is used, or {_OTHER}"
        )
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            what = f"no branches or loops ({node.target.name()})"
            raise BackendError(f"{graph.where(node)}: TVM's importer has {what}; {_OTHER}")
        name = operator_name(node) if node.op == "call_function" else ""
        if "quantize" in name or getattr(node.target, "namespace", "") == "graphprune":
            raise BackendError(
                f"{graph.where(node)}: TVM has no integer form of quantized graphs ({name}): its torch "
                f"importer does not know quantizers, and its ONNX importer computes in float between them; "
                f"{_OTHER}"
            )
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16):
            raise BackendError(
                f"{graph.where(node)} is {str(value.dtype).removeprefix('torch.')}, for which TVM has no "
                f"fast CPU code; convert the model with model.float(), or {_OTHER}"
            )
