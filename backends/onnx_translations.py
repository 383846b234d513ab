"""The exporter's table of translations, built once a process.

``torch.onnx.export`` reads the source of some 500 translating functions at every call, which takes longer
than the translation of a small network (0.5 s of 0.9, one core of an AMD EPYC). What it reads does not
change, so within :func:`shared` every export starts from a copy of the first table. A translation of an
operator that torch does not know yet is left out of a table: one that has come since needs a new table.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_tables: dict[tuple[int, int], Any] = {}  # by version of ONNX's operators and number of torch's
_lock = threading.RLock()  # what is replaced belongs to the process


@contextmanager
def shared() -> Iterator[None]:
    """Exports within build no table of their own where this torch builds it where it is known to."""
    registry = _registry()
    if registry is None:
        yield
        return
    with _lock:
        build = registry.__dict__["from_torchlib"]

        def known(cls: Any, opset_version: int) -> Any:
            key = opset_version, len(torch._C._dispatch_get_all_op_names())
            if key not in _tables:
                _tables.clear()
                _tables[key] = build.__func__(cls, opset_version=opset_version)
            copy = cls()
            vars(copy).update(vars(_tables[key]))
            # An export with translations of its own puts them at the front of these lists.
            copy.functions = {target: list(found) for target, found in copy.functions.items()}
            return copy

        registry.from_torchlib = classmethod(known)
        try:
            yield
        finally:
            registry.from_torchlib = build


def _registry() -> Any:
    """The class of the table; ``None`` where this version of torch has it elsewhere, or in another form."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        return None
    known = isinstance(vars(ONNXRegistry).get("from_torchlib"), classmethod)
    counted = hasattr(torch._C, "_dispatch_get_all_op_names")
    return ONNXRegistry if known and counted and "functions" in vars(ONNXRegistry()) else None
