"""Convolutions: channels are axes, kernels and extents are not.

A grouped convolution reads ``Product(groups, in/groups)`` and writes ``Product(groups, out/groups)``; a
depthwise one has ``in/groups = 1``, so that its groups *are* the channels.
"""

from __future__ import annotations

import torch
from torch import fx

from ..terms import Reason, Term, product
from ..typing import Dims, Typed, Typing, aten_operators, rule

aten = torch.ops.aten
SPATIAL = Reason("spatial extent")


@rule(*aten_operators("conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding"))
def convolution(t: Typing, node: fx.Node) -> Typed:
    """``x [N, C, …] * W [O, C/g, …] + b [O]``."""
    x, weight = t.of(node.args[0]), t.of(node.args[1])
    groups = node.args[6] if len(node.args) > 6 else 1
    at = len(x) - len(weight) + 1
    windows(t, node, x[at + 1 :])
    t.freeze(weight[2:], "kernel extent", node)
    if groups == 1:
        t.same(x[at], weight[1], node)
    else:
        _grouped(t, node, 6, x[at], weight[0], weight[1])
    bias(t, node, weight[0])
    return _result(t, node, x, at, weight[0])


@rule(*aten_operators("conv_transpose1d conv_transpose2d.input conv_transpose3d.input"))
def transposed_convolution(t: Typing, node: fx.Node) -> Typed:
    """``x [N, C, …] *ᵀ W [C, O/g, …] + b [O]``."""
    x, weight = t.of(node.args[0]), t.of(node.args[1])
    groups: int = node.args[6] if len(node.args) > 6 else 1
    at = len(x) - len(weight) + 1
    windows(t, node, x[at + 1 :])
    t.freeze(weight[2:], "kernel extent", node)
    out = weight[1]
    t.same(x[at], weight[0], node)
    if groups != 1:
        group, _ = t.regroup(node, [weight[0]], [groups, weight[0].size // groups])
        t.derive_argument(node, 6, group)
        out = product(group, out)
    bias(t, node, out)
    return _result(t, node, x, at, out)


def _grouped(t: Typing, node: fx.Node, index: int, channels: Term, out: Term, within: Term) -> None:
    groups: int = node.args[index]
    group, inner = t.regroup(node, [channels], [groups, channels.size // groups])
    other, _ = t.regroup(node, [out], [groups, out.size // groups])
    t.same(group, other, node)
    t.same(inner, within, node)
    t.derive_argument(node, index, group)


def windows(t: Typing, node: fx.Node, extents: Dims) -> None:
    """Dimensions that a window slides over keep every position."""
    for term in extents:
        if getattr(term, "frozen", None) is None and term.size != 1:
            t.freeze(term, "a window slides over it", node)


def bias(t: Typing, node: fx.Node, out: Term) -> None:
    """The bias, where there is one, has the result's channels."""
    if len(node.args) > 2 and node.args[2] is not None:
        t.same(t.of(node.args[2])[0], out, node)


def _result(t: Typing, node: fx.Node, x: Dims, at: int, out: Term) -> Dims:
    shape = t.shape(node)
    return (*x[:at], out, *[t.fixed(s, SPATIAL) for s in shape[at + 1 :]])
