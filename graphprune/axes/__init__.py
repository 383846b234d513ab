"""Axis types: every dimension of every tensor has one, and coupling is unification.

This is also where an operator of your own learns to prune. A rule reads the types of the operands,
says which dimensions are one and the same, and returns the type of the result; see :func:`rule`.

>>> import torch
>>> from graphprune.axes import rule
>>> @torch.library.custom_op("example::scaled_relu", mutates_args=())
... def scaled_relu(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
...     return x.relu() * scale
>>> @rule(torch.ops.example.scaled_relu.default)
... def scaled_relu_rule(t, node):
...     x, scale = t.of(node.args[0]), t.of(node.args[1])
...     t.same(x[-1], scale[0], node)               # one scale a channel, the last dimension
...     return x

Names load when they are first used: the algebra in :mod:`graphprune.axes.terms` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .axis import Axes, Axis, Member
    from .terms import Atom, Concat, Product, Reason, Term, concat, freeze, product
    from .typing import Dims, Kept, Typed, Typing, rule
    from .unification import Misfit, cut, regroup, unify

_HOMES = {
    "axis": ("Axes", "Axis", "Member"),
    "terms": ("Atom", "Concat", "Product", "Reason", "Term", "concat", "freeze", "product"),
    "typing": ("Dims", "Kept", "Typed", "Typing", "rule"),
    "unification": ("Misfit", "cut", "regroup", "unify"),
}

__all__ = [
    "Atom",
    "Axes",
    "Axis",
    "Concat",
    "Dims",
    "Kept",
    "Member",
    "Misfit",
    "Product",
    "Reason",
    "Term",
    "Typed",
    "Typing",
    "concat",
    "cut",
    "freeze",
    "product",
    "regroup",
    "rule",
    "unify",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f".{module}", __name__), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
