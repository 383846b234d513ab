"""How a caller's nested arguments become the flat tensors a graph runs on, and back.

Arguments that are not tensors (flags, ``None``, numbers) were fixed when the graph was captured;
a caller may leave them out or repeat the captured value, anything else is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .errors import InputError


@dataclass(frozen=True)
class Signature:
    """The calling convention of a captured model.

    Attributes:
        positional: parameter names of the positional arguments it was captured with, in order.
        arguments: name → captured value for every argument, with tensors replaced by ``Slot``.
        names: the name of each flat tensor input, in placeholder order.
        out_spec: the structure of the result.
    """

    positional: tuple[str, ...]
    arguments: Mapping[str, Any]
    names: tuple[str, ...]
    out_spec: pytree.TreeSpec

    @staticmethod
    def of(
        positional: Sequence[str],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        out_spec: pytree.TreeSpec,
    ) -> tuple[Signature, list[torch.Tensor]]:
        """The signature of a call, and the call's tensors in order.

        Args:
            positional: a name for each of ``args``.
            args, kwargs: the example call.
            out_spec: the structure of its result.
        """
        tensors: list[torch.Tensor] = []
        names: list[str] = []
        arguments: dict[str, Any] = {}
        for name, value in [*zip(positional, args, strict=True), *kwargs.items()]:
            leaves, spec = pytree.tree_flatten_with_path(value)
            marked: list[Any] = []
            for path, leaf in leaves:
                if isinstance(leaf, torch.Tensor):
                    names.append(name + "".join(_path_text(k) for k in path))
                    tensors.append(leaf)
                    leaf = Slot(len(names) - 1)
                marked.append(leaf)
            arguments[name] = pytree.tree_unflatten(marked, spec)
        return Signature(tuple(positional), arguments, tuple(names), out_spec), tensors

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The flat tensors of a call.

        Raises:
            InputError: an argument is missing, unknown, of another structure, or differs from the
                value that was fixed at capture.
        """
        order = list(self.arguments)
        if len(args) > len(order):
            raise InputError(f"{len(args)} positional arguments given, the graph takes {len(order)}: {order}")
        given = dict(zip(order, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise InputError(f"argument {name!r} given twice, by position and by name")
            if name not in self.arguments and value is not None:
                raise InputError(
                    f"the graph was captured without argument {name!r} (it takes {order}); "
                    "capture again with it among the example inputs"
                )
            given[name] = value
        flat: dict[int, torch.Tensor] = {}
        for name, template in self.arguments.items():
            wanted, spec = pytree.tree_flatten(template)
            if name not in given:
                if any(isinstance(w, Slot) for w in wanted):
                    raise InputError(f"missing argument {name!r}; the graph takes {order}")
                continue
            leaves, found = pytree.tree_flatten(given[name])
            if found != spec:
                raise InputError(f"argument {name!r} has structure {found}, captured was {spec}")
            for want, leaf in zip(wanted, leaves, strict=True):
                if isinstance(want, Slot):
                    if not isinstance(leaf, torch.Tensor):
                        raise InputError(f"argument {name!r} must be a tensor, got {type(leaf).__name__}")
                    flat[want.index] = leaf
                elif leaf is not None and leaf != want:
                    raise InputError(
                        f"argument {name!r} was fixed to {want!r} at capture and cannot be {leaf!r}; "
                        "capture again with that value"
                    )
        return [flat[i] for i in range(len(self.names))]

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The caller's result structure around flat outputs."""
        return pytree.tree_unflatten(list(outputs), self.out_spec)


@dataclass(frozen=True)
class Slot:
    """Stands in ``Signature.arguments`` where flat tensor number ``index`` belongs."""

    index: int


def _path_text(key: Any) -> str:
    if isinstance(key, pytree.SequenceKey):
        return f".{key.idx}"
    if isinstance(key, pytree.MappingKey):
        return f".{key.key}"
    return str(key)
