"""Calibration inputs, checked and brought to the batch size that a graph was captured with.

The batches are kept, so what they hold is bounded: ``limit`` samples are read, and an iterable that never
ends is fine. A graph with a fixed batch size gets larger batches in pieces of that size.

>>> import torch, graphprune
>>> graph = graphprune.trace(torch.nn.Linear(3, 2), torch.zeros(1, 3))
>>> read(graph, [torch.zeros(4, 3), torch.ones(4, 3)], limit=6).samples
6
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import InputError
from .graph import Graph
from .notes import Note

Call = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Calibration:
    """Flat inputs of every call, how many samples they hold together, and what was left out."""

    calls: tuple[Call, ...]
    samples: int
    notes: tuple[Note, ...] = ()


def read(graph: Graph, calibration: Iterable[Any], limit: int) -> Calibration:
    """The first ``limit`` samples of an iterable of inputs.

    Args:
        graph: whose inputs they are.
        calibration: a tensor, a tuple or list of positional or a dict of keyword arguments each.
        limit: how many samples to keep; a sample is a position of the batch dimension.

    Raises:
        InputError: there are none, or one is not finite or has another structure, shape, dtype or device.
    """
    if limit < 1:
        raise InputError(f"the limit of calibration samples must be at least 1, got {limit}")
    if isinstance(calibration, (torch.Tensor, str, bytes, Mapping)):
        raise InputError(
            f"calibration is a single {type(calibration).__name__}; it must be an iterable of inputs: "
            "put it in a list"
        )
    try:
        items = iter(calibration)
    except TypeError:
        raise InputError(f"calibration must be an iterable of inputs, got {calibration!r}") from None
    batch = _Batch(graph)
    calls: list[Call] = []
    samples = dropped = count = 0
    for count, item in enumerate(items, 1):
        call = _flat(graph, item, f"calibration input {count - 1}")
        batch.check(call, f"calibration input {count - 1}")
        for piece, size in batch.pieces(call, limit - samples):
            calls.append(piece)
            samples += size
        dropped += batch.size(call) % batch.captured if batch.captured else 0
        if samples >= limit or (batch.captured or 1) > limit - samples:
            break
    if not count:
        raise InputError("calibration holds no inputs; a generator that was used up before gives none, too")
    if not calls:
        raise InputError(
            f"the graph was captured for batches of {batch.captured}, and no calibration input (or the limit "
            f"of {limit} samples) fills one; capture with dynamic_batch=True or give larger batches"
        )
    notes = [Note("info", "calibration", f"{samples} samples in {len(calls)} calls")]
    if samples >= limit:
        notes.append(Note("info", "calibration", f"reading ended at the limit of {limit} samples"))
    if dropped:
        why = f"{dropped} samples left over: the graph takes batches of {batch.captured}"
        notes.append(Note("refused", "calibration", why))
    return Calibration(tuple(calls), samples, tuple(notes))


def _flat(graph: Graph, item: Any, where: str) -> Call:
    args: Sequence[Any] = item if isinstance(item, (tuple, list)) else (item,)
    kwargs: Mapping[str, Any] = {}
    if isinstance(item, Mapping):
        args, kwargs = (), item
    try:
        return tuple(graph.signature.flatten(args, kwargs))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


class _Batch:
    """Where a graph's inputs have their batch dimension, and what else of their shapes is fixed.

    Attributes:
        captured: the fixed batch size, ``None`` where it is open.
    """

    def __init__(self, graph: Graph):
        self.names = graph.signature.names
        self.values = [node.meta["val"] for node in graph.placeholders]
        self.devices = [example.device for example in graph.examples]
        sizes = [value.shape[0] if value.dim() else None for value in self.values]
        symbolic = [i for i, size in enumerate(sizes) if size is not None and not isinstance(size, int)]
        first = next((size for size in sizes if size is not None), None)
        self.captured: int | None = None if symbolic or first is None else first
        self.batched = symbolic or [i for i, size in enumerate(sizes) if size is not None and size == first]

    def size(self, call: Call) -> int:
        """The batch size of a call."""
        return call[self.batched[0]].shape[0] if self.batched else 1

    def check(self, call: Call, where: str) -> None:
        """Raise unless every tensor fits its placeholder and is finite."""
        for index, (name, given, value) in enumerate(zip(self.names, call, self.values, strict=True)):
            at = f"{where}, argument {name!r}"
            if given.dtype != value.dtype:
                raise InputError(f"{at}: is {given.dtype}, captured was {value.dtype}")
            if given.device != self.devices[index]:
                raise InputError(f"{at}: is on {given.device}, the graph is on {self.devices[index]}")
            wanted = [size if isinstance(size, int) else None for size in value.shape]
            if index in self.batched:
                wanted[0] = None
            fits = given.dim() == len(wanted) and all(
                w is None or w == g for w, g in zip(wanted, given.shape, strict=True)
            )
            if not fits:
                shape = ", ".join("any" if size is None else str(size) for size in wanted)
                raise InputError(f"{at}: has shape {list(given.shape)}, the graph takes [{shape}]")
            if given.is_floating_point() and not bool(torch.isfinite(given).all()):
                raise InputError(f"{at}: holds values that are not finite")
        sizes = {call[index].shape[0] for index in self.batched}
        if len(sizes) > 1:
            raise InputError(f"{where}: its batch sizes differ: {sorted(sizes)}")
        if sizes == {0}:
            raise InputError(f"{where}: is an empty batch")

    def pieces(self, call: Call, room: int) -> Iterator[tuple[Call, int]]:
        """The call cut to ``room`` samples, in pieces of the captured batch size; each with its size."""
        size = min(self.size(call), room)
        step = self.captured or size
        for start in range(0, size - step + 1, step):
            yield (
                tuple(
                    tensor.detach().narrow(0, start, step) if index in self.batched else tensor.detach()
                    for index, tensor in enumerate(call)
                ),
                step,
            )


class Replayed:
    """An iterable that was given once, read as it is asked for and kept, so that several passes can read it.

    >>> numbers = Replayed(iter(range(10**9)))
    >>> [n for n, _ in zip(numbers, range(3))], next(iter(numbers))
    ([0, 1, 2], 0)
    """

    def __init__(self, source: Iterator[Any]):
        self._source, self._kept = source, list[Any]()

    def __iter__(self) -> Iterator[Any]:
        place = 0
        while True:
            if place == len(self._kept):
                try:
                    self._kept.append(next(self._source))
                except StopIteration:
                    return
            yield self._kept[place]
            place += 1


def replayed(calibration: Any) -> Any:
    """``calibration`` itself if it can be read again and again, else :class:`Replayed`."""
    return Replayed(calibration) if isinstance(calibration, Iterator) else calibration
