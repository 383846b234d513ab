"""A mean over all places of a feature map as ``GlobalAveragePool``.

The exporter writes it as ``ReduceMean``, which ONNX Runtime neither computes in integers nor in the blocked
layout of the convolutions before it.
"""

from __future__ import annotations

import onnx_ir as ir


def pool_globally(model: ir.Model) -> None:
    """Rewrite every ``ReduceMean`` over both places of ``[N, C, H, W]`` that keeps them, in branches, too."""
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.op_type != "ReduceMean" or node.domain or len(node.inputs) != 2 or node.graph is None:
            continue
        value, axes = node.inputs
        keeps = node.attributes.get("keepdims")
        if keeps is not None and keeps.as_int() != 1:
            continue
        if value is None or value.shape is None or len(value.shape) != 4 or axes is None:
            continue
        known = ir.convenience.get_const_tensor(axes)
        if known is None or {int(a) % 4 for a in known.numpy().flatten()} != {2, 3}:
            continue
        pool = ir.Node("", "GlobalAveragePool", [value], name=node.name)
        pool.outputs[0].shape, pool.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        pool.outputs[0].name = node.outputs[0].name
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], [pool], node.outputs, pool.outputs)
