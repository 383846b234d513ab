"""The hand-written blocks as networks of the zoo; names are the class names in snake case."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.zoo import blocks_conv, blocks_index, blocks_parametrised, blocks_sequence
from tests.zoo.network import Network, normal, seeded

_MODULES = (blocks_conv, blocks_index, blocks_sequence, blocks_parametrised)
_SHAPES = {
    blocks_conv: (2, 3, 8, 8),
    blocks_index: (2, 3, 8, 8),
    blocks_sequence: (2, 9, 7),
    blocks_parametrised: (2, 3, 8, 8),
}
_SPECIAL: dict[str, Callable[[], tuple[Any, ...]]] = {
    "Conv1d": normal(2, 4, 33),
    "Conv3d": normal(2, 2, 4, 8, 8),
    "Gather": normal(2, 9, 7),
    "SymmetricLinear": normal(6, 7),
    "LowRankUpdate": normal(6, 7),
    "TiedEmbedding": lambda: (torch.randint(0, 19, (2, 9), generator=torch.Generator().manual_seed(0)),),
}


def networks() -> list[Network]:
    """One network a block."""
    found = []
    for module in _MODULES:
        for block in vars(module).values():
            if not (isinstance(block, type) and issubclass(block, nn.Module)):
                continue
            if block.__module__ != module.__name__ or block.__name__.startswith("_"):
                continue
            name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", block.__name__).lower()
            found.append(
                Network(
                    name=name,
                    family=module.__name__.rpartition(".")[2],
                    build=seeded(name, block),
                    inputs=_SPECIAL.get(block.__name__, normal(*_SHAPES[module])),
                    tags=frozenset({"block"}),
                )
            )
    return found
