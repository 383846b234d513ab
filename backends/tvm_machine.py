"""What TVM is told of the processor, and what the schedules need of it: vectors, registers, the linker.

A target without a processor is this host's on ``x86_64`` (machine code is for here) and what every one of the
architecture has on ``aarch64``.

>>> from graphprune.target import Target
>>> machine(Target("board", "aarch64", processor="cortex-a76", features=("+dotprod",))).llvm["mcpu"]
'cortex-a76'
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from graphprune.errors import BackendError, TargetError, suggestion
from graphprune.target import Target, host_arch

from .tvm_package import package

TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}


@dataclass(frozen=True)
class Machine:
    """A processor to compile for.

    Attributes:
        llvm: the fields of ``tvm.target.Target``.
        vector: float32 in the blocks of channels.
        tile: vectors of sums that fit in registers, in units of a block, two left over for operands.
    """

    llvm: Mapping[str, Any]
    vector: int
    tile: int

    @property
    def identity(self) -> str:
        """What a measured schedule holds for."""
        parts = [str(self.llvm.get("mtriple", host_arch())), str(self.llvm.get("mcpu", "generic"))]
        return " ".join([*parts, *self.llvm.get("mattr", ())])


def machine(target: Target) -> Machine:
    """The machine of a target.

    Raises:
        MissingExtraError: tvm is not installed, whose LLVM knows the processors.
        TargetError: it is not one with a CPU that LLVM compiles for, or LLVM does not know its processor or a
            feature: it would compile for any processor instead.
    """
    if target.arch not in TRIPLES:
        raise TargetError(
            f"target {target.name!r} is {target.arch}, for which there are no TVM schedules here; "
            "use a CPU target, or backend='inductor'"
        )
    llvm: dict[str, Any] = {"kind": "llvm", "mtriple": TRIPLES[target.arch]}
    if target.processor:
        llvm["mcpu"] = target.processor
    elif target.arch == "x86_64":
        llvm["mcpu"] = _host_processor() if host_arch() == "x86_64" else "x86-64-v3"
    if target.features:
        llvm["mattr"] = list(target.features)
    if target.arch == "aarch64" and not any("neon" in f for f in target.features):
        llvm["mattr"] = ["+neon", *llvm.get("mattr", [])]
    _check_known(target)
    vector, tile = _registers(target.arch, llvm)
    return Machine(llvm, vector, tile)


def _check_known(target: Target) -> None:
    name, arch = target.processor, target.arch
    if name and not package().target.codegen.llvm_is_valid_cpu(name, TRIPLES[arch]):
        raise TargetError(
            f"target {target.name!r}: LLVM knows no {arch} processor {name!r}"
            f"{suggestion(name, _processors(arch))}"
        )
    for feature in target.features:
        sign, word = feature[:1], feature[1:]
        if sign not in ("+", "-"):
            raise TargetError(
                f"target {target.name!r}: feature {feature!r} is neither asked for nor left out; "
                f"write '+{feature}' or '-{feature}'"
            )
        if word not in _all_features(arch) and word not in _features(name, arch, f"+{word}"):
            raise TargetError(
                f"target {target.name!r}: LLVM knows no {arch} feature {word!r}"
                f"{suggestion(word, _all_features(arch))}"
            )


@cache
def _processors(arch: str) -> frozenset[str]:
    """LLVM's list, without its second names (``apple-m1``)."""
    tvm = package()
    known = tvm.target.codegen.llvm_get_cpu_archlist(
        tvm.target.Target({"kind": "llvm", "mtriple": TRIPLES[arch]})
    )
    return frozenset(str(name) for name in known)


@cache
def _all_features(arch: str) -> frozenset[str]:
    """Those that some processor has. A few more exist, which LLVM has to be asked for one by one, and it
    writes to standard error of those that do not exist."""
    return frozenset().union(*(_features(name, arch) for name in _processors(arch)))


def _registers(arch: str, llvm: Mapping[str, Any]) -> tuple[int, int]:
    if arch == "aarch64":
        return 8, 12  # a block is two of the 32 registers of four
    features = _features(str(llvm["mcpu"]))
    if "avx512f" in features or "+avx512f" in llvm.get("mattr", ()):
        return 16, 28  # of 32 registers
    return 8, 12  # of 16


@cache
def _features(processor: str, arch: str = "x86_64", *more: str) -> frozenset[str]:
    asked = {"mcpu": processor} if processor else {}
    found = package().target.codegen.llvm_get_cpu_features(
        package().target.Target({"kind": "llvm", "mtriple": TRIPLES[arch], "mattr": [*more], **asked})
    )
    return frozenset(str(name) for name in found)


@cache
def _host_processor() -> str:
    return str(package().target.codegen.llvm_get_system_cpu())


_CODE_USES = frozenset({
    "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl",
    "dotprod", "fullfp16", "lse", "sve", "sve2",
})  # fmt: skip


def missing(llvm: Mapping[str, Any]) -> list[str]:
    """Instructions that code compiled for ``llvm`` may use and this host has not, sorted.

    >>> missing(machine(Target("here", host_arch(), processor="")).llvm) if host_arch() == "x86_64" else []
    []
    """
    arch = host_arch()
    asked = {str(a)[1:] for a in llvm.get("mattr", ()) if str(a).startswith("+")}
    needs = asked | (_features(str(llvm["mcpu"]), arch) if llvm.get("mcpu") else frozenset())
    return sorted((needs & _CODE_USES) - _features(_host_processor(), arch))


def linker(target: Target) -> str | None:
    """The compiler that links a library for ``target``; ``None`` is TVM's choice, for this host.

    Raises:
        BackendError: it is for another machine, and no compiler for that is installed.
    """
    if target.arch == host_arch():
        if not any(shutil.which(name) for name in ("g++", "gcc", "clang", "cc", "c++")):
            raise BackendError("TVM links with a C++ compiler and found none; apt-get install g++")
        return None
    name = f"{TRIPLES[target.arch]}-g++".replace("x86_64", "x86-64")
    names = (name, f"{TRIPLES[target.arch]}-g++")
    found = next((shutil.which(n) for n in names if shutil.which(n)), None)
    if found is None:
        debian = f"g++-{TRIPLES[target.arch]}".replace("x86_64", "x86-64")
        raise BackendError(
            f"a TVM library for {target.arch} is linked with {names[-1]}, which is not installed: "
            f"apt-get install {debian}"
        )
    return found
