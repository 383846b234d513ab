"""Small members of the families of timm, untrained."""

from __future__ import annotations

from tests.zoo.network import Network


def networks() -> list[Network]:
    """Every timm network."""
    return []
