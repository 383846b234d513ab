"""``half-precision``: the numbers of torch's own half precision, the ends of its range, and runtimes."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.pipeline import Context, PassResult, Pipeline
from graphprune.textual import parse_pipeline

from .quantizing import Residual
from .rewriting import trace

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def run(graph: Graph, dtype: str = "bfloat16") -> PassResult:
    before = graph.fingerprint()
    (step,) = parse_pipeline(f"half-precision{{dtype={dtype}}}")
    result = step.run(graph, Context())
    assert graph.fingerprint() == before
    assert result.changed == (result.graph is not graph)
    return result


class Net(nn.Module):
    """Inputs and outputs of several kinds, a dtype in an operator, and one tensor that is an output, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.norm = nn.Embedding(11, 8), nn.Linear(8, 3), nn.LayerNorm(3)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> dict[str, Any]:
        zeros = torch.zeros(x.shape, dtype=torch.float32)
        y = self.norm(self.layer(self.table(ids) + x + zeros))
        return {"scores": y, "best": y.argmax(-1), "x": x, "count": 3}


@pytest.mark.parametrize("dtype", HALVES)
def test_it_is_what_torch_computes_in_half_precision(dtype: str) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    ids, x = torch.randint(0, 11, (2, 5)), torch.randn(2, 5, 8)
    done = run(trace(model, ids, x), dtype).graph
    found = done(ids, x)
    half = model.to(HALVES[dtype])
    with torch.no_grad():
        y = half.norm(half.layer(half.table(ids) + x.to(HALVES[dtype])))
    assert torch.equal(found["scores"], y.float())
    assert torch.equal(found["best"], y.argmax(-1))
    assert found["x"] is x
    assert found["count"] == 3
    assert {t.dtype for t in done.tensors.values()} == {HALVES[dtype]}
    inner = [
        n.meta["val"].dtype for n in done.nodes if n.op == "call_function" and n.name.startswith("linear")
    ]
    assert inner == [HALVES[dtype]]


@pytest.mark.parametrize("dtype", HALVES)
def test_a_mask_beyond_the_range_is_no_nan(dtype: str) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", torch.full((4,), torch.finfo(torch.float32).min))
            self.register_buffer("open", torch.tensor([0.0, -float("inf")]))

        def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            scores = (x + self.bias).masked_fill(~keep, torch.finfo(torch.float32).min)
            return torch.softmax(scores, -1), torch.softmax(x[:, :2] + self.open, -1)

    x, keep = torch.randn(2, 4), torch.zeros(2, 4, dtype=torch.bool)
    first, second = run(trace(Masked().eval(), x, keep), dtype).graph(x, keep)
    assert torch.allclose(first, torch.full((2, 4), 0.25), atol=1e-2)
    assert torch.equal(second, torch.tensor([[1.0, 0.0]] * 2)), "an infinity stays one"


def test_what_does_not_apply() -> None:
    class Counts(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return ids + 1

    result = run(trace(Counts(), torch.arange(3)))
    assert not result.changed
    with pytest.raises(InputError, match="dtype must be one of"):
        run(trace(nn.Linear(2, 2), torch.ones(1, 2)), "int8")
    with pytest.raises(PassError, match="change the order"):
        Pipeline.parse("half-precision,quantize").check()


def test_an_operator_that_does_not_take_it_is_named() -> None:
    class Decomposes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ torch.linalg.inv(self.weight)

    with pytest.raises(PassError, match=r"not every operator of this network takes bfloat16"):
        run(trace(Decomposes().eval(), torch.randn(2, 3)))


@pytest.mark.parametrize(
    "backend", ["onnxruntime", "openvino", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_end_to_end(backend: str, tmp_path: Any) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    torch.manual_seed(1)
    model, x = Residual(16).eval(), torch.randn(2, 3, 16, 16)
    result = graphprune.optimize(model, x, precision="bfloat16", backend=backend, measure=False, threads=1)
    with torch.no_grad():
        wanted = model(x)
    found = result(x)
    assert found.dtype == torch.float32
    difference = float((found - wanted).norm() / wanted.norm())
    assert 1e-5 < difference < 0.03, "rounded, and no more than that"
    half = {"onnxruntime": "model.onnx", "openvino": "model.bin", "inductor": ""}[backend]
    if half:
        weights = sum(p.numel() for p in model.parameters())
        assert len(result.deployment.lowered.files[half]) < 3 * weights + 20_000
    supported = torch.cpu.get_capabilities().get("avx512_bf16", False)
    kinds = {row.precision for row in result.audit().rows if row.macs}
    if backend == "onnxruntime":
        assert kinds == {"float32"}
        assert any("bfloat16" in note for note in result.report.notes)
    elif supported or backend == "inductor":
        assert kinds == {"bfloat16"}
    else:
        assert any("no bfloat16" in note for note in result.report.notes)
    runner = graphprune.load(result.save(tmp_path / "artifact"), threads=1)
    assert torch.equal(runner(x), found)
