"""What OpenVINO computes in integers: the audit is held to counts by hand, the answers to the graph's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from graphprune.backends.openvino_quantizers import rounded_once
from torch import nn

import graphprune
from graphprune.backend import Lowered
from graphprune.errors import BackendError
from graphprune.integers import ONNX_RUNTIME
from graphprune.registry import backends
from graphprune.target import get
from tests.zoo import get as network

from .conftest import convolutional, same

pytest.importorskip("openvino")

BACKEND = backends.load("openvino")()


# By hand: outputs times what each sums over, for one image of 16 by 16.
MACS = 8 * 16 * 16 * 27 + 12 * 6 * 6 * 2 * 9 + 12 * 5


def lowered(model: nn.Module, *args: torch.Tensor, **options: Any) -> Lowered:
    return BACKEND.lower(graphprune.trace(model.eval(), args, **options), get("cpu"))


def test_audit_counts_by_hand():
    made = lowered(convolutional(), torch.randn(1, 3, 16, 16), dynamic_batch=True)
    audit = BACKEND.audit(made, get("cpu"))
    assert audit.macs == {"float32": MACS}
    assert audit.notes == ()
    assert audit.counts["Convolution"] == 2
    assert not any(row.fell_back or row.reason for row in audit.rows)
    recurrent = lowered(nn.LSTM(6, 5, batch_first=True), torch.randn(2, 7, 6))
    assert BACKEND.audit(recurrent, get("cpu")).macs == {"float32": 2 * 7 * 4 * 5 * (6 + 5)}

    class Product(nn.Module):
        def forward(self, a, b):
            return a.transpose(-1, -2) @ b

    made = lowered(Product(), torch.randn(2, 4, 3), torch.randn(2, 4, 5))
    assert BACKEND.audit(made, get("cpu")).macs == {"float32": 2 * 3 * 4 * 5}


def test_int8_runs_in_integers():
    batches = [torch.randn(8, 3, 16, 16) for _ in range(2)]
    result = graphprune.optimize(
        convolutional(), (batches[0][:2],), precision="int8", calibration=batches, backend="openvino",
        dynamic_batch=True, measure=False, threads=1,
    )  # fmt: skip
    audit = result.deployment.audit()
    assert audit.macs == {"int8": MACS}
    assert not any(row.fell_back for row in audit.rows)
    assert result.report.audit is not None
    assert result.report.audit.integers == 1.0


def test_what_falls_back_to_float_is_named():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(16, 32, batch_first=True)
            self.head = nn.Linear(32, 4)

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    torch.manual_seed(0)
    model, x = Recurrent().eval(), torch.randn(2, 5, 16)
    options: dict[str, Any] = {
        "precision": "int8-dynamic",
        "backend": "openvino",
        "measure": False,
        "threads": 1,
    }
    with pytest.raises(BackendError, match=r"computes in float: .*RNNSeq.*allow_float=True"):
        graphprune.optimize(model, (x,), **options)
    result = graphprune.optimize(model, (x,), allow_float=True, **options)
    fallen = {row.operator for row in result.deployment.audit().rows if row.fell_back}
    assert fallen == {"RNNSeq", "FullyConnected"}
    assert set(result.deployment.audit().macs) == {"float32"}


def test_int8_of_a_transformer_is_judged_product_by_product():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    batches = [torch.randn(4, 9, 32) for _ in range(3)]
    options: dict[str, Any] = {
        "precision": "int8", "calibration": batches, "backend": "openvino", "dynamic_batch": True,
        "measure": False, "threads": 1,
    }  # fmt: skip
    own = graphprune.optimize(model, (batches[0],), **options).deployment.audit()
    # A scheme made by hand that gives its products zero points is judged by what they became.
    every = replace(get("cpu"), integers=replace(ONNX_RUNTIME, joined=frozenset()))
    result = graphprune.optimize(model, (batches[0],), target=every, allow_float=True, **options)
    audit = result.deployment.audit()
    linears = 9 * 32 * (3 * 32 + 32 + 64 + 64)
    attention = 2 * 4 * 9 * 9 * 8
    assert own.macs == {"int8": linears + attention}
    assert sum(audit.macs.values()) == linears + attention
    assert audit.macs["int8"] >= linears
    in_float = [row for row in audit.rows if row.macs and row.precision == "float32"]
    assert all(row.fell_back and "dequantizes" in row.reason for row in in_float)
    assert audit.notes == ()
    assert not any(row.operator == "Convert" for row in audit.rows), "integers stay integers between products"


class Attention(nn.Module):
    """Queries of one input, keys and values of another, both 9 long and 32 wide."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.heads = how, 1 if how == "one head" else 4
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x, y):
        def parted(value):
            return value.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = (parted(layer(of)) for layer, of in zip(self.layers, (x, y, y), strict=False))
        near = (torch.arange(9)[:, None] - torch.arange(9)).abs() < 4
        if self.how == "by hand":
            mixed = (0.3 * q @ k.transpose(-1, -2)).softmax(-1) @ v
        elif self.how == "nothing negative":
            mixed = q.relu() @ k.relu().transpose(-1, -2) @ v.relu()
        else:
            masks: dict[str, dict[str, Any]] = {
                "causal": {"is_causal": True},
                "bool": {"attn_mask": near},
                "float": {"attn_mask": torch.zeros(9, 9).masked_fill(~near, -1e4)},
            }
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, **masks.get(self.how, {}))
        return self.layers[3](mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "how", ["plain", "one head", "causal", "bool", "float", "by hand", "nothing negative"]
)
def test_every_product_of_attention_runs_in_integers(how):
    torch.manual_seed(0)
    batches = [(torch.randn(4, 9, 32), torch.randn(4, 9, 32)) for _ in range(3)]
    result = graphprune.optimize(
        Attention(how), batches[0], precision="int8", calibration=batches, backend="openvino", measure=False,
        dynamic_batch=True, threads=1,
    )  # fmt: skip
    assert result.deployment.audit().macs == {"int8": 4 * 9 * 32 * 32 + 2 * 9 * 9 * 32}


