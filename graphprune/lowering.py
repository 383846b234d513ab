"""From a graph to a runtime: lower with each candidate backend, prove it, keep the fastest.

A candidate that cannot lower the graph, is not installed or fails its certificate never disappears
quietly: with one candidate that is an error, with several a note in the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .backend import Audit, Backend, Lowered, Runner
from .errors import BackendError, VerificationError
from .graph import Graph
from .registry import backends
from .rounding import allow_rounding
from .target import Target, host_arch
from .verify import Certificate, require, runtime_equivalence

Calls = Mapping[str, Sequence[Any]]  # title -> flat tensors


@dataclass(frozen=True)
class Deployment:
    """A graph lowered for a target.

    Attributes:
        backend, lowered: what made the files, and the files.
        runner: runs them here, or ``None``.
        unrunnable: why there is no runner, else empty.
        certificates: title → runtime certificate.
        notes: about the candidates that were not taken.
    """

    backend: Backend
    lowered: Lowered
    target: Target
    runner: Runner | None
    unrunnable: str = ""
    certificates: Mapping[str, Certificate] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def reopened(self, graph: Graph, threads: int | None) -> Runner:
        """Another graph, lowered and opened the same way, to be measured beside this one."""
        lowered = self.backend.lower(graph, self.target)
        return self.backend.open(lowered.files, lowered.inputs, lowered.outputs, self.target, threads)

    def audit(self) -> Audit:
        """What the runtime executes.

        Raises:
            BackendError: this host cannot ask it.
        """
        if self.runner is None:
            raise BackendError(f"the artifact cannot be audited here: {self.unrunnable}")
        return self.backend.audit(self.lowered, self.target)


def candidates(backend: str, target: Target) -> list[Backend]:
    """The backends to try: the one named, or for ``auto`` those that the target allows.

    Raises:
        RecipeError: no backend has that name.
    """
    names = [target.backend] if backend == "auto" else [backend]
    return [backends.load(name)() for name in names]


def deploy(
    graph: Graph,
    target: Target,
    tried: Sequence[Backend],
    *,
    calls: Calls,
    verify: bool = True,
    threads: int | None = None,
    fastest: Callable[[Sequence[Deployment]], Deployment] | None = None,
) -> Deployment:
    """Lower ``graph`` with every candidate and keep one.

    Args:
        tried: the candidates, the preferred one first.
        calls: title → flat inputs, the calls each artifact is proved on.
        fastest: chooses among several that run here; the first is kept where none is given.

    Raises:
        BackendError: no candidate can lower the graph; the reasons of all are named.
        VerificationError: the only candidate's artifact does not reproduce its graph.
    """
    made: list[Deployment] = []
    refused: list[str] = []
    for backend in tried:
        try:
            made.append(_deploy(graph, target, backend, calls, verify, threads))
        except (BackendError, VerificationError) as error:
            if len(tried) == 1:
                raise
            refused.append(f"backend {backend.name!r} was not taken: {error}")
    if not made:
        raise BackendError("; ".join(refused))
    runnable = [d for d in made if d.runner is not None]
    chosen = fastest(runnable) if fastest is not None and len(runnable) > 1 else made[0]
    return Deployment(
        chosen.backend, chosen.lowered, target, chosen.runner, chosen.unrunnable, chosen.certificates,
        (*chosen.notes, *refused),
    )  # fmt: skip


def _deploy(
    graph: Graph, target: Target, backend: Backend, calls: Calls, verify: bool, threads: int | None
) -> Deployment:
    lowered = backend.lower(graph, target)
    reason = backend.unrunnable(target)
    if reason:
        return Deployment(backend, lowered, target, None, reason, notes=(f"artifact not run here: {reason}",))
    runner = backend.open(lowered.files, lowered.inputs, lowered.outputs, target, threads)
    certificates = {}
    if verify:
        for title, flat in calls.items():
            certificate = runtime_equivalence(graph, runner, [flat])
            if not certificate.passed:
                certificate = allow_rounding(certificate, graph, flat, runner(*flat))
            what = f"the {backend.name} artifact does not reproduce its graph ({title})"
            certificates[title] = require(certificate, what)
    return Deployment(backend, lowered, target, runner, "", certificates)


def unmeasurable(deployment: Deployment) -> str:
    """Why a latency measured here would not be the target's, or nothing."""
    target = deployment.target
    if deployment.runner is None:
        return f"built, not measured: {deployment.unrunnable}"
    if not target.runs_here:
        return f"built, not measured: target {target.name!r} is {target.arch}, this host is {host_arch()}"
    return ""


def flat_calls(
    graph: Graph, calls: Mapping[str, tuple[tuple[Any, ...], Mapping[str, Any]]]
) -> dict[str, list[torch.Tensor]]:
    """Nested example calls as the graph's flat inputs."""
    return {title: graph.signature.flatten(args, kwargs) for title, (args, kwargs) in calls.items()}
