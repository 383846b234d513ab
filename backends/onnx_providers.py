"""ONNX Runtime's execution providers: which a target asks for, which are here, and how each is set up.

Each provider of ONNX Runtime that is not in its main package comes with a package of its own, which stands in
place of ``onnxruntime``: they share one folder, so an environment has one of them.

>>> from graphprune.target import Target
>>> why_not(Target("mine", "x86_64", providers=("OpenVinoExecutionProvider",)), ["CPUExecutionProvider"])
Traceback (most recent call last):
    ...
graphprune.errors.TargetError: target 'mine': ONNX Runtime has no execution provider \
'OpenVinoExecutionProvider' (did you mean 'OpenVINOExecutionProvider'?)
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

import onnxruntime as ort

from graphprune.errors import TargetError
from graphprune.target import Target

_OWN = "install {} in place of onnxruntime"
_BRINGS = {
    "OpenVINOExecutionProvider": _OWN.format("onnxruntime-openvino"),
    "CUDAExecutionProvider": _OWN.format("onnxruntime-gpu"),
    "TensorrtExecutionProvider": _OWN.format("onnxruntime-gpu"),
    "DmlExecutionProvider": _OWN.format("onnxruntime-directml"),
    "QNNExecutionProvider": _OWN.format("onnxruntime-qnn"),
    "XnnpackExecutionProvider": "no wheel on PyPI has it, so build onnxruntime with --use_xnnpack",
}
_ELSEWHERE = "install an onnxruntime that was built with it"

# Providers that take whole parts of a graph and compile them: a session cannot write down what it optimised.
COMPILING = frozenset({
    "OpenVINOExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider",
    "CoreMLExecutionProvider", "QNNExecutionProvider", "MIGraphXExecutionProvider", "NnapiExecutionProvider",
})  # fmt: skip

# Providers with threads of their own: those of ONNX Runtime's CPU kernels must not spin meanwhile.
OWN_THREADS = ("OpenVINOExecutionProvider", "XnnpackExecutionProvider")


def available(target: Target) -> list[str]:
    """The target's providers that this host's onnxruntime has, in the target's order."""
    here = ort.get_available_providers()
    return [p for p in target.providers if p in here]


def check_names(target: Target) -> None:
    """Raise a TargetError for a provider that ONNX Runtime has never heard of."""
    known = {*ort.get_all_providers(), *ort.get_available_providers()}
    for name in target.providers:
        if name not in known:
            raise TargetError(
                f"target {target.name!r}: ONNX Runtime has no execution provider {name!r}"
                f"{_nearest(name, known)}"
            )


def _nearest(name: str, known: Collection[str]) -> str:
    """The suggestion for a name, or which are here. What all names end with makes none of them near."""
    stems = {_stem(other): other for other in sorted(known)}
    close = difflib.get_close_matches(_stem(name), stems, n=1)
    if close:
        return f" (did you mean {stems[close[0]]!r}?)"
    return f"; here are {', '.join(ort.get_available_providers())}"


def _stem(name: str) -> str:
    return name.lower().removesuffix("provider").removesuffix("execution")


def brings(provider: str) -> str:
    """What to do to have a provider."""
    return _BRINGS.get(provider, _ELSEWHERE)


def why_not(target: Target, here: Sequence[str]) -> str | None:
    """Why this host does not run artifacts for ``target`` on the provider it prefers, or ``None``.

    Args:
        here: the target's providers that are available.

    Raises:
        TargetError: a provider's name is unknown.
    """
    check_names(target)
    first = target.providers[0] if target.providers else ""
    if not first:
        return f"target {target.name!r} names no execution provider; CPUExecutionProvider is one"
    if not here:
        return f"none of the providers {', '.join(target.providers)} is in this onnxruntime; {brings(first)}"
    if target.runs_here and here[0] != first:
        return f"{first} is not in this onnxruntime, so it would run on {here[0]} instead; {brings(first)}"
    return None


def settings(provider: str, threads: int | None = None) -> dict[str, str]:
    """A provider's options: float32 stays float32, and no more threads than asked for."""
    if provider == "OpenVINOExecutionProvider":
        chosen = {"device_type": "CPU", "precision": "FP32"}
        return chosen if threads is None else {**chosen, "num_of_threads": str(threads)}
    if provider == "XnnpackExecutionProvider" and threads is not None:
        return {"intra_op_num_threads": str(threads)}
    if provider == "CUDAExecutionProvider":
        return {"use_tf32": "0"}
    return {}


def placed(provider: str, target: Target) -> str:
    """Why an operator does not run on the provider the target prefers, or empty."""
    wanted = target.providers[0]
    if not provider or provider == wanted:
        return ""
    if wanted not in ort.get_available_providers():
        return f"on {provider}: this onnxruntime has no {wanted}"
    return f"on {provider}: {wanted} has no kernel for it"


def foreign(target: Target) -> str:
    """That what runs here tells little of a target that is not this host, or empty."""
    if target.runs_here:
        return ""
    return f"these are the operators of this host; a {target.arch} host may fuse and place them otherwise"
