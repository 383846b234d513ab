"""What an operator of an ONNX file computes in, and how much: its multiply-accumulates from shapes.

Shapes are those that a profile of ONNX Runtime has, or that the file itself says.

>>> from onnx import helper
>>> node = helper.make_node("MatMul", ["a", "b"], ["c"])
>>> macs_of(node, [[2, 3], [3, 5]], [2, 5], {})
30
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx

PRECISION = {"float": "float32", "double": "float64"}

# Where the weight stands among the inputs of a convolution.
_CONV_WEIGHT = {"Conv": 1, "FusedConv": 1, "NhwcFusedConv": 1, "ConvInteger": 1, "QLinearConv": 3}
_MATRIX = {"Gemm", "FusedGemm", "QGemm", "MatMul", "FusedMatMul", "QLinearMatMul", "MatMulInteger",
           "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits"}  # fmt: skip
_RECURRENT = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")
PRODUCTS = {*_CONV_WEIGHT, *_MATRIX, "ConvTranspose"}


def macs_of(
    node: onnx.NodeProto,
    inputs: Sequence[Sequence[int]],
    output: Sequence[int],
    weights: Mapping[str, tuple[int, ...]],
) -> int:
    """Multiply-accumulates of one operator; 0 for operators without, or unknown.

    Args:
        node: the operator.
        inputs: their shapes, as far as they are known.
        output: the shape of its first result.
        weights: the shapes of constants by name.
    """
    if node.op_type in _CONV_WEIGHT:
        index = _CONV_WEIGHT[node.op_type]
        # A weight that is dequantized is no constant.
        weight = weights.get(node.input[index]) or (inputs[index] if len(inputs) > index else ())
        return math.prod(output) * math.prod(weight[1:]) if weight else 0
    if node.op_type == "ConvTranspose" and len(inputs) > 1:
        return math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if node.op_type in _MATRIX and inputs and inputs[0]:
        inner = -2 if attribute(node, "transA", 0) and len(inputs[0]) > 1 else -1
        return math.prod(output) * inputs[0][inner]
    if node.op_type in _RECURRENT and inputs:
        used = [weights.get(name, ()) for name in node.input[1:3]]
        return math.prod(inputs[0][:2]) * sum(math.prod(w) for w in used if w)
    return 0


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """An attribute that is a whole number."""
    return next((a.i for a in node.attribute if a.name == name), default)
