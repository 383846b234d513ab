"""Constants that one branch of an ``If`` alone reads, moved into that branch.

The exporter keeps every constant in the main graph, and a branch reads it from outside. ONNX Runtime gives a
convolution its blocked layout only where the weight is a constant of the same graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir


def own_constants(model: ir.Model) -> None:
    """Change ``model`` in place; what two graphs read stays where both see it."""
    for graph in [model.graph, *model.functions.values()]:
        if isinstance(graph, ir.Graph):
            _own(graph)


def _own(graph: ir.Graph) -> None:
    readers = {value: {node for node, _ in value.uses()} for value in graph.initializers.values()}
    for inner in _branches(graph):
        inside = set(ir.traversal.RecursiveGraphIterator(inner))
        for value, nodes in readers.items():
            if nodes and nodes <= inside and value not in graph.outputs:
                graph.initializers.pop(str(value.name))
                inner.register_initializer(value)
        _own(inner)


def _branches(graph: ir.Graph) -> Iterator[ir.Graph]:
    """The graphs of the attributes of a graph's own nodes."""
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield attribute.as_graph()
