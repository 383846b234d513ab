"""From a graph to a runtime: the backends there are for a target, and a graph lowered with one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .backend import Audit, Backend, Lowered, Runner
from .errors import BackendError, RecipeError
from .graph import Graph
from .integers import ONNX_RUNTIME
from .registry import backends
from .rounding import proved
from .sparsity.zeros import dense_zeros
from .target import Target, host_arch
from .verify import Certificate

Calls = Mapping[str, Sequence[Any]]  # title -> flat tensors


@dataclass(frozen=True)
class Deployment:
    """A graph lowered for a target.

    Attributes:
        backend, lowered: what made the files, and the files.
        runner: runs them here, or ``None``.
        unrunnable: why there is no runner, else empty.
        certificates: title → runtime certificate.
        notes: what a reader should know of how it runs here.
    """

    backend: Backend
    lowered: Lowered
    target: Target
    runner: Runner | None
    unrunnable: str = ""
    certificates: Mapping[str, Certificate] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def reopened(self, graph: Graph, threads: int | None) -> Runner:
        """Another graph, lowered and opened the same way, floats as they are, to be measured beside it."""
        target = replace(self.target, floats="float32")
        return opened(self.backend, self.backend.lower(graph, target), target, threads)

    def audit(self) -> Audit:
        """What the runtime executes.

        Raises:
            BackendError: this host cannot ask it.
        """
        if self.runner is None:
            raise BackendError(f"the artifact cannot be audited here: {self.unrunnable}")
        return self.backend.audit(self.lowered, self.target)


def candidates(backend: str, target: Target, *, several: bool = False) -> list[Backend]:
    """The backends to try.

    Args:
        backend: a name, several with commas between them, or ``auto``.
        several: whether ``auto`` means every backend there is, the target's default first, as where they are
            about to be measured; else it is that default.

    Returns:
        Of several, one whose module does not load is a stand-in that says why it cannot be tried.

    Raises:
        RecipeError: no backend has that name, the only one does not load, or ``auto`` is one of several.
    """
    if backend == "auto":
        others = [name for name in backends.entries if name != target.backend] if several else []
        names = [target.backend, *others]
    else:
        names = list(dict.fromkeys(name.strip() for name in backend.split(",")))
        if "auto" in names:
            raise RecipeError(f"backend {backend!r}: auto means all that are installed, and stands alone")
    found: list[Backend] = []
    for name in names:
        try:
            found.append(backends.load(name)())
        except RecipeError as error:
            if len(names) == 1 or name not in backends.entries:
                raise
            found.append(_Unloaded(name, str(error)))  # type: ignore[arg-type]
    return found


@dataclass(frozen=True)
class _Unloaded:
    """Stands for a backend whose module does not load."""

    name: str
    reason: str

    def unrunnable(self, target: Target) -> str:
        """Why it cannot be tried."""
        return self.reason


def fitted(target: Target, backend: Backend) -> Target:
    """The target with what that backend runs in integers, unless the target was given its own."""
    own = getattr(backend, "integers", None)
    return replace(target, integers=own) if own is not None and target.integers == ONNX_RUNTIME else target


def opened(backend: Backend, lowered: Lowered, target: Target, threads: int | None) -> Runner:
    """A runner over what a backend lowered."""
    return backend.open(lowered.files, lowered.inputs, lowered.outputs, target, threads)


def deploy(
    graph: Graph,
    target: Target,
    backend: Backend,
    *,
    calls: Calls,
    verify: bool = True,
    threads: int | None = None,
) -> Deployment:
    """Lower ``graph``, open what came out where this host can, and prove it.

    Args:
        calls: title → flat inputs, the calls the artifact is proved on.

    Raises:
        BackendError: the backend cannot lower the graph.
        VerificationError: the artifact does not reproduce its graph.
    """
    lowered = backend.lower(graph, target)
    reason = backend.unrunnable(target)
    notes = (*_unused(backend, target), *_zeros(graph, backend, target))
    if reason:
        said = (*notes, f"artifact not run here: {reason}")
        return Deployment(backend, lowered, target, None, reason, notes=said)
    runner = opened(backend, lowered, target, threads)
    certificates = {}
    if verify:
        for title, flat in calls.items():
            what = f"the {backend.name} artifact does not reproduce its graph ({title})"
            certificates[title] = proved(graph, runner, flat, what)
    return Deployment(backend, lowered, target, runner, "", certificates, notes)


def _unused(backend: Backend, target: Target) -> tuple[str, ...]:
    """A precision that was allowed, and is none of the backend's."""
    if target.floats in getattr(backend, "floats", ("float32",)):
        return ()
    return (f"{target.floats} was allowed around the integers, and {backend.name} computes in float32",)


def _zeros(graph: Graph, backend: Backend, target: Target) -> tuple[str, ...]:
    """That zeros in weights do not make this runtime faster; on GPUs a backend names its sparse products."""
    said = "" if target.arch == "cuda" else dense_zeros(graph, backend.name)
    return (said,) if said else ()


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
