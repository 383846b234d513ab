"""Reading and writing an operator's arguments by their name in its schema.

>>> import torch, graphprune
>>> class Down(torch.nn.Module):
...     def forward(self, x):
...         return torch.nn.functional.avg_pool2d(x, 2)
>>> pool = next(n for n in graphprune.trace(Down(), torch.zeros(1, 1, 4, 4)).nodes if n.op == "call_function")
>>> argument(pool, "kernel_size"), argument(pool, "ceil_mode")
([2, 2], False)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

TRANSPOSED = frozenset({
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
})  # fmt: skip
CONVOLUTIONS = TRANSPOSED | {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
    aten.conv2d.padding, aten.conv3d.padding, aten.convolution.default,
}  # fmt: skip
PRODUCTS = frozenset({aten.mm.default, aten.matmul.default, aten.addmm.default})
LINEAR = CONVOLUTIONS | PRODUCTS | {aten.linear.default}  # those that a weight takes part in

_LIKE_FIRST = frozenset({
    aten.sym_size.int, aten.sym_numel.default, aten.zeros_like.default, aten.ones_like.default,
    aten.full_like.default, aten.empty_like.default, aten.new_zeros.default, aten.new_ones.default,
    aten.new_full.default, aten.new_empty.default,
})  # fmt: skip
_LIKE_SECOND = frozenset({
    aten.reshape_as.default, aten.view_as.default, aten.expand_as.default, aten.type_as.default,
    aten.to.other,
})  # fmt: skip


def argument(node: fx.Node, name: str) -> Any:
    """The argument called ``name`` in the operator's schema, its default when it was not given.

    Raises:
        KeyError: the operator has no such argument.
    """
    if name in node.kwargs:
        return node.kwargs[name]
    for index, entry in enumerate(_schema(node).arguments):
        if entry.name == name:
            if index < len(node.args) and not entry.kwarg_only:
                return node.args[index]
            return entry.default_value
    raise KeyError(f"{node.target} has no argument {name!r}")


def has_argument(node: fx.Node, name: str) -> bool:
    """Whether the operator's schema has an argument called ``name``."""
    return any(entry.name == name for entry in _schema(node).arguments)


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Give the argument called ``name`` a value; arguments before it get their defaults written out."""
    entries = _schema(node).arguments
    index = next(i for i, entry in enumerate(entries) if entry.name == name)
    if name in node.kwargs or entries[index].kwarg_only:
        node.kwargs = {**node.kwargs, name: value}
        return
    filled = [*node.args, *(entry.default_value for entry in entries[len(node.args) : index])]
    node.args = (*filled[:index], value, *node.args[index + 1 :])


def spread_out(value: Any, rank: int) -> tuple[Any, ...]:
    """One entry an axis, from a single one, a list of one or of ``rank``; an empty list stays empty."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * rank if len(values) == 1 else values


def is_transposed(node: fx.Node) -> bool:
    """Whether a convolution is a transposed one."""
    return node.target in TRANSPOSED or (
        has_argument(node, "transposed") and bool(argument(node, "transposed"))
    )


def uses(node: fx.Node, reader: fx.Node | None = None) -> int:
    """How often the value is read, by all or by one reader: ``x + x`` reads ``x`` twice.

    Readers that look at its shape alone do not count.
    """
    count = 0

    def visit(other: fx.Node) -> fx.Node:
        nonlocal count
        count += other is node
        return other

    for user in node.users if reader is None else [reader]:
        if not reads_shape_only(user, node):
            fx.map_arg((user.args, user.kwargs), visit)
    return count


def reads_shape_only(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` depends on the shape, dtype and device of ``node``, but not on its values."""
    if user.target in _LIKE_FIRST:
        return user.args[0] is node
    return user.target in _LIKE_SECOND and user.args[0] is not node


def depends_on_input(node: fx.Node) -> bool:
    """Whether anything the caller passes goes into the value."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if current.op == "placeholder":
            return True
        fresh = [source for source in current.all_input_nodes if source not in seen]
        seen.update(fresh)
        stack += fresh
    return False


def sizes(node: fx.Node) -> tuple[Any, ...]:
    """The value's shape, symbolic sizes as sympy expressions: comparing them adds no guard."""
    return tuple(s if isinstance(s, int) else s.node.expr for s in node.meta["val"].shape)


def same_layout(left: fx.Node, right: fx.Node) -> bool:
    """Whether two values agree in shape, strides, dtype and device."""
    a, b = left.meta.get("val"), right.meta.get("val")
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    if a.dtype != b.dtype or a.device != b.device or sizes(left) != sizes(right):
        return False
    return [str(s) for s in a.stride()] == [str(s) for s in b.stride()]


def _schema(node: fx.Node) -> Any:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        raise KeyError(f"{target} is not an ATen operator")
    return target._schema
