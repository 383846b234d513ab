"""Attention of any rank as attention of rank 4, the only one the exporter translates.

``softmax(q kᵀ) v`` is independent over all dimensions before the last two: heads that are missing are added
with size 1, further batch dimensions are merged into one and parted again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphprune.graph import Graph

aten = torch.ops.aten


def four_dimensional(graph: Graph) -> None:
    """Rewrite, in place, every attention whose operands have another rank.

    Left as they are, for the exporter to name: those with several symbolic batch dimensions, and those of
    rank 5 and more with a mask that has batch dimensions of its own.
    """
    for node in list(graph.find(aten.scaled_dot_product_attention.default)):
        query: Any = node.args[0]
        mask: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        shape = query.meta["val"].shape
        own_batch = isinstance(mask, fx.Node) and mask.meta["val"].dim() > 2
        outer = [size if isinstance(size, int) else -1 for size in shape[:-3]]
        if len(shape) == 3:
            _around(graph, node, own_batch, aten.unsqueeze.default, (-3,), aten.squeeze.dim, (-3,))
        elif len(shape) > 4 and not own_batch and outer.count(-1) < 2:
            _around(graph, node, False, aten.flatten.using_ints, (0, len(outer) - 1), aten.unflatten.int,
                    (0, outer))  # fmt: skip


def _around(
    graph: Graph, node: fx.Node, with_mask: bool, before: Any, its: tuple[Any, ...], after: Any, back: Any
) -> None:
    """Apply ``before`` to the operands (and the mask) and ``after`` to the result."""
    count = 3 + (with_mask and len(node.args) > 3)
    with graph.fx.inserting_before(node):
        operands = [graph.fx.call_function(before, (operand, *its)) for operand in node.args[:count]]
        if with_mask and count == 3:
            mask = graph.fx.call_function(before, (node.kwargs["attn_mask"], *its))
            node.kwargs = {**node.kwargs, "attn_mask": mask}
    node.args = (*operands, *node.args[count:])
    with graph.fx.inserting_after(node):
        restored = graph.fx.call_function(after, (node, *back))
    node.replace_all_uses_with(restored, delete_user_cb=lambda user: user is not restored)
