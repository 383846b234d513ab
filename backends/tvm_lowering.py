"""One graph to one library: what :class:`graphprune.backends.tvm.Tvm` does when it lowers."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import fx

from graphprune.backend import Lowered, TensorSpec
from graphprune.graph import Graph
from graphprune.graph_text import operator_name
from graphprune.target import Target

from .exported import specifications, tensors_only
from .tvm_import import imported
from .tvm_machine import linker, machine
from .tvm_package import package
from .tvm_runtime import FACTS_FILE, FORMAT, LIBRARY_FILE


def lower(graph: Graph, target: Target, backend: str = "tvm", database: Path | None = None) -> Lowered:
    """See :meth:`graphprune.backends.tvm.Tvm.lower`; ``database`` is another file with measured schedules."""
    tvm = package()
    from .tvm_audit import rows
    from .tvm_database import Database, cache_file
    from .tvm_pipeline import fused, library, scheduled

    made_for, link = machine(target), linker(target)
    inputs, outputs = specifications(graph)
    tensors_only(outputs, "TVM library")
    module = fused(imported(graph), made_for)
    measured = Database(made_for, database or cache_file()).chooser()
    ordered = scheduled(module, made_for, measured)
    content = library(ordered, made_for, link)
    facts = {
        "format": FORMAT, "tvm": str(tvm.__version__), "function": "main", "arch": target.arch,
        "processor": made_for.identity, "bytes": len(content), "llvm": dict(made_for.llvm),
        "inputs": [_plain(spec, True) for spec in inputs],
        "outputs": [
            _plain(spec, _computed(value))
            for spec, value in zip(outputs, graph.output.args[0], strict=True)  # type: ignore[arg-type]
            if isinstance(spec, TensorSpec)
        ],
        "functions": rows(module),
    }  # fmt: skip
    files = {LIBRARY_FILE: content, FACTS_FILE: json.dumps(facts, indent=1).encode()}
    versions = {"apache-tvm": version("apache-tvm"), "apache-tvm-ffi": version("apache-tvm-ffi")}
    return Lowered(backend, files, inputs, outputs, versions, measured.notes())


def _plain(spec: TensorSpec, computed: bool) -> dict[str, Any]:
    return {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype, "computed": computed}


_VIEWS = ("view", "reshape", "flatten", "squeeze", "permute", "transpose", "expand", "slice", "alias", "t.")


def _computed(value: Any) -> bool:
    """Whether an output is the library's to give away: not (a view of) an input or of a constant."""
    while isinstance(value, fx.Node) and value.op == "call_function":
        if not any(word in operator_name(value) for word in _VIEWS):
            return True
        value = value.args[0]
    return False
