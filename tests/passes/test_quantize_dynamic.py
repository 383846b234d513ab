"""``quantize-dynamic``: the numbers by hand, the operators ONNX Runtime fuses, and what stays in float."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphprune.passes.quantize_dynamic import QuantizeDynamic
from torch import nn

import graphprune
from graphprune.backend import Audit
from graphprune.cost import cost
from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.pipeline import Context, Pipeline
from graphprune.registry import backends
from graphprune.target import get
from graphprune.verify import noise_ratio
from tests.passes.rewriting import apply, refusals
from tests.passes.test_quantize_weights import WIDTH, WORDS, captured, words

BACKEND = backends.load("onnxruntime")()


def by_hand(x: np.ndarray) -> np.ndarray:
    """DynamicQuantizeLinear and back, from its definition in the ONNX standard."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(0 - low / scale), 0, 255)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


def by_hand_weight(weight: np.ndarray) -> np.ndarray:
    scale = np.abs(weight).max(1, keepdims=True) / 127
    return np.rint(weight / scale) * scale


def opened(graph: Graph) -> tuple[Any, onnx.ModelProto, Audit]:
    made = BACKEND.lower(graph, get("cpu"))
    runner = BACKEND.open(made.files, made.inputs, made.outputs, get("cpu"))
    return runner, onnx.load_from_string(made.files["model.onnx"]), BACKEND.audit(made, get("cpu"))


def apart(graph: Graph, original: Graph, runner: Any, *inputs: torch.Tensor) -> tuple[float, float]:
    """How far the runtime is from the graph, and the graph from the original, in shares of the signal."""
    own = graph.run(*inputs)
    return noise_ratio(runner(*inputs), own), noise_ratio(own, original.run(*inputs))


def test_a_linear_by_hand() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(20, 7).eval(), torch.randn(5, 20) + 0.3
    small = apply("quantize-dynamic", graphprune.trace(model, x)).graph
    weight, bias = (p.detach().numpy() for p in (model.weight, model.bias))
    wanted = by_hand(x.numpy()) @ by_hand_weight(weight).T + bias
    np.testing.assert_allclose(small.run(x)[0].numpy(), wanted, rtol=1e-4, atol=1e-5)
    assert small.tensors["weight_integers"].dtype == torch.int8
    assert "weight" not in small.tensors


@pytest.mark.parametrize("tied", [False, True])
def test_the_runtime_multiplies_integers_and_computes_what_the_graph_does(tied: bool) -> None:
    graph = captured(tied)
    small = apply("quantize-dynamic", graph).graph
    runner, model, audit = opened(small)
    for batch in (2, 5):
        off, own = apart(small, graph, runner, words(batch, seed=batch))
        assert 0 < own < 0.05
        assert off < own / 5
    kinds = Counter(row.operator for row in audit.rows)
    assert kinds["DynamicQuantizeMatMul"] == 5
    assert not {"MatMul", "Gemm", "DequantizeLinear", "MatMulInteger"} & set(kinds)
    assert all(row.precision == "int8" for row in audit.rows if row.macs)
    tables = [t for t in model.graph.initializer if {WORDS, WIDTH} <= set(t.dims)]
    assert [t.data_type for t in tables] == [onnx.TensorProto.INT8] * (1 if tied else 2)


def test_the_file_is_a_quarter() -> None:
    graph = captured()
    sizes = [
        len(BACKEND.lower(g, get("cpu")).files["model.onnx"])
        for g in (graph, apply("quantize-dynamic", graph).graph)
    ]
    assert sizes[1] <= 0.26 * sizes[0] + 10_000  # nodes, and a scale an output


