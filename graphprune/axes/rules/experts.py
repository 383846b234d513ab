"""Mixtures of experts: rows sorted by expert, each block times its own matrix.

``x [S, K] · W [E, K, N] → [S, N]``, where ``offsets [E]`` say at which row each expert's block ends. Widths
are axes; experts and rows keep their positions, because the router names experts by theirs.
"""

from __future__ import annotations

from torch import fx

from ..typing import Typed, Typing, named_rule


@named_rule("transformers::grouped_mm_fallback")
def grouped_product(t: Typing, node: fx.Node) -> Typed:
    """Rows times the matrix of their expert."""
    x, weight, offsets = (t.of(argument) for argument in node.args)
    t.freeze((x[0], weight[0], *offsets), "experts are named by their positions", node)
    t.same(x[1], weight[1], node)
    return (x[0], weight[2])