def quantizers(graph: graphprune.Graph) -> int:
    return sum("::quantize_per_tensor" in getattr(node.target, "_name", "") for node in graph.nodes)


def test_what_is_rounded_already_is_not_rounded_again():
    class Moves(nn.Module):
        def __init__(self, second: float) -> None:
            super().__init__()
            self.second = second

        def forward(self, x):
            call = torch.ops.quantized_decomposed
            for scale in (0.1, self.second):
                integers = call.quantize_per_tensor.default(x, scale, 3, 0, 255, torch.uint8)
                x = call.dequantize_per_tensor.default(integers, scale, 3, 0, 255, torch.uint8)
                x = nn.functional.max_pool2d(x.transpose(-1, -2), 2)[:, 0]
            return x

    for second, left in ((0.1, 1), (0.23, 2)):
        graph = graphprune.trace(Moves(second), (torch.randn(2, 3, 8, 8),))
        given = torch.randn(2, 3, 8, 8)
        once = rounded_once(graph)
        assert quantizers(graph) == 2
        assert quantizers(once) == left
        assert torch.equal(once.run(given)[0], graph.run(given)[0])
        made = BACKEND.lower(graph, get("cpu"))
        runner = BACKEND.open(made.files, made.inputs, made.outputs, get("cpu"), 1)
        same(runner(given)[0], graph.run(given)[0], 1e-6)


@pytest.mark.parametrize("precision", ["int8-weights", "int4-weights"])
def test_packed_weights_stay_packed(precision):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    result = graphprune.optimize(
        model, (torch.randn(2, 64),), precision=precision, backend="openvino", measure=False, threads=1
    )
    bits = precision.partition("-")[0]
    assert result.deployment.audit().macs == {f"{bits} weights": 2 * 2 * 64 * 96}
    assert any("rounds the inputs" in note for note in result.report.notes) == (bits == "int8")


@pytest.mark.network
def test_resnet18_in_float_and_in_integers():
    chosen = network("tv_resnet18")
    model, (x,) = chosen.build(), chosen.inputs()
    options: dict[str, Any] = {"backend": "openvino", "measure": False, "threads": 1}
    plain = graphprune.optimize(model, (x,), **options)
    audit = plain.deployment.audit()
    batches = [torch.randn_like(x) for _ in range(4)]
    rounded = graphprune.optimize(model, (x,), precision="int8", calibration=batches, **options)
    integers = rounded.deployment.audit()
    assert audit.counts["Convolution"] == integers.counts["Convolution"] == 20
    assert set(audit.macs) == {"float32"}
    assert integers.macs == {"int8": audit.macs["float32"]}
    weights = sum(p.numel() for p in model.parameters())
    assert len(rounded.deployment.lowered.files["model.bin"]) < 1.1 * weights
