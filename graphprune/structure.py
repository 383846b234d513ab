"""Nested arguments and results as plain JSON, so that an artifact knows its caller without pickling.

A structure is a JSON value with exactly one of these forms, ``...`` being structures again:

* ``{"slot": 2}``: flat tensor (or flat output) number 2;
* ``{"value": null}``, ``{"float": "inf"}``, ``{"dtype": "float32"}``: a constant fixed at capture;
* ``{"opaque": "Config()"}``: a fixed constant that JSON cannot hold; a caller leaves its argument out;
* ``{"tuple": [...]}``, ``{"list": [...]}``, ``{"dict": [[key, ...], ...]}``;
* ``{"namedtuple": "Pair", "fields": [[name, ...], ...]}``;
* ``{"record": "ModelOutput", "fields": [[name, ...], ...]}``: any other container, rebuilt as a
  :class:`Record`.

>>> structure = of_value({"x": Slot(0), "flags": (Slot(1), None)})
>>> structure
{'dict': [['x', {'slot': 0}], ['flags', {'tuple': [{'slot': 1}, {'value': None}]}]]}
>>> names(structure, "arg")
{0: 'x', 1: 'flags.0'}
>>> build(structure, ["a", "b"])
{'x': 'a', 'flags': ('b', None)}
"""

from __future__ import annotations

import math
import operator
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .errors import InputError
from .signature import Slot

Structure = dict[str, Any]


class Record(dict[str, Any]):
    """A mapping whose fields are attributes too, and that counts them: ``r["a"]``, ``r.a``, ``r[0]``."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return dict.__getitem__(self, name)
        raise AttributeError(f"no field {name!r}; there are {', '.join(map(repr, self))}")

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, (int, slice)) else dict.__getitem__(self, key)


def of_value(value: Any) -> Structure:
    """The structure of a nested value whose leaves are :class:`~graphprune.signature.Slot` or constants."""
    leaves, spec = pytree.tree_flatten(value)
    return of_spec(spec, leaves)


def of_spec(spec: pytree.TreeSpec, leaves: Sequence[Any] | None = None) -> Structure:
    """The structure of a pytree specification; without ``leaves``, leaf ``i`` is slot ``i``."""
    return _describe(spec, iter([Slot(i) for i in range(spec.num_leaves)] if leaves is None else leaves))


def _describe(spec: pytree.TreeSpec, leaves: Iterator[Any]) -> Structure:
    if spec.is_leaf():
        return _leaf(next(leaves))
    children = [_describe(child, leaves) for child in spec.children()]
    if spec.type in (tuple, list):
        return {spec.type.__name__: children}
    keys = _keys(spec, len(children))
    fields = [[key, child] for key, child in zip(keys, children, strict=True)]
    if isinstance(spec.type, type) and spec.type.__module__ in ("builtins", "collections"):
        return {"dict": fields} if keys is not None and issubclass(spec.type, dict) else {"list": children}
    if isinstance(spec.context, type) and issubclass(spec.context, tuple):
        return {"namedtuple": spec.context.__name__, "fields": fields}
    return {"record": spec.type.__name__, "fields": [[str(key), child] for key, child in fields]}


def _keys(spec: pytree.TreeSpec, count: int) -> list[Any]:
    """Field names from a pytree context: a list of keys, a list within a list, or a namedtuple class."""
    context = spec.context
    if isinstance(context, type):
        return list(getattr(context, "_fields", range(count)))
    for candidate in (context, *(context if isinstance(context, (list, tuple)) else ())):
        if not isinstance(candidate, (list, tuple)) or len(candidate) != count:
            continue
        if all(isinstance(key, (str, int, float, bool, type(None))) for key in candidate):
            return list(candidate)
    return [str(i) for i in range(count)]


def _leaf(leaf: Any) -> Structure:
    if isinstance(leaf, Slot):
        return {"slot": leaf.index}
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return {"float": str(leaf)}
    if leaf is None or type(leaf) in (bool, int, float, str):
        return {"value": leaf}
    if isinstance(leaf, torch.dtype):
        return {"dtype": str(leaf).removeprefix("torch.")}
    return {"opaque": repr(leaf)}


def constant(structure: Structure) -> Any:
    """The value of a constant leaf."""
    if "float" in structure:
        return float(structure["float"])
    if "dtype" in structure:
        return getattr(torch, structure["dtype"])
    return structure.get("value")


def children(structure: Structure) -> list[tuple[Any, Structure]]:
    """The parts of a container with the key, field or index each stands under; none for a leaf."""
    for kind in ("tuple", "list"):
        if kind in structure:
            return list(enumerate(structure[kind]))
    pairs = structure["dict"] if "dict" in structure else structure.get("fields", ())
    return [(key, child) for key, child in pairs]


def slots(structure: Structure) -> Iterator[int]:
    """Every slot's number, in order."""
    if "slot" in structure:
        yield structure["slot"]
    for _, child in children(structure):
        yield from slots(child)


