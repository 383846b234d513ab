"""ExecuTorch's file (``model.pte``) from an exported program: XNNPACK's part of it, and the rest.

What XNNPACK takes becomes one or several calls of its delegate, weights packed when the file is opened; the
rest runs on ExecuTorch's own kernels, most of them written for size and not for speed. The package is an
extra, and imported when it is first needed (:func:`runtime`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from graphprune.errors import BackendError, MissingExtraError, described

from .exported import first_line

PROGRAM_FILE = "model.pte"
IDENTIFIER = b"ET12"  # of the files that the versions of this extra write

_ELSE = "write that part of the model with other operators, or use backend='onnxruntime'"


def runtime() -> Any:
    """The module of ``executorch`` that opens files.

    Raises:
        MissingExtraError: it is not installed.
        BackendError: it is, and does not import.
    """
    try:
        with quiet():
            from executorch.extension.pybindings import portable_lib
    except ModuleNotFoundError as error:
        if error.name != "executorch":
            raise BackendError(f"executorch does not import ({error}); install it again") from error
        raise MissingExtraError("executorch", "executorch", "backend='executorch'") from error
    except Exception as error:  # a library that is not there is an OSError, one built for another numpy …
        raise BackendError(f"executorch does not import ({described(error)}); install it again") from error
    return portable_lib


def program(exported: torch.export.ExportedProgram) -> bytes:
    """The program as a file; equal programs give equal bytes.

    Raises:
        BackendError: it does not lower, or ExecuTorch has no kernel for an operator; names it.
    """
    with quiet():
        try:
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
        except ImportError as error:
            raise BackendError(
                f"executorch does not import ({first_line(error)}); install it again"
            ) from error
        try:
            # Core ATen alone would refuse operators that there are kernels for; what has none is named below.
            config = EdgeCompileConfig(_check_ir_validity=False)
            lowered = to_edge_transform_and_lower(
                exported, partitioner=[XnnpackPartitioner()], compile_config=config
            )
            made = lowered.to_executorch()
        except Exception as error:
            raise BackendError(_refused(error)) from error
    names = {
        f"{operator.name}{f'.{operator.overload}' if operator.overload else ''}"
        for plan in made.executorch_program.execution_plan
        for operator in plan.operators
    }
    unknown = missing(names)
    if unknown:
        several = "s" if len(unknown) > 1 else ""
        raise BackendError(
            f"ExecuTorch has no kernel for the operator{several} {', '.join(unknown)}; {_ELSE}"
        )
    return bytes(made.buffer)


def missing(names: Any) -> list[str]:
    """Those of the operators, by their names in a file, that this runtime has no kernel for."""
    return sorted(set(names) - set(runtime()._get_operator_names()))


def _refused(error: BaseException) -> str:
    if "WithEffects" in str(error):  # what its tracer knows no plain form of, and does not name
        return f"ExecuTorch does not lower an operator that checks its values while it runs; {_ELSE}"
    return f"ExecuTorch does not lower the graph: {first_line(error)}; {_ELSE}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings of the package's own internals, and the root logger left as the caller has it."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
