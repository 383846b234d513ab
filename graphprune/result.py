"""What ``optimize`` gives back: something to run, to read, to train and to deploy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .backend import Audit
from .errors import BackendError
from .graph import Graph
from .lowering import Deployment
from .report import Report

if TYPE_CHECKING:
    from graphprune.backends.inductor_compiled import Compiled

    from .module import TracedModule


@dataclass(frozen=True)
class Result:
    """An optimised model.

    Attributes:
        graph: the graph that was lowered.
        trainable: the last graph of the pipeline that trains as the original did.
        deployment: the artifact and its runner.
        report: what was done, proved and measured.
    """

    graph: Graph
    trainable: Graph = field(repr=False)
    deployment: Deployment = field(repr=False)
    report: Report = field(repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the artifact on the original's own arguments; the result has the original's structure.

        Raises:
            InputError: the arguments do not fit what was captured.
            BackendError: this host cannot run the artifact.
        """
        runner = self.deployment.runner
        if runner is None:
            raise BackendError(
                f"the artifact for {self.deployment.target.name!r} cannot run here "
                f"({self.deployment.unrunnable}); result.module still runs, and result.save(directory) "
                "writes the artifact for a host that can"
            )
        signature = self.graph.signature
        return signature.unflatten(runner(*signature.flatten(args, kwargs)))

    @property
    def module(self) -> TracedModule:
        """The optimised network as a trainable ``nn.Module``, in evaluation mode when first named.

        Batch normalisation and dropout are those of the original and follow ``train()`` and ``eval()``;
        what the pipeline folded away after the last trainable graph is folded again by ``optimize``.
        """
        return self.trainable.module

    def compiled(self, *, threads: int | None = None) -> Compiled:
        """The optimised graph through ``torch.compile``, for use in this process: compiled and proved.

        It runs on the CPU, or where the target is ``cuda`` on the GPU.

        Raises:
            BackendError: there is no C++ compiler, or it does not compile.
            VerificationError: what came out does not reproduce the graph.
        """
        from graphprune.backends.inductor_compiled import Compiled

        return Compiled(self.graph, threads, "cuda" if self.deployment.target.arch == "cuda" else "cpu")

    def audit(self) -> Audit:
        """Every operator as the runtime executes it.

        Raises:
            BackendError: this host cannot run the artifact.
        """
        return self.deployment.audit()

    def save(
        self,
        directory: str | Path,
        *,
        overwrite: bool = False,
        reference: bool = True,
        compress: str | None = None,
    ) -> Path:
        """Write the artifact: the runtime's files, ``manifest.json``, ``report.html`` and the reference.

        Args:
            directory: where.
            overwrite: replace an artifact that is there.
            reference: store the example inputs and what the graph answers to them, so that the directory
                can be verified alone (:mod:`graphprune.reference`). Leave it out where they are secret.
            compress: ``"zstd"`` stores the runtime's files in one compressed file, ``artifact.gpz``, which
                loads on its own, too; what is loaded is the same, bit for bit.

        Returns:
            The directory's absolute path; ``graphprune.load`` opens it.

        Raises:
            ArtifactError: the directory holds something that must not be replaced, or cannot be written.
            InputError: there is no such compression.
            MissingExtraError: ``zstandard`` is not installed.
        """
        from .artifact import save
        from .reference import make

        stored, reason = make(self.graph) if reference else (None, "left out: reference=False")
        measurements = self.report.measurements() | ({"no_reference": reason} if reason else {})

        def html(stored: Mapping[str, int]) -> str:
            return replace(self.report, files={**self.report.files, **stored}).html

        return save(
            directory,
            self.deployment.lowered,
            target=self.deployment.target,
            signature=self.graph.signature,
            pipeline=self.report.pipeline,
            metrics=self.report.metrics(),
            measurements=measurements,
            report_html=html,
            reference=stored,
            overwrite=overwrite,
            compress=compress,
        )
