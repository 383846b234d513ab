"""What a run was started with, as text that is the same on another day and differs where the run would.

A function is its qualified name, an object its class: a ``repr`` with an address in it would make every run
another one, and so would the state of an object that counts. So two lambdas of one function are one, and
what a function does or an object holds may change unnoticed. Data are their number and the bits of the first
of them, an optimizer is its class, ``lr`` and the options that are not its defaults.

>>> described(torch.nn.functional.cross_entropy), described(torch.nn.HuberLoss(delta=0.5))
('functional.cross_entropy', "loss.HuberLoss(reduction='mean', delta=0.5)")
>>> optimizer(torch.optim.SGD([torch.zeros(1)], 0.1, momentum=0.9))
'sgd.SGD(lr=0.1, momentum=0.9)'
>>> batch([torch.zeros(8, 3)], torch.zeros(8, 3))
'1 in all, the first float32[8, 3] with SHA-256 3ab8975c48b739ab'
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

_PLAIN = (bool, int, float, str, bytes, type(None))
_PARAMETERS = ("params", "param_names", "initial_lr")  # of a group, and what a scheduler leaves in it


def described(value: Any) -> str:
    """A value as text, without what changes from one process to the next."""
    if isinstance(value, numpy.generic):
        value = value.item()
    if isinstance(value, torch.Tensor) and not value.dim():
        value = value.item()
    if type(value) in _PLAIN:
        return repr(value)
    if isinstance(value, (Enum, torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(described, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{described(k)}: {described(v)}' for k, v in value.items())}}}"
    if isinstance(value, (torch.Tensor, numpy.ndarray)):
        return f"{_shape(value)} with SHA-256 {_digest(value)}"
    if isinstance(value, partial):
        parts = [described(value.func), *map(described, value.args), *_named(value.keywords)]
        return f"partial({', '.join(parts)})"
    if inspect.ismethod(value):
        return f"{described(value.__self__)}.{value.__name__}"
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return _name(value)
    return f"{_name(type(value))}({', '.join(_named(_constants(value)))})"


def optimizer(value: torch.optim.Optimizer) -> str:
    """Class and options of an optimizer; of every parameter group, where they differ among them.

    What equals the class's default is left out but for ``lr``, so that an option a newer torch adds makes no
    other run.
    """
    known = inspect.signature(type(value)).parameters
    usual = {n: p.default for n, p in known.items() if p.default is not inspect.Parameter.empty and n != "lr"}
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        usual |= {n: option for n, option in value.defaults.items() if n not in known}  # the class set them
    groups = []
    for group in value.param_groups:
        given = {name: option for name, option in group.items() if name not in _PARAMETERS}
        changed = {n: v for n, v in given.items() if n not in usual or described(usual[n]) != described(v)}
        groups.append(", ".join(_named(changed)))
    same = groups if len(set(groups)) > 1 else groups[:1]
    return f"{_name(type(value))}({' | '.join(same)})"


def batch(data: Any, first: Any) -> str:
    """How many batches there are, where the data says so, and shapes and bits of the first."""
    try:
        count = f"{len(data)} in all, "
    except (TypeError, NotImplementedError):  # a stream
        count = ""
    shapes = ", ".join(_shape(leaf) for leaf in _leaves(first) if hasattr(leaf, "shape"))
    return f"{count}the first {shapes} with SHA-256 {_digest(first)}"


def _named(options: Mapping[str, Any]) -> list[str]:
    return [f"{name}={described(option)}" for name, option in options.items()]


def _name(value: Any) -> str:
    """``module.qualified_name``, with the module's own name alone.

    A script is ``__main__`` when it is run and has its file's name when it is imported, by whatever path;
    both are the same run.
    """
    module = str(getattr(value, "__module__", None) or "").rpartition(".")[2]
    if module == "__main__":
        script = getattr(inspect.unwrap(value), "__globals__", None) or vars(sys.modules["__main__"])
        module = Path(script.get("__file__") or module).stem
    return f"{module}.{value.__qualname__}" if module else str(value.__qualname__)


def _constants(value: Any) -> dict[str, Any]:
    """What an object was made with and keeps: a frozen dataclass's fields, a torch module's constants."""
    made_by = getattr(type(value), "__dataclass_params__", None)
    if made_by is not None and made_by.frozen:
        return {f.name: getattr(value, f.name) for f in fields(value) if f.repr}
    if isinstance(value, torch.nn.Module):
        names = getattr(type(value), "__constants__", ())
        return {name: getattr(value, name) for name in names if hasattr(value, name)}
    return {}


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for name, each in value.items() for leaf in (name, *_leaves(each))]
    if isinstance(value, (list, tuple)):
        return [leaf for each in value for leaf in _leaves(each)]
    return [value]


def _shape(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    for leaf in _leaves(value):
        array = leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf
        if isinstance(array, torch.Tensor) and array.layout == torch.strided:
            digest.update(_shape(array).encode())
            digest.update(array.resolve_conj().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(array, numpy.ndarray) and array.dtype != object:
            digest.update(_shape(array).encode() + array.tobytes())
        else:
            digest.update((repr(array) if type(array) in _PLAIN else _name(type(array))).encode())
    return digest.hexdigest()[:16]  # an error shows two of them
