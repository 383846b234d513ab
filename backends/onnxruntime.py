"""ONNX Runtime: one portable file for x86, ARM and CUDA, run by the target's execution providers.

The parts: :mod:`~graphprune.backends.onnx_export` writes the file, :mod:`~graphprune.backends.onnx_session`
opens and runs it, :mod:`~graphprune.backends.onnx_audit` reads what the runtime made of it.

>>> import torch, graphprune
>>> from graphprune.target import get
>>> graph = graphprune.trace(torch.nn.Linear(3, 2), torch.zeros(1, 3))
>>> backend = OnnxRuntime()
>>> lowered = backend.lower(graph, get("cpu"))
>>> lowered.inputs
(TensorSpec(name='input', shape=(1, 3), dtype='float32'),)
>>> runner = backend.open(lowered.files, lowered.inputs, lowered.outputs, get("cpu"))
>>> bool(torch.allclose(runner(torch.ones(1, 3))[0], graph.run(torch.ones(1, 3))[0], atol=1e-6))
True
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from graphprune.backend import Audit, Lowered, TensorSpec
from graphprune.errors import BackendError
from graphprune.graph import Graph
from graphprune.integers import ONNX_RUNTIME, Scheme
from graphprune.target import Target


class OnnxRuntime:
    """Lowers through ``torch.onnx`` and runs with ``onnxruntime``."""

    name: ClassVar[str] = "onnxruntime"
    extra: ClassVar[str | None] = None
    integers: ClassVar[Scheme | None] = ONNX_RUNTIME

    def lower(self, graph: Graph, target: Target) -> Lowered:
        """The graph as ``model.onnx``; equal graphs give equal bytes.

        Names of inputs are the signature's, a symbolic batch stays symbolic. A graph in bfloat16 computes in
        float32 on CPU targets, between casts at its edges, which ``notes`` then says.

        Raises:
            BackendError: an operator or dtype has no ONNX equivalent; names the node.
            TargetError: the target names an execution provider that there is none of.
        """
        from graphprune.backends.onnx_export import export

        if importlib.util.find_spec("onnxruntime") is not None:  # without it a file is built, and not run
            from graphprune.backends.onnx_providers import check_names

            check_names(target)
        return export(graph, target, self.name)

    def open(
        self,
        files: Mapping[str, bytes],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[Any],
        target: Target,
        threads: int | None = None,
    ) -> Any:
        """A :class:`~graphprune.backends.onnx_session.OnnxRunner` over the files.

        Args:
            files: ``model.onnx``, and its data file if it has one.
            inputs, outputs: the specifications that :meth:`lower` gave.
            target: decides the execution providers; those that this host lacks are left out and noted.
            threads: intra-operator threads; ``None`` leaves ONNX Runtime's default (one per core).

        Raises:
            BackendError: no provider is available here, or ONNX Runtime has no kernel for an operator.
        """
        _installed()
        from graphprune.backends.onnx_session import OnnxRunner

        return OnnxRunner(files, tuple(inputs), tuple(outputs), target, threads)

    def unrunnable(self, target: Target) -> str | None:
        """Why this host cannot run artifacts for ``target``, or ``None``.

        An artifact of another architecture runs here for its answers when the target is portable; whether
        its latency means anything is :attr:`Target.runs_here`.
        """
        try:
            _installed()
        except BackendError as error:
            return str(error)
        from graphprune.backends.onnx_providers import available, why_not

        reason = why_not(target, available(target))
        if reason:
            return reason
        return target.bound_elsewhere

    def audit(self, lowered: Lowered, target: Target) -> Audit:
        """What ONNX Runtime executes: the operators of the graph it optimised for this host."""
        _installed()
        from graphprune.backends.onnx_audit import audit

        return audit(lowered, target)


def _installed() -> None:
    """Raise a BackendError where onnxruntime does not import."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f"onnxruntime does not import ({error}); install it with: pip install onnxruntime"
        ) from error
