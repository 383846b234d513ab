"""Targets: what a deployment wants, as small frozen values.

The facts behind the numbers were measured (see ``docs/targets.md``): ONNX Runtime's convolutions move
in steps of 16 channels in fp32 and are 1.5 to 2 times slower off multiples of 4; linears hardly care.

>>> get("arm").runs_here in (True, False)
True
>>> get("x68")  # doctest: +ELLIPSIS
Traceback (most recent call last):
    ...
graphprune.errors.TargetError: unknown target 'x68'; known: arm, ... (did you mean 'x86'?)
>>> get("arm:cortex-a76").features
('+dotprod', '+fullfp16')
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import Any

from .errors import TargetError, suggestion
from .integers import ONNX_RUNTIME, Scheme

_DOT = ("+dotprod", "+fullfp16")
_MATRIX = (*_DOT, "+i8mm", "+bf16")

# What each processor has beyond ARMv8.0-A that the arithmetic of a network can use: products of int8 in
# fours (dotprod) and as matrices (i8mm), arithmetic in half precision (fullfp16) and in bfloat16 (bf16).
# LLVM's and GCC's tables of processors agree on every line.
ARM_PROCESSORS: dict[str, tuple[str, ...]] = {
    "cortex-a53": (),
    "cortex-a55": _DOT,
    "cortex-a72": (),
    "cortex-a76": _DOT,
    "cortex-a78": _DOT,
    "cortex-x1": _DOT,
    "neoverse-n1": _DOT,
    "neoverse-v1": _MATRIX,
    "neoverse-n2": _MATRIX,
    "apple-m1": _DOT,
}


@dataclass(frozen=True)
class Target:
    """A device and runtime to build for.

    Attributes:
        name: what reports call it.
        arch: ``x86_64``, ``aarch64`` or ``cuda``.
        backend: name of the backend that lowers for it.
        providers: ONNX Runtime execution providers, in order of preference.
        channel_alignment: convolution widths should be multiples of this.
        linear_alignment: the same for linear layers.
        portable: whether this host can at least *run* the artifact for its answers when the
            architecture differs (an ONNX file can; machine code cannot).
        integers: what its runtime runs in integers, and how; ``None`` if nothing.
        processor: LLVM's name of the processor that machine code is compiled for (``cortex-a76``); empty
            for what every one of the architecture has. ``x86_64`` targets without one are compiled for
            this host's.
        features: what machine code may use beyond it, in LLVM's words (``+dotprod``).
        floats: what a runtime may compute in where the graph has float32: that, or ``bfloat16``.
    """

    name: str
    arch: str
    backend: str = "onnxruntime"
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    channel_alignment: int = 16
    linear_alignment: int = 4
    portable: bool = True
    integers: Scheme | None = ONNX_RUNTIME
    processor: str = ""
    features: tuple[str, ...] = ()
    floats: str = "float32"

    def __post_init__(self) -> None:
        if self.arch not in ("x86_64", "aarch64", "cuda"):
            raise TargetError(
                f"target {self.name!r}: unknown arch {self.arch!r}; use x86_64, aarch64 or cuda"
            )
        if self.floats not in ("float32", "bfloat16"):
            raise TargetError(f"target {self.name!r}: floats are float32 or bfloat16, got {self.floats!r}")
        if self.channel_alignment < 1 or self.linear_alignment < 1:
            raise TargetError(f"target {self.name!r}: alignments are channel counts, at least 1")

    def to_json(self) -> dict[str, Any]:
        """Plain values; kinds of operators as sorted lists."""
        values = asdict(self)
        if self.integers is not None:
            kinds = {k: sorted(v) for k, v in values["integers"].items() if isinstance(v, frozenset)}
            values["integers"] |= kinds
        return values

    @property
    def bound_elsewhere(self) -> str | None:
        """Why files that could run on any architecture are not to run here, or ``None``."""
        if self.runs_here or self.portable:
            return None
        return f"target {self.name!r} is for {self.arch} and not portable; this host is {host_arch()}"

    @property
    def runs_here(self) -> bool:
        """Whether a latency measured on this host is a latency of the target."""
        if self.arch == "cuda":
            import torch

            return torch.cuda.is_available()
        return self.arch == host_arch()


def host_arch() -> str:
    """The architecture of this machine, in the words of :class:`Target`.

    Raises:
        TargetError: it is neither x86_64 nor aarch64.
    """
    machine = platform.machine().lower()
    arch = {"amd64": "x86_64", "x86_64": "x86_64", "arm64": "aarch64", "aarch64": "aarch64"}.get(machine)
    if arch is None:
        raise TargetError(f"this host is {machine!r}; build a Target for x86_64, aarch64 or cuda explicitly")
    return arch


def known() -> dict[str, Target]:
    """The targets that have a name; those of :data:`ARM_PROCESSORS` are called ``arm:PROCESSOR``."""
    return {
        "cpu": Target("cpu", host_arch()),
        "x86": Target("x86", "x86_64"),
        "arm": Target("arm", "aarch64"),
        **{
            f"arm:{processor}": Target(f"arm:{processor}", "aarch64", processor=processor, features=features)
            for processor, features in ARM_PROCESSORS.items()
        },
        "cuda": Target(
            "cuda",
            "cuda",
            providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
            channel_alignment=8,
            linear_alignment=8,
            integers=None,
        ),
    }


def get(target: str | Target) -> Target:
    """A target by name, or the one given.

    Raises:
        TargetError: no target has that name; the message lists those there are and names the nearest.
    """
    if isinstance(target, Target):
        return target
    targets = known()
    if target not in targets:
        name = str(target)
        hint = suggestion(name, targets)
        if name.startswith("arm:"):
            there = f"processors of arm: {', '.join(ARM_PROCESSORS)}"
        else:
            plain = sorted([*(t for t in targets if ":" not in t), "arm:PROCESSOR"])
            there = f"known: {', '.join(plain)}"
        raise TargetError(f"unknown target {name!r}; {there}{hint}")
    return targets[target]
