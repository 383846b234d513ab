"""Scaled dot-product attention: heads and head width are axes, positions in the sequence are not.

``softmax(Q Kᵀ · scale) V`` with ``Q […, H, L, E]``, ``K […, H, S, E]``, ``V […, H, S, Ev]``. The scale
defaults to ``E^-0.5``, so it is written down before E changes. With ``enable_gqa`` the query's heads are
``Product(key/value heads, repeats)``.
"""

from __future__ import annotations

import torch
from torch import fx

from ..terms import Term, product
from ..typing import Kept, Typed, Typing, rule
from .elementwise import broadcast

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention.default)
def attention(t: Typing, node: fx.Node) -> Typed:
    """``[…, H, L, Ev]``."""
    query, key, value = (t.of(a) for a in node.args[:3])
    width = query[-1]
    t.same(width, key[-1], node)
    t.same(key[-2], value[-2], node)
    t.statistical(key[-2], "a softmax runs over it", node)
    t.freeze(query[-2], "positions of a sequence", node)
    t.freeze(key[-2], "positions of a sequence", node)
    if node.kwargs.get("enable_gqa") and query[-3].size != key[-3].size:
        repeats = t.fresh(query[-3].size // key[-3].size, node)
        t.same(query[-3], product(key[-3], repeats), node)
        t.same(key[-3], value[-3], node)
        batch = broadcast(t, node, [query[:-2], (*key[:-3], query[-3]), (*value[:-3], query[-3])])
    else:
        batch = broadcast(t, node, [query[:-2], key[:-2], value[:-2]])
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if mask is not None:
        broadcast(t, node, [(*batch, query[-2], key[-2]), t.of(mask)])
    if node.kwargs.get("scale") is None:
        t.derive(node, lambda copy, kept: _write_scale(copy, kept, width))
    return (*batch, query[-2], value[-1])


def _write_scale(copy: fx.Node, kept: Kept, width: Term) -> None:
    if kept(width) != width.size:
        copy.update_kwarg("scale", width.size**-0.5)
