"""graphprune: a compiler for finished PyTorch models."""

from __future__ import annotations

from .capture import capture as trace

__all__ = ["trace"]
