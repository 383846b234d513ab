"""Inputs for artifacts: read from a file, or drawn at random from what the manifest says they are.

An artifact of a fixed batch size gets a file's samples in pieces of that size; one of an open batch size, in
pieces of the size asked for.

>>> from graphprune.backend import TensorSpec
>>> drawn = draw([TensorSpec("x", ("batch", 3), "float32")], samples=2, batch=5)
>>> len(drawn.calls), drawn.calls[0][0].shape
(2, torch.Size([5, 3]))
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..backend import TensorSpec
from ..errors import InputError
from ..frontend.input_text import values

Call = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Inputs:
    """Flat inputs of some calls, and what a report should say of them."""

    calls: tuple[Call, ...]
    notes: tuple[str, ...] = ()


def common(first: Sequence[TensorSpec], second: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The inputs that two artifacts both take: an open size that the other fixes is fixed.

    Raises:
        InputError: there are none, because they differ in number, dtype or a fixed size.
    """
    reason = f"they take ({_text(first)}) and ({_text(second)})"
    if len(first) != len(second):
        raise InputError(f"the two artifacts cannot be compared: {reason}; give builds of one model")
    found = []
    for one, other in zip(first, second, strict=True):
        sizes = tuple(b if isinstance(a, str) else a for a, b in zip(one.shape, other.shape, strict=False))
        clash = any(isinstance(b, int) and b != a for a, b in zip(sizes, other.shape, strict=False))
        if clash or len(one.shape) != len(other.shape) or one.dtype != other.dtype:
            raise InputError(
                f"the two artifacts cannot be compared: {reason}; give builds of one model for one input size"
            )
        found.append(TensorSpec(one.name, sizes, one.dtype))
    return tuple(found)


def draw(specs: Sequence[TensorSpec], *, samples: int, batch: int = 1, seed: int = 0) -> Inputs:
    """``samples`` calls of random numbers: floats standard normal, integers 0 and 1; open sizes ``batch``."""
    generator = torch.Generator().manual_seed(seed)
    calls = tuple(
        tuple(values(_sizes(spec, batch), getattr(torch, spec.dtype), generator) for spec in specs)
        for _ in range(samples)
    )
    note = (
        f"the inputs are random numbers (seed {seed}), not data, on which answers may agree more or less; "
        "give a file of inputs"
    )
    return Inputs(calls, (note,))


def read(path: Path, specs: Sequence[TensorSpec], *, samples: int, batch: int = 1) -> Inputs:
    """The first ``samples`` calls that a file's arrays make.

    Args:
        path: ``.npz`` with an array for each input, or ``.pt`` with a tensor, a list of tensors in the
            inputs' order, or a mapping by name; dimension 0 counts samples. Nothing in it is executed.
        specs: the inputs.
        samples: at most so many calls.
        batch: samples of a call where the batch size is open.

    Raises:
        InputError: the file does not read, or does not fit the inputs; says which and how.
        OSError: it cannot be opened.
    """
    arrays = _named(path, _load(path), [spec.name for spec in specs])
    pieces: list[tuple[torch.Tensor, ...]] = []
    left = 0
    for spec in specs:
        value, size = arrays[spec.name], _sizes(spec, batch)
        where = f"{path}: input {spec.name!r}"
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype != spec.dtype:
            raise InputError(f"{where} is {dtype}, the artifact takes {spec.dtype}; save it as that")
        if value.dim() != len(size) or list(value.shape[1:]) != size[1:]:
            wanted = ["samples", *spec.shape[1:]] if spec.shape else []
            raise InputError(f"{where} has shape {list(value.shape)}, the artifact takes {wanted}")
        if not size:
            pieces.append((value,))
            continue
        whole = value.shape[0] // size[0] * size[0] if size[0] else 0
        if not whole:
            raise InputError(f"{where} holds {value.shape[0]} samples, and one call takes {size[0]}")
        left = max(left, value.shape[0] - whole)
        pieces.append(value[:whole].contiguous().split(size[0]))
    counts = {spec.name: len(parts) for spec, parts in zip(specs, pieces, strict=True)}
    count = max(counts.values(), default=1)
    if any(number not in (1, count) for number in counts.values()):
        raise InputError(f"{path}: the inputs make different numbers of calls: {counts}")
    used = min(count, samples)
    calls = tuple(tuple(parts[i if len(parts) > 1 else 0] for parts in pieces) for i in range(used))
    notes = [f"{count - used} further calls of {path} were not used"] if used < count else []
    if left:
        notes.append(f"{left} samples of {path} fill no call of the artifact and were left out")
    return Inputs(calls, tuple(notes))


def _sizes(spec: TensorSpec, batch: int) -> list[int]:
    return [size if isinstance(size, int) else batch for size in spec.shape]


def _load(path: Path) -> Any:
    kind = path.suffix.lower()
    if kind not in (".npz", ".pt"):
        raise InputError(f"{path} is not read; give .npz (numpy.savez) or .pt (torch.save of tensors)")
    try:
        if kind == ".pt":
            return torch.load(path, map_location="cpu", weights_only=True)
        import numpy as np

        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except (
        ValueError,
        TypeError,
        EOFError,
        RuntimeError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise InputError(f"{path} does not read as tensors: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why a file does not read, in one line."""
    if isinstance(error, EOFError):
        return "it is empty, or ends too early"
    if isinstance(error, pickle.UnpicklingError):  # torch's own text tells to execute what is in the file
        return "it is damaged, or holds objects other than tensors, and nothing in it is executed"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _named(path: Path, found: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """A file's tensors by input."""
    if isinstance(found, torch.Tensor):
        found = [found]
    if isinstance(found, Mapping) and len(found) == len(names) == 1:
        found = list(found.values())
    if isinstance(found, (list, tuple)):
        if len(found) != len(names):
            raise InputError(f"{path} holds {len(found)} tensors, the artifact takes {list(names)}")
        found = dict(zip(names, found, strict=True))
    if not isinstance(found, Mapping) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise InputError(f"{path} holds something else than tensors, or a list or mapping of them")
    if set(found) != set(names):
        raise InputError(f"{path} holds {sorted(map(str, found))}, the artifact takes {list(names)}")
    return dict(found)


def _text(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{s.name}: {s.dtype}[{', '.join(map(str, s.shape))}]" for s in specs)
