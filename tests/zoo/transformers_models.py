"""Small transformers with random weights."""

from __future__ import annotations

from tests.zoo.network import Network


def networks() -> list[Network]:
    """Every transformers network."""
    return []
