"""What an operator is, in one word: how targets and reports name operators, whatever ATen calls them.

>>> import torch, graphprune
>>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU6())
>>> graph = graphprune.trace(net, torch.zeros(1, 1, 4, 4))
>>> [kind(node) for node in graph.nodes if node.op == "call_function"]
['convolution', 'clamp']
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .operands import CONVOLUTIONS, argument, has_argument, is_transposed

aten = torch.ops.aten

_KINDS: dict[Any, str] = {
    aten.linear.default: "linear",
    aten.addmm.default: "linear",
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default), "matmul"),
    aten.scaled_dot_product_attention.default: "attention",
    **dict.fromkeys((aten.lstm.input, aten.gru.input), "recurrent"),
    aten.embedding.default: "embedding",
    aten.add.Tensor: "add",
    aten.mul.Tensor: "mul",
    aten.relu.default: "relu",
    **dict.fromkeys(
        (aten.hardtanh.default, aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default), "clamp"
    ),
    aten.relu6.default: "clamp",
    aten.leaky_relu.default: "leaky-relu",
    aten.sigmoid.default: "sigmoid",
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
    aten.tanh.default: "tanh",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.softmax.int: "softmax",
    aten.layer_norm.default: "layer-norm",
    aten.group_norm.default: "group-norm",
    aten.batch_norm.default: "batch-norm",
    **dict.fromkeys((aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default), "max-pool"),
    **dict.fromkeys((aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default), "average-pool"),
    aten.cat.default: "concat",
    **dict.fromkeys((
        aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
        aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default,
    ), "reshape"),
    **dict.fromkeys((aten.transpose.int, aten.permute.default), "transpose"),
    **dict.fromkeys((aten.slice.Tensor, aten.select.int), "slice"),
    **dict.fromkeys((aten.contiguous.default, aten.clone.default), "copy"),
    **dict.fromkeys((aten.expand.default, aten.repeat.default), "expand"),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), "pad"),
    **dict.fromkeys((aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default), "upsample-nearest"),
}  # fmt: skip


def kind(node: fx.Node) -> str:
    """The operator's kind; the ATen name without its overload for those without a word of their own."""
    if node.op != "call_function":
        return node.op
    if node.target in CONVOLUTIONS:
        return "transposed-convolution" if is_transposed(node) else "convolution"
    if node.target is aten.mean.dim and _over_space(node):
        return "average-pool"
    found = _KINDS.get(node.target)
    if found == "mul" and factor(node) is not None:
        return "rescale"
    if found == "clamp" and not all(isinstance(v, (int, float, type(None))) for v in clamp_range(node)):
        return "clamp-by-tensor"
    if found == "pad" and not _with_zeros(node):
        return "pad-with-values"
    return found or str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def factor(node: fx.Node) -> float | None:
    """What a product multiplies with where that is one positive number; else ``None``."""
    other = node.args[1] if len(node.args) > 1 else None
    if node.target is aten.mul.Tensor and isinstance(other, (int, float)) and other > 0:
        return float(other)
    return None


def clamp_range(node: fx.Node) -> tuple[Any, Any]:
    """The lower and upper bound of a clamp, ``None`` where there is none."""
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    if node.target is aten.relu.default:
        return 0.0, None
    names = ("min_val", "max_val") if has_argument(node, "min_val") else ("min", "max")
    low, high = (argument(node, name) if has_argument(node, name) else None for name in names)
    return low, high


def _over_space(node: fx.Node) -> bool:
    # What it reads may just have been inserted, and not be typed yet.
    dims = argument(node, "dim")
    if not isinstance(dims, (list, tuple)):
        return False
    rank = node.meta["val"].dim() + (0 if argument(node, "keepdim") else len(dims))
    return rank == 4 and {d % 4 for d in dims} == {2, 3}


def _with_zeros(node: fx.Node) -> bool:
    mode = argument(node, "mode") if has_argument(node, "mode") else "constant"
    return mode == "constant" and not argument(node, "value")
