"""The batch dimension: which inputs have one, and keeping it symbolic through capture.

The batch size is dimension 0 of the first tensor argument; every tensor argument whose dimension 0
has that size shares it. Export specialises sizes 0 and 1, so a batch of one is doubled first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import InputError


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Dimension 0 of the first tensor argument that has one.

    Raises:
        InputError: no argument is a tensor with dimensions.
    """
    for leaf in pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return leaf.shape[0]
    raise InputError("dynamic_batch=True, but no example input is a tensor with a batch dimension")


def widen(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with at least two samples: a batch of one is repeated, anything else stays."""
    if batch_size(args, kwargs) > 1:
        return args, dict(kwargs)
    return resize(args, kwargs, 2)


def resize(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call at batch ``size``: samples are repeated in turn, or cut off."""
    old = batch_size(args, kwargs)

    def change(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == old:
            return leaf[torch.arange(size, device=leaf.device) % old].contiguous()
        return leaf

    return pytree.tree_map(change, args), pytree.tree_map(change, dict(kwargs))


def dynamic_shapes(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """``torch.export``'s ``dynamic_shapes`` with dimension 0 of every batched tensor marked dynamic."""
    size = batch_size(args, kwargs)

    def mark(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == size:
            return {0: torch.export.Dim.DYNAMIC}
        return None

    import inspect

    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return {
        name: pytree.tree_map(mark, value)
        if inspect.signature(model.forward).parameters[name].kind is not inspect.Parameter.VAR_KEYWORD
        else {k: pytree.tree_map(mark, v) for k, v in value.items()}
        for name, value in bound.arguments.items()
    }
