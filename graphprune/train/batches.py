"""Batches of a training loop: how a network is called with one, and which part of it a process takes.

A batch's inputs are a tensor, a tuple or list of positional arguments, or a dict of keyword arguments, as
everywhere in this package. Several processes divide every batch among them, first dimension, as evenly as
it goes and in order; a batch that is smaller than their number goes to each of them whole.

>>> import torch
>>> share({"x": torch.arange(5)}, 5, index=0, count=2), share({"x": torch.arange(5)}, 5, index=1, count=2)
({'x': tensor([0, 1, 2])}, {'x': tensor([3, 4])})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphprune.errors import InputError


def call(module: Callable[..., Any], inputs: Any) -> Any:
    """The network's outputs for one batch's inputs."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, (tuple, list)) else module(inputs)


def pair(batch: Any, number: int) -> tuple[Any, Any]:
    """(inputs, targets) of what a training iterable gave.

    Raises:
        InputError: it is no pair.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise InputError(f"batch {number} of the training data is no (inputs, targets) but {_kind(batch)}")
    return batch[0], batch[1]


def samples(inputs: Any) -> int:
    """How many samples a batch holds: the size of the first dimension of its first tensor with one.

    Raises:
        InputError: it holds no such tensor.
    """
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return leaf.shape[0]
    raise InputError(f"a batch's inputs hold no tensor with a batch dimension, but {_kind(inputs)}")


def share(batch: Any, size: int, *, index: int, count: int) -> Any:
    """The part of a batch that process ``index`` of ``count`` trains on; other tensors stay whole."""
    if count == 1 or size < count:
        return batch
    each, over = divmod(size, count)
    start = index * each + min(index, over)
    stop = start + each + (index < over)

    def part(leaf: Any) -> Any:
        batched = isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == size
        return leaf[start:stop] if batched else leaf

    return pytree.tree_map(part, batch)


def finite(values: Any) -> bool:
    """Whether all of the tensors in a nested value are free of infinities and of what is no number."""
    return all(bool(x.isfinite().all()) for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor))


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
