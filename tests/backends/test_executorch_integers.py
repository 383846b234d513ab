"""What ExecuTorch computes in integers: read from its file, against counts by hand and the graph itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from graphprune.passes.quantize import Quantize
from torch import nn

import graphprune
from graphprune.errors import BackendError
from graphprune.pipeline import Context
from graphprune.registry import backends
from graphprune.target import get
from tests.zoo import get as network

from .conftest import convolutional, same

pytest.importorskip("executorch", reason="not run: pip install 'graphprune[executorch]'")

from graphprune.backends.executorch_integers import for_xnnpack

BACKEND = backends.load("executorch")()
MACS = 8 * 16 * 16 * 27 + 12 * 6 * 6 * 2 * 9 + 12 * 5
CALL = torch.ops.quantized_decomposed


def optimized(model: nn.Module, *args: torch.Tensor, **options: Any) -> graphprune.Result:
    batches = [torch.randn_like(args[0]) for _ in range(3)]
    return graphprune.optimize(
        model, args, precision="int8", calibration=batches, backend="executorch", measure=False, threads=1,
        **options,
    )  # fmt: skip


class Residual(nn.Module):
    """Everything that runs in integers: convolutions of each kind, a sum, a join, pools, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.first(x).relu()
        y = self.point(nn.functional.relu6(self.depthwise(x)))
        joined = torch.cat([self.pool(x + y), self.pool(y)], 1)
        return self.head(joined.mean((2, 3)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_network_runs_in_integers_from_end_to_end(dynamic):
    torch.manual_seed(0)
    result = optimized(Residual().eval(), torch.randn(2, 3, 16, 16), dynamic_batch=dynamic)
    audit = result.deployment.audit()
    one = 8 * 8 * 16 * (27 + 9 + 16) + 32 * 5
    assert audit.macs == {"int8": one if dynamic else 2 * one}
    assert audit.notes == ()
    precisions = {row.operator: row.precision for row in audit.rows if row.operator != "Convert"}
    assert set(precisions.values()) == {"int8"}
    assert {"Conv2d", "DepthwiseConv2d", "Add", "FullyConnected", "MaxPooling2d"} <= set(precisions)
    # Two at the edges: the input is rounded, and the result is given in float.
    assert audit.counts["Convert"] == 2
    assert result.report.audit is not None
    assert result.report.audit.integers == 1.0


def test_the_answers_are_the_graphs_to_a_rounding():
    torch.manual_seed(0)
    result = optimized(Residual().eval(), torch.randn(2, 3, 16, 16))
    rounder = [n for n in result.graph.nodes if "::quantize_per_tensor" in getattr(n.target, "_name", "")][-1]
    step: Any = rounder.args[1]
    for _ in range(5):
        x = torch.randn(2, 3, 16, 16)
        assert float((result(x) - result.graph.run(x)[0]).abs().max()) <= 2.01 * step


def test_what_xnnpack_has_no_integers_for_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5)).eval()
    graph = graphprune.trace(model, (torch.randn(1, 3, 8, 8),))
    calibration = [torch.randn(1, 3, 8, 8) for _ in range(4)]
    # Under ONNX Runtime's scheme the result of a linear may stay in float.
    rounded = Quantize().run(graph, Context(get("cpu"), calibration)).graph
    made = BACKEND.lower(rounded, get("cpu"))
    audit = BACKEND.audit(made, get("cpu"))
    assert audit.macs == {"int8": 8 * 64 * 27, "float32": 8 * 64 * 5}
    (fallen,) = [row for row in audit.rows if row.fell_back]
    assert fallen.operator == "FullyConnected"
    assert "its result has to be quantized" in fallen.reason
    runner = BACKEND.open(made.files, made.inputs, made.outputs, get("cpu"), 1)
    same(runner(calibration[0])[0], rounded.run(calibration[0])[0], 2e-2)


def test_numbers_stay_the_same_when_they_are_written_for_xnnpack():
    result = graphprune.optimize(
        convolutional(), torch.randn(1, 3, 16, 16), precision="int8", measure=False,
        calibration=[torch.randn(4, 3, 16, 16)], backend="onnxruntime", threads=1, allow_float=True,
    )  # fmt: skip
    written = result.graph.copy()
    for_xnnpack(written)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(written.run(x)[0], result.graph.run(x)[0])
    kinds = {n.args[5] for n in written.nodes if "quantize_per_tensor" in getattr(n.target, "_name", "")}
    assert kinds == {torch.int8}


