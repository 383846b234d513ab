"""Normalisations and softmax: an axis that a statistic runs over is *statistical*.

Batch and instance normalisation keep channels apart (exact); layer and RMS normalisation mix them;
group normalisation reads channels as ``Product(groups, per group)``: groups are exact, what is inside
one is statistical. Batch statistics (``training=True``, as in weight standardisation) run over every
dimension but the channels.
"""

from __future__ import annotations

import torch
from torch import fx

from ..typing import Typed, Typing, aten_operators, rule

aten = torch.ops.aten


def _affine(t: Typing, node: fx.Node, term: object, indices: tuple[int, ...]) -> None:
    for index in indices:
        if len(node.args) > index and node.args[index].__class__ is fx.Node:
            t.same(t.of(node.args[index])[0], term, node)


@rule(aten.batch_norm.default)
def batch_norm(t: Typing, node: fx.Node) -> Typed:
    """``x [N, C, …]``; weight, bias and running statistics ``[C]``."""
    x = t.of(node.args[0])
    _affine(t, node, x[1], (1, 2, 3, 4))
    if node.args[5] or node.args[3] is None:
        t.statistical((x[0], *x[2:]), "batch statistics run over it", node)
    return x


@rule(aten.instance_norm.default)
def instance_norm(t: Typing, node: fx.Node) -> Typed:
    """``x [N, C, …]``; statistics over everything but N and C."""
    x = t.of(node.args[0])
    _affine(t, node, x[1], (1, 2, 3, 4))
    t.statistical(x[2:], "instance statistics run over it", node)
    return x


@rule(aten.group_norm.default)
def group_norm(t: Typing, node: fx.Node) -> Typed:
    """``x [N, Product(groups, C/groups), …]``; ``num_groups`` follows."""
    x = t.of(node.args[0])
    groups: int = node.args[1]
    group, inner = t.regroup(node, [x[1]], [groups, x[1].size // groups])
    t.statistical(inner, "group statistics run over it", node)
    t.derive_argument(node, 1, group)
    t.statistical(x[2:], "group statistics run over it", node)
    _affine(t, node, x[1], (2, 3))
    return x


@rule(*aten_operators("layer_norm rms_norm"))
def layer_norm(t: Typing, node: fx.Node) -> Typed:
    """``x […, *shape]`` with weight and bias of that shape; ``normalized_shape`` follows."""
    x = t.of(node.args[0])
    normalized = x[len(x) - len(node.args[1]) :]
    t.statistical(normalized, "layer statistics run over it", node)
    for index in (2, 3):
        if len(node.args) > index and node.args[index].__class__ is fx.Node:
            for ours, theirs in zip(normalized, t.of(node.args[index]), strict=True):
                t.same(ours, theirs, node)
    t.derive_sizes(node, 1, normalized)
    return x


@rule(*aten_operators("softmax.int log_softmax.int _softmax _log_softmax special_softmax softmin"))
def softmax(t: Typing, node: fx.Node) -> Typed:
    """Positions share one sum."""
    x = t.of(node.args[0])
    if x:
        t.statistical(x[node.args[1]], "a softmax runs over it", node)
    return x


@rule(aten._weight_norm.default)
def weight_norm(t: Typing, node: fx.Node) -> Typed:
    """``g · v / ‖v‖`` with the norm over every dimension but ``dim``: a sum of squares, which is exact."""
    v, g = t.of(node.args[0]), t.of(node.args[1])
    dim: int = node.args[2] if len(node.args) > 2 else 0
    for place, (ours, theirs) in enumerate(zip(v, g, strict=False)):
        if place == dim % len(v):
            t.same(ours, theirs, node)
    return v


@rule(aten.local_response_norm.default) if hasattr(aten, "local_response_norm") else (lambda f: f)
def local_response_norm(t: Typing, node: fx.Node) -> Typed:
    """A window slides over the channels."""
    x = t.of(node.args[0])
    t.freeze(x[1], "a window slides over it", node)
    return x
