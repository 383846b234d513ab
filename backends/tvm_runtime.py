"""A TVM library opened on this host: torch tensors in, torch tensors out.

The artifact is two files. ``model.so`` is a shared library with the code, the constants and the program that
calls it; ``tvm.json`` says what a caller needs. With TVM and numpy alone, on the machine it was built for,
this runs it (and is how a library for another machine is run under emulation):

    import json, numpy as np, tvm
    facts = json.load(open("tvm.json"))
    program = tvm.relax.VirtualMachine(tvm.runtime.load_module("model.so"), tvm.cpu())
    given = [tvm.runtime.tensor(np.zeros(spec["shape"], spec["dtype"])) for spec in facts["inputs"]]
    results = [result.numpy() for result in program[facts["function"]](*given)]

``results`` stand in the order of ``facts["outputs"]``; an output that is no tensor is not among them.
"""

from __future__ import annotations

import json
import struct
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from graphprune.backend import TensorSpec
from graphprune.errors import BackendError
from graphprune.target import host_arch
from graphprune.threads import checked

from .exported import first_line
from .flat_inputs import Check, results
from .tvm_machine import missing
from .tvm_package import cores, package

LIBRARY_FILE, FACTS_FILE = "model.so", "tvm.json"
FORMAT = 1
ALIGNMENT = 64  # bytes: compiled code loads whole vectors, and assumes that they start there

_MACHINES = {62: "x86_64", 183: "aarch64"}  # e_machine of an ELF header


def architecture(library: bytes) -> str:
    """The machine whose code a shared library holds: ``x86_64``, ``aarch64`` or ``ELF machine N``.

    Raises:
        BackendError: it is no shared library of Linux.

    >>> architecture(b"nothing")
    Traceback (most recent call last):
        ...
    graphprune.errors.BackendError: model.so is not a shared library (it does not begin as an ELF file does)
    """
    if len(library) < 20 or library[:4] != b"\x7fELF":
        raise BackendError(f"{LIBRARY_FILE} is not a shared library (it does not begin as an ELF file does)")
    order = "<" if library[5] == 1 else ">"
    (number,) = struct.unpack(f"{order}H", library[18:20])
    return _MACHINES.get(number, f"ELF machine {number}")


def facts_of(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What ``tvm.json`` says, checked against this project and this host.

    Raises:
        BackendError: a file is missing, it was written by something newer, or is for another machine.
    """
    for name in (LIBRARY_FILE, FACTS_FILE):
        if name not in files:
            raise BackendError(f"there is no {name} among the files: {', '.join(files) or 'none'}")
    try:
        facts: dict[str, Any] = json.loads(files[FACTS_FILE])
    except ValueError as error:
        raise BackendError(f"{FACTS_FILE} is not JSON: {first_line(error)}") from error
    if facts.get("format", 0) > FORMAT:
        raise BackendError(
            f"{FACTS_FILE} is of format {facts['format']}, newer than this graphprune reads ({FORMAT}); "
            "update graphprune"
        )
    made_for = architecture(files[LIBRARY_FILE])
    if made_for != host_arch():
        raise BackendError(
            f"{LIBRARY_FILE} is machine code for {made_for}, and this host is {host_arch()}; "
            "run it there, or check it here with: graphprune verify DIR --emulate"
        )
    size = len(files[LIBRARY_FILE])
    if size != facts["bytes"]:  # the loader would read beyond the end, which ends the process
        raise BackendError(
            f"{LIBRARY_FILE} is damaged: it has {size} bytes, and was written with {facts['bytes']}"
        )
    return facts


class TvmRunner:
    """A callable from flat tensors to the flat outputs; calls from several threads follow each other.

    Attributes:
        inputs, outputs: the specifications.
        threads: of TVM's pool during a call; ``None`` leaves its default (one per core).
        program: the ``tvm.relax.VirtualMachine``.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        files: Mapping[str, bytes],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[Any, ...],
        threads: int | None = None,
    ):
        facts = facts_of(files)
        self.inputs, self.outputs, self.threads = inputs, outputs, checked(threads)
        self._check = Check(inputs)
        self._tvm = package()
        self._check_version(facts)
        lacks = missing(facts.get("llvm", {}))
        if lacks:
            raise BackendError(
                f"the library is for {facts['processor']}, with {', '.join(lacks)}, which this processor "
                "lacks; build it here, or for a processor that both have"
            )
        names = [spec["name"] for spec in facts["inputs"]]
        if names != [spec.name for spec in inputs]:
            raise BackendError(f"the library's inputs {names} are not the specification's")
        self.program = self._load(files[LIBRARY_FILE])
        self._main = self.program[facts["function"]]
        self._owned = [bool(spec["computed"]) for spec in facts["outputs"]]
        self._configure = self._tvm.get_global_func("runtime.config_threadpool")
        self._busy = threading.Lock()

    def _check_version(self, facts: Mapping[str, Any]) -> None:
        built, here = str(facts["tvm"]), str(self._tvm.__version__)
        if _release(built) > _release(here):
            raise BackendError(
                f"the library was built with TVM {built}, and TVM {here} is installed, which is older: "
                f"pip install 'apache-tvm>={built}'"
            )

    def _load(self, library: bytes) -> Any:
        # The file may go once it is open: its pages stay for as long as they are mapped.
        with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
            path = Path(folder) / LIBRARY_FILE
            path.write_bytes(library)
            try:
                module = self._tvm.runtime.load_module(str(path))
                return self._tvm.relax.VirtualMachine(module, self._tvm.cpu())
            except Exception as error:
                reason = f"TVM {self._tvm.__version__} does not open the library: {first_line(error)}"
                raise BackendError(reason) from error

    def __call__(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        """Run once. Raises InputError when the inputs do not fit, BackendError when the library fails."""
        self._check(inputs)
        given = [self._tvm.runtime.from_dlpack(_aligned(value)) for value in inputs]
        try:
            with self._busy:
                self._configure(1, self.threads or cores())
                found = list(self._main(*given))
        except Exception as error:
            raise BackendError(f"the library failed while running: {first_line(error)}") from error
        own = (
            torch.from_dlpack(value) if owned else torch.from_dlpack(value).clone()
            for value, owned in zip(found, self._owned, strict=True)
        )
        return results(self.outputs, own, inputs)


def _aligned(value: torch.Tensor) -> torch.Tensor:
    value = value.detach().cpu().contiguous()
    return value.clone() if value.data_ptr() % ALIGNMENT else value


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
