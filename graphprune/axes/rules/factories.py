"""Tensors made from sizes: a constant fill follows its axes, anything with positions does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..terms import Reason
from ..typing import Typed, Typing, aten_operators, rule

aten = torch.ops.aten
_COUNTED = Reason("its values count positions")


@rule(*aten_operators("zeros ones full empty.memory_format new_zeros new_ones new_full new_empty"))
def filled(t: Typing, node: fx.Node) -> Typed:
    """One value everywhere: sizes become axes and follow."""
    name = node.target._schema.name
    index = 1 if "new_" in name else 0
    sizes: Any = node.args[index]
    result = tuple([t.fresh(s if isinstance(s, int) else s.meta["val"], node) for s in sizes])
    t.derive_sizes(node, index, result)
    return result


@rule(
    *aten_operators(
        """arange arange.start arange.start_step linspace eye eye.m scalar_tensor tril_indices
        triu_indices rand randn randint randint.low randperm hann_window"""
    )
)
def counted(t: Typing, node: fx.Node) -> Typed:
    """Values that depend on the position."""
    return t.fixed_like(node.meta["val"], _COUNTED)


@rule(*aten_operators("sym_size.int"))
def sym_size(t: Typing, node: fx.Node) -> Typed:
    """A size that enters arithmetic: the dimension keeps it."""
    t.freeze(t.of(node.args[0])[node.args[1]], "its size enters arithmetic", node)
    return None


def _numbers(t: Typing, node: fx.Node) -> Typed:
    """Arithmetic on sizes."""
    return None


def _register_numbers() -> None:
    import math
    import operator

    rule(operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod,
         operator.neg, operator.eq, operator.ge, operator.le, operator.gt, operator.lt, operator.pow,
         math.trunc, math.ceil, math.floor, torch.sym_int, torch.sym_float, torch.sym_max, torch.sym_min,
         torch.sym_not, torch.sym_ite)(_numbers)  # fmt: skip


_register_numbers()
