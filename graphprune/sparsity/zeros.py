"""What zeros in weights are worth where a runtime multiplies with them as with any other number: size alone.

Measured on a linear layer of 1,024 inputs and 4,096 outputs (``benchmarks/results/sparsity.md``): a sparse
format breaks even with the dense product between 90 and 95 % zeros for one input, at 80 % for 32 at once, and
with as many rows removed the layer is 4 to 11 times as fast as in the sparse format.

>>> import torch, graphprune
>>> layer = torch.nn.Linear(4, 2)
>>> with torch.no_grad():
...     _ = layer.weight[:, 1:].zero_()
>>> dense_zeros(graphprune.trace(layer, torch.zeros(1, 4)), "onnxruntime").split(";")[0]
'75% of the weights of weight are zero'
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from ..graph import Graph
from ..operands import LINEAR

aten = torch.ops.aten

MANY = 1 / 3  # rounding to 8 bits leaves some percent by itself
FOUR_BITS = 8  # no integer is larger: rounding alone may leave half of them zero
_SAME_VALUES = frozenset({
    aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default, aten.reshape.default,
})  # fmt: skip


def dense_zeros(graph: Graph, backend: str) -> str:
    """One line about the weights of ``graph`` that are zero for a third or more; empty where none is.

    Time is linear in the parameters.
    """
    zeros = whole = 0
    names: dict[str, None] = {}
    for name, nonzero in _weights(graph):
        gone = nonzero.numel() - int(nonzero.sum())
        if name not in names and gone >= MANY * nonzero.numel():
            names[name] = None
            zeros, whole = zeros + gone, whole + nonzero.numel()
    if not names:
        return ""
    where = next(iter(names)) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    return (
        f"{zeros / whole:.0%} of the weights of {where} are zero; {backend} multiplies with zeros as with "
        "any other number, so they buy size only, in a compressed artifact (compress='zstd'); "
        "remove-dead-channels takes out channels that are zero as a whole, which buys time"
    )


def empty_by_masks(graph: Graph) -> bool:
    """Whether a mask leaves an output or input of a weight without any entry: a channel that may go."""
    return not all(
        bool(nonzero.transpose(0, dim).flatten(1).any(1).all())
        for _, nonzero in _weights(graph, masked=True)
        for dim in (0, 1)
    )


def _weights(graph: Graph, masked: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The parameter behind every constant operand of a product, or a masked one, and where it is not zero."""
    sources = dict.fromkeys(source for node in graph.find(*LINEAR) for source in node.all_input_nodes)
    for source in sources:
        found = _nonzero(graph, source) if not masked or source.target is aten.mul.Tensor else None
        if found is not None and found[1].ndim > 1:
            yield found


def _nonzero(graph: Graph, node: fx.Node) -> tuple[str, Tensor] | None:
    """The name of the parameter behind a constant operand, and where that operand is not zero."""
    if node.op == "get_attr":
        value = graph.constant(node)
        if value is None or value.is_meta or not value.numel():
            return None
        if not value.is_floating_point() and int(value.abs().max()) <= FOUR_BITS:
            return None
        return str(node.target).removesuffix("_integers"), value != 0
    if node.target in _SAME_VALUES or "dequantize" in str(node.target):
        return _nonzero(graph, node.all_input_nodes[0]) if node.all_input_nodes else None
    if node.target is aten.mul.Tensor and len(node.all_input_nodes) == 2:
        one, other = (_nonzero(graph, source) for source in node.all_input_nodes)
        if one is not None and other is not None and one[1].shape == other[1].shape:
            return one[0], one[1] & other[1]
    return None
