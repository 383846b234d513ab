"""What of a Relax function is constant, computed with numpy while compiling.

Weights reach the rewrite through transposes, reshapes and the arithmetic of a decomposed batch norm. Relax
folds these too, but by compiling and running each one; a handful of numpy functions is all that is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import GenericConst

_BINARY: dict[str, Callable[..., Any]] = {
    "relax.add": np.add, "relax.subtract": np.subtract, "relax.multiply": np.multiply,
    "relax.divide": np.divide, "relax.sqrt": np.sqrt, "relax.negative": np.negative,
    "relax.rsqrt": lambda x: (1 / np.sqrt(x)).astype(x.dtype),
}  # fmt: skip


class Constants:
    """Variables whose value is known."""

    def __init__(self) -> None:
        self._values: dict[Any, np.ndarray] = {}

    def get(self, value: Any) -> np.ndarray | None:
        """The tensor that an expression stands for, or ``None``."""
        if isinstance(value, GenericConst) and hasattr(value.value, "numpy"):
            return np.asarray(value.value.numpy())
        return self._values.get(value) if isinstance(value, relax.Var) else None

    def learn(self, var: Any, value: Any) -> bool:
        """Whether ``var`` is constant; its value is kept."""
        found = self._of(var, value)
        if found is not None:
            self._values[var] = found
        return found is not None

    def _of(self, var: Any, value: Any) -> np.ndarray | None:
        if not isinstance(value, relax.Call) or not value.args:
            return self.get(value)
        name = getattr(value.op, "name", "")
        first = self.get(value.args[0])
        if first is None:
            return None
        if name == "relax.permute_dims":
            axes = value.attrs.axes
            return np.transpose(first, None if axes is None else [int(axis) for axis in axes])
        if name in ("relax.reshape", "relax.expand_dims", "relax.squeeze"):
            return first.reshape([int(size) for size in var.ty.shape])
        if name == "relax.astype":
            return first.astype(str(value.attrs.dtype))
        others = [self.get(argument) for argument in value.args]
        if name in _BINARY and all(other is not None for other in others):
            return np.asarray(_BINARY[name](*others), dtype=first.dtype)
        return None