def names(structure: Structure, root: str) -> dict[int, str]:
    """Slot number → a name from its path: ``logits``, ``hidden.0``; parts of a bare tuple get ``root_0``."""
    if "slot" in structure:
        return {structure["slot"]: root}
    found: dict[int, str] = {}
    for key, child in children(structure):
        prefix = key if isinstance(key, str) and key else f"{root}_{key}"
        for index, path in _paths(child):
            found[index] = ".".join([prefix, *path])
    return found


def _paths(structure: Structure) -> Iterator[tuple[int, tuple[str, ...]]]:
    if "slot" in structure:
        yield structure["slot"], ()
    for key, child in children(structure):
        for index, path in _paths(child):
            yield index, (str(key), *path)


def build(structure: Structure, leaves: Sequence[Any]) -> Any:
    """The nested value with ``leaves[i]`` in slot ``i``."""
    if "slot" in structure:
        return leaves[structure["slot"]]
    parts = [(key, build(child, leaves)) for key, child in children(structure)]
    if "tuple" in structure:
        return tuple(value for _, value in parts)
    if "list" in structure:
        return [value for _, value in parts]
    if "dict" in structure:
        return dict(parts)
    if "namedtuple" in structure:
        rebuilt = namedtuple(structure["namedtuple"], [key for key, _ in parts])  # type: ignore[misc]
        return rebuilt(*(value for _, value in parts))
    return Record(parts) if "record" in structure else constant(structure)


def collect(structure: Structure, value: Any, where: str, found: dict[int, torch.Tensor]) -> None:
    """Put the tensors of a caller's ``value`` into ``found`` by slot number.

    Raises:
        InputError: the value has another structure, or differs from a constant fixed at capture.
    """
    if "slot" in structure:
        if not isinstance(value, torch.Tensor):
            raise InputError(f"argument {where} must be a tensor, got {type(value).__name__}")
        found[structure["slot"]] = value
        return
    parts = children(structure)
    kind = next(iter(structure))
    if kind in ("tuple", "list", "namedtuple"):
        expected = list if kind == "list" else tuple
        if not isinstance(value, expected) or len(value) != len(parts):
            got = f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else repr(value)
            raise InputError(f"argument {where} must be a {expected.__name__} of {len(parts)}, got {got}")
        for (key, child), part in zip(parts, value, strict=True):
            collect(child, part, f"{where}.{key}", found)
    elif kind in ("dict", "record"):
        read = operator.getitem if isinstance(value, Mapping) else getattr
        for key, child in parts:
            try:
                part = read(value, key)
            except (KeyError, AttributeError, TypeError) as error:
                raise InputError(f"argument {where} has no {key!r}, got {type(value).__name__}") from error
            collect(child, part, f"{where}.{key}", found)
        extra = [k for k in value if k not in dict(parts)] if isinstance(value, Mapping) else []
        if extra:
            raise InputError(f"argument {where} has keys the artifact does not take: {extra}")
    elif kind == "opaque":
        if value is not None:
            raise InputError(f"argument {where} was fixed to {structure[kind]} at capture; leave it out")
    elif value is not None and value != constant(structure):
        raise InputError(
            f"argument {where} was fixed to {constant(structure)!r} at capture and cannot be {value!r}; "
            "build another artifact with that value"
        )


def problem(structure: Any, where: str) -> str | None:
    """What is wrong with a structure that was read from a file, or ``None``."""
    if not isinstance(structure, dict):
        return f"{where} is not an object"
    kinds = {k for k in structure if k != "fields"}
    if len(kinds) != 1:
        return f"{where} must have one form, has {sorted(map(str, structure))}"
    kind = next(iter(kinds))
    content = structure[kind]
    if kind in ("tuple", "list"):
        parts = list(enumerate(content)) if isinstance(content, list) else None
    elif kind in ("dict", "namedtuple", "record"):
        pairs = content if kind == "dict" else structure.get("fields")
        parts = None
        if isinstance(pairs, list) and all(isinstance(p, list) and len(p) == 2 for p in pairs):
            parts = [(p[0], p[1]) for p in pairs]
        if parts is not None and not all(_fits(kind, key) for key, _ in parts):
            return f"{where} has a key that cannot be one"
        if kind != "dict" and not (isinstance(content, str) and content.isidentifier()):
            return f"{where} has no usable type name"
        if parts is not None and len({key for key, _ in parts}) != len(parts):
            return f"{where} has a key twice"
    else:
        return None if _is_leaf(kind, content) and "fields" not in structure else f"{where} is no known form"
    if parts is None:
        return f"{where} has no list of parts"
    return next((p for key, child in parts if (p := problem(child, f"{where}.{key}"))), None)


def _fits(kind: str, key: Any) -> bool:
    if kind == "dict":
        return key is None or isinstance(key, (str, int, float, bool))
    if not isinstance(key, str):
        return False
    return kind == "record" or (key.isidentifier() and not key.startswith("_"))


def _is_leaf(kind: str, content: Any) -> bool:
    if kind == "slot":
        return type(content) is int and content >= 0
    if kind == "value":
        return content is None or isinstance(content, (bool, int, float, str))
    if kind == "float":
        return content in ("inf", "-inf", "nan")
    if kind == "dtype":
        return isinstance(content, str) and isinstance(getattr(torch, content, None), torch.dtype)
    return kind == "opaque" and isinstance(content, str)
