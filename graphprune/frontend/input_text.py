"""Example inputs written as text, for commands and recipes: ``[NAME=]SHAPE[:DTYPE]``.

Floats are standard normal on a fixed seed. Integers are 0 and 1, which every vocabulary holds; a model that
needs other values gets them from a source that returns ``(module, example_inputs)``.

>>> args, kwargs = parse_inputs(["1x3x8x8", "mask=1x8:bool"])
>>> args[0].shape, kwargs["mask"].dtype
(torch.Size([1, 3, 8, 8]), torch.bool)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import InputError, suggestion

_TEXT = re.compile(r"(?:(?P<name>\w+)=)?(?P<shape>\d+(?:[x,]\d+)*|scalar)(?::(?P<dtype>\w+))?")
_NAMES = "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool"
_DTYPES = {name: getattr(torch, name) for name in _NAMES.split()}


def parse_inputs(texts: Sequence[str], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, in the order given.

    Raises:
        InputError: a text does not read, names no dtype of torch's, or follows a named one without a name.
    """
    generator = torch.Generator().manual_seed(seed)
    args: list[torch.Tensor] = []
    kwargs: dict[str, torch.Tensor] = {}
    for text in texts:
        match = _TEXT.fullmatch(text.replace(" ", ""))
        if match is None:
            raise InputError(
                f"cannot read the input {text!r}; write [NAME=]SHAPE[:DTYPE], as in x=1x3x224x224"
            )
        word = match["dtype"] or "float32"
        if word not in _DTYPES:
            raise InputError(f"input {text!r}: unknown dtype {word!r}{suggestion(word, _DTYPES)}")
        shape = [] if match["shape"] == "scalar" else [int(n) for n in re.split("[x,]", match["shape"])]
        value = values(shape, _DTYPES[word], generator)
        if match["name"]:
            kwargs[match["name"]] = value
        elif kwargs:
            raise InputError(f"input {text!r} has no name but follows a named one; name it, or put it first")
        else:
            args.append(value)
    return tuple(args), kwargs


def values(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A tensor as the module docstring says."""
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)
