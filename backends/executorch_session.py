"""A ``.pte`` file opened in this process: torch tensors in, torch tensors out.

ExecuTorch has one pool of threads for the process. Changing its size leaves what was opened before without
one, so a runner opens its file anew when another runner has changed it; runners of one size cost nothing.
Calls from several threads follow each other. Each change writes a line to standard error; that is the
runtime's own log.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch

from graphprune.backend import TensorSpec
from graphprune.errors import BackendError, InputError
from graphprune.threads import checked

from . import flat_inputs
from .executorch_program import IDENTIFIER, PROGRAM_FILE, missing, runtime
from .exported import first_line

METHOD = "forward"
_MISSING = "0x14"  # the runtime's number for an operator that it has no kernel for


class _Pool:
    """The process's pool of threads: its size, and how often that was changed."""

    def __init__(self) -> None:
        self.busy = threading.RLock()
        self.changes = 0
        self._default: int | None = None

    def resize(self, wanted: int | None) -> None:
        """To ``wanted`` threads, ``None`` for as many as the runtime made by itself."""
        library = runtime()
        now = library._threadpool_get_thread_count()
        self._default = self._default or now
        if now != (wanted or self._default):
            library._unsafe_reset_threadpool(wanted or self._default)
            self.changes += 1


_POOL = _Pool()


class ExecuTorchRunner:
    """A callable from flat tensors to the flat outputs.

    Attributes:
        inputs, outputs: the specifications.
        threads: of the runtime, ``None`` for its default (one per core).
        notes: what differs from what the target asked for; nothing.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        files: Mapping[str, bytes],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[Any, ...],
        threads: int | None = None,
    ):
        if PROGRAM_FILE not in files:
            raise BackendError(f"there is no {PROGRAM_FILE} among the files: {', '.join(files) or 'none'}")
        self.inputs, self.outputs, self.threads = inputs, outputs, checked(threads)
        self._check = flat_inputs.Check(inputs)
        self._program = files[PROGRAM_FILE]  # the runtime reads weights from these bytes
        self._library = runtime()
        check_format(self._program)
        with _POOL.busy:
            self._open()
        self._largest = self._sizes()

    def _open(self) -> None:
        _POOL.resize(self.threads)
        try:
            opened = self._library._load_program_from_buffer(self._program)
            self._method = opened.load_method(METHOD)
            self._opened = opened  # the method lives as long as it
        except Exception as error:
            raise BackendError(self._unopened(error)) from error
        self._opened_at = _POOL.changes

    def _unopened(self, error: BaseException) -> str:
        from .executorch_audit import operators

        if _MISSING in str(error):
            unknown = missing(operators(self._program))
            if unknown:
                return f"this executorch has no kernel for {', '.join(unknown)}; upgrade executorch"
        return f"ExecuTorch does not open the program: {first_line(error)}"

    def _sizes(self) -> list[tuple[int, ...]]:
        """What memory is planned for, of each input; program and specification must be of one artifact."""
        specs = [spec for spec in self.outputs if isinstance(spec, TensorSpec)]
        meta = self._method.method_meta()
        there = (meta.num_inputs(), meta.num_outputs())
        if there != (len(self.inputs), len(specs)):
            raise BackendError(
                f"the program has {there[0]} inputs and {there[1]} outputs, the specification "
                f"{len(self.inputs)} and {len(specs)}"
            )
        largest = [tuple(meta.input_tensor_meta(i).sizes()) for i in range(there[0])]
        for sizes, spec in zip(largest, self.inputs, strict=True):
            fits = len(sizes) == len(spec.shape)
            if not fits or any(isinstance(w, int) and w != n for w, n in zip(spec.shape, sizes, strict=True)):
                raise BackendError(
                    f"the program's input {list(sizes)} is not the specification's {spec.name!r} "
                    f"{list(spec.shape)}"
                )
        return largest

    def __call__(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        """Run once. Raises InputError when the inputs do not fit, BackendError when the runtime fails."""
        self._check(inputs)
        for spec, value, largest in zip(self.inputs, inputs, self._largest, strict=True):
            for name, size, most in zip(spec.shape, value.shape, largest, strict=True):
                if size > most:
                    raise InputError(
                        f"input {spec.name!r} has {name} = {size}; memory was planned for up to "
                        f"{most}: call it on parts, or build it with a larger example"
                    )
        given = [value.detach().cpu().contiguous() for value in inputs]
        with _POOL.busy:
            _POOL.resize(self.threads)
            if self._opened_at != _POOL.changes:
                self._open()
            try:
                found = self._method(given)
            except Exception as error:
                raise BackendError(f"ExecuTorch failed while running: {first_line(error)}") from error
        return flat_inputs.results(self.outputs, found, inputs)


def check_format(program: bytes) -> None:
    """Raise a BackendError where the bytes are not of the file format that this runtime reads."""
    found = program[4:8]
    if found == IDENTIFIER:
        return
    if found[:2] == IDENTIFIER[:2] and found[2:].isdigit():
        raise BackendError(
            f"{PROGRAM_FILE} is of ExecuTorch's format {found.decode()}, this executorch reads "
            f"{IDENTIFIER.decode()}; upgrade executorch, or build the artifact again"
        )
    raise BackendError(f"{PROGRAM_FILE} is not a program of ExecuTorch; build the artifact again")
