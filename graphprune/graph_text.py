"""Graphs in words: one line a node, types like ``f32[1, 3]``, operators by their short names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

_SHORT_DTYPE = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.bool: "bool", torch.complex64: "c64",
}  # fmt: skip


def node_line(node: Node) -> str:
    """``relu: f32[1, 2] = relu(linear)``; parameters and buffers stand as ``%name``."""
    if node.op == "placeholder":
        return f"{node.name}: {type_text(node.meta['val'])}"
    if node.op == "output":
        return f"return {argument_text(node.args[0])}"
    arguments = [argument_text(a) for a in node.args]
    arguments += [f"{k}={argument_text(v)}" for k, v in node.kwargs.items()]
    call = f"{operator_name(node)}({', '.join(arguments)})"
    return f"{node.name}: {type_text(node.meta.get('val'))} = {call}"


def operator_name(node: Node) -> str:
    """``conv2d`` for ``aten.conv2d.default``; the overload and foreign namespaces stay visible."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(target).removeprefix("aten.").removesuffix(".default")
        return name
    return getattr(target, "__name__", str(target))


def source_line(node: Node) -> str | None:
    """``file.py:12`` of the innermost frame outside torch itself that made this node, if recorded."""
    for line in reversed((node.meta.get("stack_trace") or "").splitlines()):
        line = line.strip()
        if line.startswith('File "') and "/torch/" not in line:
            path, rest = line.removeprefix('File "').split('"', 1)
            return f"{path}:{rest.split('line ')[1].split(',')[0]}"
    return None


def type_text(value: Any) -> str:
    """``f32[1, 3]`` for a tensor; the Python type's name for anything else."""
    if isinstance(value, torch.Tensor):
        return f"{_SHORT_DTYPE.get(value.dtype, str(value.dtype))}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(type_text(v) for v in value)})"
    return type(value).__name__


def argument_text(argument: Any) -> str:
    """An operator's argument: a node by its name, a tensor by ``%name``, anything else as Python has it."""
    if isinstance(argument, Node):
        return f"%{argument.target}" if argument.op == "get_attr" else argument.name
    if isinstance(argument, tuple):
        return f"({', '.join(map(argument_text, argument))}{',' if len(argument) == 1 else ''})"
    if isinstance(argument, list):
        return f"[{', '.join(map(argument_text, argument))}]"
    if isinstance(argument, Mapping):
        return f"{{{', '.join(f'{k}: {argument_text(v)}' for k, v in argument.items())}}}"
    return str(argument)
