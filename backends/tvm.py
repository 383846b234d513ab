"""TVM: a shared library of machine code for one kind of processor, also for one that is not here (extra
``tvm``).

The graph is imported into Relax (:mod:`~graphprune.backends.tvm_import`), laid out and scheduled
(:mod:`~graphprune.backends.tvm_pipeline`), with the schedules that were measured before where there are any
(:mod:`~graphprune.backends.tvm_tuning`), and compiled by LLVM. :mod:`~graphprune.backends.tvm_runtime` runs
it, and says how to without this package.

>>> from graphprune.registry import backends
>>> backends.load("tvm").extra
'tvm'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from graphprune.backend import Audit, Lowered, TensorSpec
from graphprune.errors import BackendError
from graphprune.graph import Graph
from graphprune.integers import Scheme
from graphprune.target import Target, host_arch


class Tvm:
    """Lowers through Relax and TensorIR, and runs with TVM's virtual machine on the CPU."""

    name: ClassVar[str] = "tvm"
    extra: ClassVar[str | None] = "tvm"
    integers: ClassVar[Scheme | None] = None

    def lower(self, graph: Graph, target: Target) -> Lowered:
        """The graph as ``model.so`` and ``tvm.json``.

        Schedules that :func:`graphprune.backends.tvm_tuning.tune` has measured for such a processor are
        used, the default ones for the rest; ``notes`` say how many of each.

        Raises:
            MissingExtraError: tvm is not installed.
            BackendError: an operator or dtype has no form in TVM, sizes are symbolic, or there is no
            compiler.
        """
        from graphprune.backends.tvm_lowering import lower

        return lower(graph, target, self.name)

    def open(
        self,
        files: Mapping[str, bytes],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[Any],
        target: Target,
        threads: int | None = None,
    ) -> Any:
        """A :class:`~graphprune.backends.tvm_runtime.TvmRunner` over the files; compiles nothing.

        Args:
            files: ``model.so`` and ``tvm.json``.
            inputs, outputs: the specifications that :meth:`lower` gave.
            threads: of TVM's pool; ``None`` leaves its default (one per core).

        Raises:
            MissingExtraError: tvm is not installed.
            BackendError: the library is for another machine, or was made by a newer TVM than is installed.
        """
        from graphprune.backends.tvm_runtime import TvmRunner

        return TvmRunner(files, tuple(inputs), tuple(outputs), threads)

    def unrunnable(self, target: Target) -> str | None:
        """Why libraries for ``target`` do not run here, or ``None``: they are machine code, and want TVM."""
        from graphprune.backends.tvm_package import package

        if target.arch != host_arch():
            return (
                f"TVM's libraries are machine code for {target.arch}, and this host is {host_arch()}; "
                "check it here with: graphprune verify DIR --emulate"
            )
        try:
            package()
        except BackendError as error:
            return str(error)
        return None

    def audit(self, lowered: Lowered, target: Target) -> Audit:
        """The functions that the library's program calls, in order."""
        from graphprune.backends.tvm_audit import audit

        return audit(lowered)

    def tune(
        self,
        graph: Graph,
        target: Target,
        *,
        seconds: float | None = None,
        threads: int | None = None,
        rebuild: bool = False,
        progress: Callable[[float, float, str], None] | None = None,
    ) -> Any:
        """Search schedules for the graph's products and keep them, as ``graphprune tune`` asks for it.

        Args:
            rebuild: measure this graph's products anew.

        Returns:
            A :class:`~graphprune.backends.tvm_command.Answer`.

        Raises:
            MissingExtraError: tvm is not installed.
            BackendError: nothing is to be tuned, or nothing that was tried runs.
            ArtifactError: what was measured cannot be written.
        """
        from graphprune.backends.tvm_command import tune

        return tune(graph, target, seconds=seconds, threads=threads, rebuild=rebuild, progress=progress)
