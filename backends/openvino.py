"""OpenVINO: two files that Intel's runtime compiles for the CPU it finds, x86 or ARM (extra ``openvino``).

The graph becomes ONNX (:mod:`~graphprune.backends.onnx_export`) and from there OpenVINO's own format
(:mod:`~graphprune.backends.openvino_model`), without quantizers that only ONNX Runtime needs
(:mod:`~graphprune.backends.openvino_quantizers`). :mod:`~graphprune.backends.openvino_session` runs it,
:mod:`~graphprune.backends.openvino_audit` reads what the runtime made of it.

>>> from graphprune.registry import backends
>>> backends.load("openvino").extra
'openvino'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, ClassVar

import torch

from graphprune.backend import Audit, Lowered, TensorSpec
from graphprune.errors import BackendError
from graphprune.graph import Graph
from graphprune.integers import OPENVINO, Scheme
from graphprune.target import Target


class OpenVino:
    """Lowers through ``torch.onnx`` and runs with ``openvino`` on the CPU, float32 as the target allows."""

    name: ClassVar[str] = "openvino"
    extra: ClassVar[str | None] = "openvino"
    integers: ClassVar[Scheme | None] = OPENVINO
    floats: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")

    def lower(self, graph: Graph, target: Target) -> Lowered:
        """The graph as ``model.xml`` and ``model.bin``; equal graphs give equal bytes.

        Names of inputs are the signature's, a symbolic batch stays symbolic. ``notes`` say where OpenVINO
        computes in another precision than the graph.

        Raises:
            MissingExtraError: openvino is not installed.
            BackendError: the target has no CPU, the graph has float64 tensors at its edges, or an operator
                translates to neither ONNX nor OpenVINO; names it.
        """
        from graphprune.backends.onnx_export import export
        from graphprune.backends.openvino_model import convert, runtime
        from graphprune.backends.openvino_quantizers import rounded_once

        runtime()
        if target.arch == "cuda":
            raise BackendError(f"OpenVINO has no CUDA device for target {target.name!r}; {_OTHER}")
        edges = _edges(graph)
        exported = export(rounded_once(graph), target, self.name)
        half = any(value.dtype == torch.bfloat16 for value in graph.tensors.values())
        files, inner = convert(exported.files, "bf16" if half or target.floats == "bfloat16" else "f32")
        said = exported.notes if not half else tuple(n for n in exported.notes if "bfloat16" not in n)
        versions = {k: v for k, v in exported.versions.items() if k != "onnxruntime"}
        return replace(
            exported,
            files=files,
            versions={**versions, "openvino": version("openvino")},
            notes=(*said, *edges, *inner),
        )

    def open(
        self,
        files: Mapping[str, bytes],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[Any],
        target: Target,
        threads: int | None = None,
    ) -> Any:
        """An :class:`~graphprune.backends.openvino_session.OpenVinoRunner` over the files.

        Args:
            files: ``model.xml`` and ``model.bin``.
            inputs, outputs: the specifications that :meth:`lower` gave.
            threads: of the runtime; ``None`` leaves its default (one per core).

        Raises:
            MissingExtraError: openvino is not installed.
            BackendError: the files are no model, or OpenVINO has no kernel for an operator.
        """
        from graphprune.backends.openvino_session import OpenVinoRunner

        return OpenVinoRunner(files, tuple(inputs), tuple(outputs), threads)

    def unrunnable(self, target: Target) -> str | None:
        """Why this host cannot run artifacts for ``target``, or ``None``.

        The files are the same for every CPU, so those of another architecture run here for their answers.
        """
        from graphprune.backends.openvino_model import runtime

        try:
            runtime()
        except BackendError as error:
            return str(error)
        if target.arch == "cuda":
            return f"OpenVINO has no CUDA device for target {target.name!r}; {_OTHER}"
        return target.bound_elsewhere

    def audit(self, lowered: Lowered, target: Target) -> Audit:
        """What OpenVINO executes: the operators of the graph it compiled for this host."""
        from graphprune.backends.openvino_audit import audit

        return audit(lowered, target)


_OTHER = "use backend='onnxruntime'"


def _edges(graph: Graph) -> tuple[str, ...]:
    """What to say of precisions at the graph's edges that OpenVINO's CPU kernels do not compute in.

    Raises:
        BackendError: a weight, an input or an output is float64, and would be no better than float32.
    """
    found: dict[torch.dtype, str] = {}
    stored = [node for node in graph.nodes if node.op == "get_attr"]
    for node in (*graph.placeholders, *stored, *graph.output.all_input_nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            found.setdefault(value.dtype, graph.where(node))
    if torch.float64 in found:
        raise BackendError(
            f"{found[torch.float64]} is float64, which OpenVINO computes in float32; "
            f"convert the model with model.float(), or {_OTHER}"
        )
    said = ((torch.float16, "float16 in float32"), (torch.int64, "int64 in int32"))
    return tuple(f"OpenVINO computes {how} (at {found[dtype]})" for dtype, how in said if dtype in found)
