"""The exporter's table of translations, built once a process.

``torch.onnx.export`` reads the source of some 500 translating functions at every call, which takes longer
than the translation of a small network (0.5 s of 0.9, one core of an AMD EPYC). What it reads does not
change, so within :func:`shared` every export starts from a copy of the first table.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_tables: dict[int, Any] = {}
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
            if opset_version not in _tables:
                _tables[opset_version] = build.__func__(cls, opset_version=opset_version)
            copy = cls()
            vars(copy).update(vars(_tables[opset_version]))
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
    return ONNXRegistry if known and "functions" in vars(ONNXRegistry()) else None
