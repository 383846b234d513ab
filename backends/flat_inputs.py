"""Flat inputs against their specification, and flat outputs put in the places that theirs has for them.

Every backend checks before its runtime sees a tensor, so that a mistake reads the same with all of them: an
error that names the input and how it does not fit.

>>> import torch
>>> from graphprune.backend import TensorSpec
>>> check((TensorSpec("x", ("batch", 3), "float32"),), (torch.zeros(2, 4),))
Traceback (most recent call last):
    ...
graphprune.errors.InputError: input 'x' must have shape (batch, 3), got (2, 4)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from graphprune.backend import TensorSpec
from graphprune.errors import InputError


def check(specs: Sequence[TensorSpec], inputs: Sequence[torch.Tensor]) -> None:
    """Raise an InputError that names the input which does not fit, and how."""
    if len(inputs) != len(specs):
        wanted = ", ".join(spec.name for spec in specs)
        raise InputError(f"expected {len(specs)} inputs ({wanted}), got {len(inputs)}")
    sizes: dict[str, tuple[int, str]] = {}
    for spec, value in zip(specs, inputs, strict=True):
        if not isinstance(value, torch.Tensor):
            raise InputError(f"input {spec.name!r} must be a tensor, got {type(value).__name__}")
        if value.dtype is not getattr(torch, spec.dtype):
            got = str(value.dtype).removeprefix("torch.")
            raise InputError(f"input {spec.name!r} must be {spec.dtype}, got {got}; convert it")
        _check_shape(spec, tuple(value.shape), sizes)


class Check:
    """:func:`check` for an artifact; inputs like those of the call before are not looked at again.

    >>> fits = Check((TensorSpec("x", ("batch", 3), "float32"),))
    >>> fits([torch.zeros(2, 3)])
    >>> fits([torch.zeros(2, 3, dtype=torch.float64)])
    Traceback (most recent call last):
        ...
    graphprune.errors.InputError: input 'x' must be float32, got float64; convert it
    """

    def __init__(self, specs: Sequence[TensorSpec]):
        self._specs = tuple(specs)
        self._fitted: list[Any] | None = None

    def __call__(self, inputs: Sequence[torch.Tensor]) -> None:
        """Raises as :func:`check` does."""
        tensors = all(isinstance(value, torch.Tensor) for value in inputs)
        now = [(value.dtype, value.shape) for value in inputs] if tensors else None
        if now is None or now != self._fitted:
            check(self._specs, inputs)
            self._fitted = now


def results(
    specs: Sequence[Any], found: Iterable[torch.Tensor], inputs: Sequence[torch.Tensor]
) -> tuple[Any, ...]:
    """What a runtime gave, on the device of the inputs, among the outputs that were known beforehand."""
    device = inputs[0].device if inputs else torch.device("cpu")
    values = iter(found)
    return tuple(next(values).to(device) if isinstance(spec, TensorSpec) else spec for spec in specs)


def _check_shape(spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]]) -> None:
    """One input's shape; ``sizes`` remembers what symbolic sizes stood for, and in which input."""
    same_rank = len(shape) == len(spec.shape)
    wrong = [i for i, (want, got) in enumerate(zip(spec.shape, shape, strict=False))
             if isinstance(want, int) and want != got]  # fmt: skip
    if not same_rank or wrong:
        advice = "; build with dynamic_batch=True for other batch sizes" if same_rank and wrong == [0] else ""
        raise InputError(
            f"input {spec.name!r} must have shape {_text(spec.shape)}, got {_text(shape)}{advice}"
        )
    for want, got in zip(spec.shape, shape, strict=True):
        if isinstance(want, int):
            continue
        if got == 0:
            raise InputError(
                f"input {spec.name!r} is empty (shape {_text(shape)}); {want} must be at least 1"
            )
        first, where = sizes.setdefault(want, (got, spec.name))
        if first != got:
            raise InputError(f"input {spec.name!r} has {want} = {got}, but input {where!r} has {first}")


def _text(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
