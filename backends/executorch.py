"""ExecuTorch: one ``.pte`` file for phones and boards, run by XNNPACK on ARM and x86 (extra ``executorch``).

The graph is written as XNNPACK wants it (:mod:`~graphprune.backends.executorch_integers`), lowered
(:mod:`~graphprune.backends.executorch_program`), run here by the same runtime that a phone has
(:mod:`~graphprune.backends.executorch_session`), and audited from the file itself
(:mod:`~graphprune.backends.executorch_audit`).

>>> from graphprune.registry import backends
>>> backends.load("executorch").extra
'executorch'
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, ClassVar

import torch

from graphprune.backend import Audit, Lowered, TensorSpec
from graphprune.errors import BackendError
from graphprune.graph import Graph
from graphprune.integers import XNNPACK, Scheme
from graphprune.target import Target

# Symbolic sizes go up to this, since ExecuTorch plans its memory ahead.
LARGEST = 64

_OTHER = "use backend='onnxruntime'"


class ExecuTorch:
    """Lowers through ``torch.export`` and runs with ``executorch`` on the CPU."""

    name: ClassVar[str] = "executorch"
    extra: ClassVar[str | None] = "executorch"
    integers: ClassVar[Scheme | None] = XNNPACK

    def lower(self, graph: Graph, target: Target) -> Lowered:
        """The graph as ``model.pte``, and ``operators.json`` for the audit; equal graphs give equal bytes.

        Raises:
            MissingExtraError: executorch is not installed.
            BackendError: the target has no CPU, an output is a symbolic size, or an operator has no kernel.
        """
        from graphprune.backends.executorch_audit import OPERATORS_FILE, asked
        from graphprune.backends.executorch_integers import for_xnnpack
        from graphprune.backends.executorch_program import PROGRAM_FILE, program, runtime
        from graphprune.backends.exported import (
            exported,
            sizes_of,
            specifications,
            tensor_outputs,
            tensors_only,
        )

        runtime()
        if target.arch == "cuda":
            raise BackendError(_no_cuda(target))
        kept = tensor_outputs(graph)
        inputs, outputs = specifications(graph)
        tensors_only(outputs, "program")
        work = graph.copy()
        sizes = sizes_of(work, LARGEST)
        operators = asked(work, sizes)
        for_xnnpack(work)
        made = program(exported(work, kept, LARGEST))
        files = {PROGRAM_FILE: made, OPERATORS_FILE: json.dumps(operators).encode()}
        versions = {"executorch": version("executorch"), "torch": torch.__version__}
        return Lowered(self.name, files, inputs, outputs, versions, _notes(work, sizes))

    def open(
        self,
        files: Mapping[str, bytes],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[Any],
        target: Target,
        threads: int | None = None,
    ) -> Any:
        """An :class:`~graphprune.backends.executorch_session.ExecuTorchRunner` over the files.

        Args:
            files: ``model.pte``.
            inputs, outputs: the specifications that :meth:`lower` gave.
            threads: of the runtime; ``None`` leaves its default (one per core).

        Raises:
            MissingExtraError: executorch is not installed.
            BackendError: the file is no program, of a newer format, or has an operator without a kernel here.
        """
        from graphprune.backends.executorch_session import ExecuTorchRunner

        return ExecuTorchRunner(files, tuple(inputs), tuple(outputs), threads)

    def unrunnable(self, target: Target) -> str | None:
        """Why this host cannot run artifacts for ``target``, or ``None``.

        The file is the same for every CPU, so that of another architecture runs here for its answers.
        """
        from graphprune.backends.executorch_program import runtime

        try:
            runtime()
        except BackendError as error:
            return str(error)
        if target.arch == "cuda":
            return _no_cuda(target)
        return target.bound_elsewhere

    def audit(self, lowered: Lowered, target: Target) -> Audit:
        """What the file executes: XNNPACK's operators with their types, and those outside of it."""
        from graphprune.backends.executorch_audit import audit

        return audit(lowered, target)


def _no_cuda(target: Target) -> str:
    return f"ExecuTorch's files run on CPUs here, and target {target.name!r} is CUDA; {_OTHER}"


def _notes(graph: Graph, sizes: Mapping[Any, int]) -> tuple[str, ...]:
    notes = []
    if sizes:
        most = ", ".join(map(str, sizes.values()))
        notes.append(f"ExecuTorch plans memory ahead: open sizes of the inputs go up to {most}")
    values = {node: node.meta.get("val") for node in (*graph.placeholders, *graph.output.all_input_nodes)}
    double = [n for n, v in values.items() if isinstance(v, torch.Tensor) and v.dtype is torch.float64]
    if double:
        notes.append(
            f"{graph.where(double[0])} is float64, which runs on ExecuTorch's own kernels and not on "
            "XNNPACK's; convert the model with model.float()"
        )
    return tuple(notes)