def test_padding_by_itself_runs_in_integers():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 16, 3, stride=2), nn.ReLU6(),
        nn.ZeroPad2d((2, 1, 0, 1)), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    result = optimized(model, x)
    assert result.deployment.audit().macs == {"int8": 2 * 16 * (8 * 8 * 27 + 7 * 9 * 9)}
    assert all(certificate.passed for certificate in result.deployment.certificates.values())
    with torch.no_grad():
        assert float((result(x) - model(x)).norm() / model(x).norm()) < 0.02


def test_constants_between_quantizers_are_written_anew():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randint(0, 256, (4,), dtype=torch.uint8))

        def forward(self, x):
            small = CALL.quantize_per_tensor.default(x, 0.05, 120, 0, 255, torch.uint8)
            x = CALL.dequantize_per_tensor.default(small, 0.05, 120, 0, 255, torch.uint8)
            y = x + CALL.dequantize_per_tensor.default(self.table, 0.02, 7, 0, 255, torch.uint8)
            small = CALL.quantize_per_tensor.default(y, 0.07, 100, 0, 255, torch.uint8)
            return CALL.dequantize_per_tensor.default(small, 0.07, 100, 0, 255, torch.uint8)

    graph = graphprune.trace(Shifted(), (torch.randn(2, 4),))
    made = BACKEND.lower(graph, get("cpu"))
    runner = BACKEND.open(made.files, made.inputs, made.outputs, get("cpu"), 1)
    x = torch.randn(2, 4)
    assert float((runner(x)[0] - graph.run(x)[0]).abs().max()) <= 0.0701
    (added,) = [row for row in BACKEND.audit(made, get("cpu")).rows if row.operator == "Add"]
    assert added.precision == "int8"


def test_tables_of_embeddings_stay_integers():
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(1000, 32)
            self.head = nn.Linear(32, 4)

        def forward(self, ids):
            return self.head(self.table(ids))

    torch.manual_seed(0)
    ids = [torch.randint(0, 1000, (2, 6)) for _ in range(4)]
    result = graphprune.optimize(
        Lookup().eval(), (ids[0],), precision="int8", calibration=ids, backend="executorch", measure=False,
        threads=1,
    )  # fmt: skip
    assert len(result.deployment.lowered.files["model.pte"]) < 1000 * 32 * 2
    assert set(result.deployment.audit().macs) == {"int8"}


def test_inputs_of_linears_are_rounded_as_they_come():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.out = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 8)

        def forward(self, x):
            return self.out(self.query(x) * self.key(x).sigmoid())

    torch.manual_seed(0)
    result = graphprune.optimize(
        Heads().eval(), (torch.randn(2, 5, 32),), precision="int8-dynamic", backend="executorch",
        measure=False, threads=1, dynamic_batch=True,
    )  # fmt: skip
    audit = result.deployment.audit()
    assert audit.macs == {"int8": 5 * (2 * 32 * 48 + 48 * 8)}
    assert not any(row.fell_back for row in audit.rows)
    for size in (1, 3):
        x = torch.randn(size, 5, 32)
        same(result(x), result.graph.run(x)[0], 3e-2)


@pytest.mark.parametrize("precision", ["int8-weights", "int4-weights"])
def test_weights_in_blocks_are_refused(precision):
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    with pytest.raises(BackendError, match=r"which is ONNX Runtime's .*use backend='onnxruntime'"):
        graphprune.optimize(
            model, (torch.randn(2, 64),), precision=precision, backend="executorch", measure=False
        )


def test_a_group_norm_is_not_taken_for_weights_in_groups(opened):
    opened(nn.GroupNorm(2, 4), torch.randn(1, 4, 6)).matches(torch.randn(1, 4, 6))


@pytest.fixture
def runtime() -> str:
    return "executorch"


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("name", ["tv_resnet18", "tv_mobilenet_v2", "hf_bert"])
def test_networks_in_integers(name):
    chosen = network(name)
    inputs = chosen.inputs()
    noisy = [tuple(x + 0.1 * torch.randn_like(x) if x.is_floating_point() else x for x in inputs)] * 3
    result = graphprune.optimize(
        chosen.build(), inputs, example_kwargs=chosen.kwargs(), precision="int8", backend="executorch",
        calibration=noisy if len(inputs) > 1 else [x for (x,) in noisy], measure=False, threads=1,
    )  # fmt: skip
    assert all(certificate.passed for certificate in result.report.certificates.values())
    audit = result.deployment.audit()
    assert not any(row.fell_back for row in audit.rows)
    assert audit.macs["int8"] > 0.5 * sum(audit.macs.values())
    assert result.report.audit is not None
