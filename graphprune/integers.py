"""How numbers become integers: the formats that runtimes compute in, as values without tensors.

``real = scale * (integer - zero_point)`` (Jacob et al., *Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference*, CVPR 2018, eq. 1).

>>> Format(8, signed=False, symmetric=False).range
(0, 255)
>>> Format(4).range
(-7, 7)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from .errors import TargetError


@dataclass(frozen=True)
class Format:
    """An integer format.

    Attributes:
        bits: 2 to 8.
        signed: ``int8`` or ``uint8`` in memory.
        symmetric: the zero point is the middle of the range, so zero needs no correction term. A signed
            symmetric range leaves out its lowest integer: -127 to 127.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise TargetError(f"integers have 2 to 8 bits here, got {self.bits}")

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        half = 2 ** (self.bits - 1)
        if not self.signed:
            return 0, 2 * half - 1
        return (-half + 1 if self.symmetric else -half), half - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric format."""
        return 0 if self.signed else 2 ** (self.bits - 1)

    @property
    def dtype(self) -> str:
        """What it is stored in, as a name of :mod:`torch`."""
        return "int8" if self.signed else "uint8"

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{'' if self.signed else 'u'}int{self.bits} {kind}"


UINT8 = Format(8, signed=False, symmetric=False)
INT8 = Format(8)


@dataclass(frozen=True)
class Scheme:
    """What a target's runtime runs in integers, and how it wants it written down.

    Operators are named by kind (:mod:`graphprune.kinds`). A kind that stands nowhere stays in float.

    Attributes:
        activation: of everything between operators; one scale a tensor.
        weight: of constants that a matrix is multiplied with; one scale an output channel.
        whole: kinds that run in integers when their operands *and* their result are quantized.
        inputs: kinds that need quantized operands only; the result may stay in float.
        between: kinds that pay in integers only where all their neighbours are integers already.
        shares: kinds that move numbers without computing; in and out have one scale.
        absorbed: kinds that a quantizer's own saturation replaces, as far as their range allows.
        joined: kinds that the operator behind them takes in, so that no quantizer stands between.
        centred: kinds whose operands need zero as their zero point: the second signed, the first unsigned
            where nothing in it is negative (probabilities).
    """

    activation: Format = UINT8
    weight: Format = INT8
    whole: frozenset[str] = frozenset()
    inputs: frozenset[str] = frozenset()
    between: frozenset[str] = frozenset()
    shares: frozenset[str] = frozenset()
    absorbed: frozenset[str] = frozenset()
    joined: frozenset[str] = frozenset()
    centred: frozenset[str] = frozenset()

    def among(self, kinds: Collection[str]) -> Scheme:
        """The scheme as far as a network of these kinds of operators can tell.

        >>> OPENVINO.among({"convolution", "add"}) == ONNX_RUNTIME.among({"convolution", "add"})
        True
        """
        roles = ("whole", "inputs", "between", "shares", "absorbed", "joined", "centred")
        return replace(self, **{role: getattr(self, role).intersection(kinds) for role in roles})


# What follows was measured: docs/targets.md.
# ONNX Runtime's CPU kernels, on x86 and on ARM. Signed activations or unsigned
# weights run slower than float there.
ONNX_RUNTIME = Scheme(
    whole=frozenset({"convolution"}),
    inputs=frozenset({"linear", "matmul"}),
    between=frozenset({
        "add", "mul", "average-pool", "concat", "sigmoid", "silu", "leaky-relu", "hardswish", "hardsigmoid",
        "rescale",
    }),
    shares=frozenset({"max-pool", "reshape", "transpose", "slice", "copy", "expand", "upsample-nearest"}),
    absorbed=frozenset({"relu", "clamp"}),
    joined=frozenset({"pad"}),
)  # fmt: skip

# OpenVINO multiplies two activations in integers where none has a zero point and the second is signed.
OPENVINO = replace(ONNX_RUNTIME, centred=frozenset({"matmul"}))

# Inductor has integer kernels for convolutions and linears, and none for products of two activations.
INDUCTOR = replace(ONNX_RUNTIME, inputs=frozenset({"linear"}))

# XNNPACK, as ExecuTorch hands it a graph: results are quantized, too, and a concatenation has one scale. Its
# sigmoid, average over windows and attention are float kernels.
XNNPACK = Scheme(
    whole=frozenset({"convolution", "linear"}),
    between=frozenset({"add", "mul", "average-pool"}),
    shares=frozenset({"max-pool", "reshape", "transpose", "concat"}),
    absorbed=frozenset({"relu", "clamp"}),
    joined=frozenset({"pad"}),
)
