"""One file of typing rules per family of ATen operators; importing a file registers its rules."""

from __future__ import annotations

import functools
import importlib

FAMILIES = (
    "elementwise", "products", "convolution", "normalization", "attention", "recurrent",
    "views", "pieces", "reductions", "indexing", "spatial", "factories", "experts",
)  # fmt: skip


@functools.cache
def load() -> None:
    """Register every family's rules (once)."""
    for family in FAMILIES:
        importlib.import_module(f"{__name__}.{family}")