class Attention(nn.Module):
    """Three projections read one value, which something else reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


def test_what_several_read_is_rounded_once() -> None:
    torch.manual_seed(0)
    graph = graphprune.trace(Attention().eval(), torch.randn(2, 6, 64), dynamic_batch=True)
    small = apply("quantize-dynamic", graph).graph
    assert sum("choose_qparams" in str(node.target) for node in small.nodes) == 1
    runner, _, audit = opened(small)
    kinds = Counter(row.operator for row in audit.rows)
    assert kinds["MatMulIntegerToFloat"] == 3
    assert kinds["DynamicQuantizeLinear"] == 1
    off, own = apart(small, graph, runner, torch.randn(3, 6, 64))
    assert off < own / 5


class Sequence(nn.Module):
    def __init__(self, kind: Any = nn.LSTM, **options: Any):
        super().__init__()
        self.cells = kind(24, 32, **options)

    def forward(self, x: torch.Tensor) -> Any:
        return self.cells(x)


VARIANTS: list[dict[str, Any]] = [
    {"batch_first": True},
    {"batch_first": True, "bidirectional": True, "num_layers": 2},
    {"num_layers": 3, "bias": False},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_an_lstm_runs_in_integers(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    graph = graphprune.trace(Sequence(**options).eval(), torch.randn(3, 6, 24))
    small = apply("quantize-dynamic", graph).graph
    runner, _, audit = opened(small)
    off, own = apart(small, graph, runner, torch.randn(3, 6, 24))
    assert 0 < own < 0.05
    assert off < own / 2  # the runtime's own rounding of the state, when batches are parted among threads
    rows = [row for row in audit.rows if row.macs]
    assert [row.operator for row in rows] == ["DynamicQuantizeLSTM"] * options.get("num_layers", 1)
    assert {row.precision for row in rows} == {"int8"}
    assert cost(small).macs == cost(graph).macs


def test_an_lstm_by_hand() -> None:
    """One layer, step by step in numpy: the input rounded as a whole, the state at every step."""
    torch.manual_seed(0)
    model, x = nn.LSTM(5, 4), torch.randn(7, 3, 5)
    h, c = torch.randn(1, 3, 4), torch.randn(1, 3, 4)

    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = model

        def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
            return self.cells(x, (h, c))

    small = apply("quantize-dynamic", graphprune.trace(Started().eval(), (x, h, c))).graph
    into, back = (by_hand_weight(w.detach().numpy()) for w in (model.weight_ih_l0, model.weight_hh_l0))
    bias = (model.bias_ih_l0 + model.bias_hh_l0).detach().numpy()
    source, hidden, cell, found = by_hand(x.numpy()), h[0].numpy(), c[0].numpy(), []
    for step in source:
        gates = step @ into.T + by_hand(hidden) @ back.T + bias
        i, f, o = (1 / (1 + np.exp(-gates[:, 4 * k : 4 * k + 4])) for k in (0, 1, 3))
        cell = f * cell + i * np.tanh(gates[:, 8:12])
        hidden = o * np.tanh(cell)
        found.append(hidden)
    results = small.run(x, h, c)
    for value, wanted in zip(results, (np.stack(found), hidden[None], cell[None]), strict=True):
        np.testing.assert_allclose(value.numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
def test_other_recurrent_layers_stay_in_float_and_say_so(kind: Any) -> None:
    graph = graphprune.trace(Sequence(kind).eval(), torch.randn(3, 6, 24))
    result = apply("quantize-dynamic", graph)
    assert not result.changed
    assert "ONNX Runtime runs an LSTM in integers, and no " in refusals(result)[0]


def test_lstms_that_the_runtime_lacks_stay_in_float() -> None:
    graph = graphprune.trace(Sequence(proj_size=8).eval(), torch.randn(3, 6, 24))
    assert "projects its hidden state" in refusals(apply("quantize-dynamic", graph))[0]


def test_a_sequence_without_a_batch() -> None:
    torch.manual_seed(0)
    graph = graphprune.trace(Sequence().eval(), torch.randn(6, 24))
    small = apply("quantize-dynamic", graph).graph
    off, own = apart(small, graph, opened(small)[0], torch.randn(6, 24))
    assert 0 < own < 0.05
    assert off < own / 2


def test_convolutions_are_counted_and_left() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3)).eval()
    result = apply("quantize-dynamic", graphprune.trace(model, torch.randn(1, 1, 8, 8)))
    assert "1 convolution kept in float" in " ".join(note.message for note in result.notes)
    assert {"0.weight", "2.weight_integers"} <= set(result.graph.tensors)


def test_ignored_and_only() -> None:
    graph = captured()
    small = apply('quantize-dynamic{ignored=["*s.weight" mix]}', graph).graph
    assert {"tokens.weight", "places.weight", "mix", "up.weight_integers"} <= set(small.tensors)
    lstm = graphprune.trace(Sequence().eval(), torch.randn(3, 6, 24))
    assert apply("quantize-dynamic{only=[cells]}", lstm).changed
    with pytest.raises(InputError, match="ignored name 'nowhere' matches no weight"):
        apply("quantize-dynamic{ignored=[nowhere]}", graph)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-30])
def test_constant_inputs_are_kept(value: float) -> None:
    """An input without a range has a scale all the same: zero stays zero, and one number is met."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4, bias=False).eval()
    small = apply("quantize-dynamic", graphprune.trace(model, torch.zeros(2, 8))).graph
    runner, _, _ = opened(small)
    x = torch.full((2, 8), value)
    wanted = model(x).detach()
    for found in (small.run(x)[0], runner(x)[0]):
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 * abs(value) + 1e-6)


def test_the_order_of_passes_is_kept() -> None:
    with pytest.raises(PassError, match=r"needs float \(ended by 'quantize-dynamic'\)"):
        Pipeline.parse("quantize-dynamic,quantize-weights").check()
    shapes = graphprune.trace(nn.Linear(4, 4, device="meta"), torch.zeros(1, 4, device="meta"))
    with pytest.raises(InputError, match="meta device"):
        QuantizeDynamic().run(shapes, Context())


def test_optimize_certifies_the_artifact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
    result = graphprune.optimize(model, torch.randn(4, 64), pipeline="quantize-dynamic", measure=False)
    assert "DynamicQuantizeMatMul" in str(result.report)
