"""Pooling as the stride of the convolution before it: the same answers, where it pays, and said."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from graphprune.backends.onnx_strides import stride_pooling
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.graph import Graph
from graphprune.target import Target, get

X86 = get("x86")
EACH_BY_ITSELF = (nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Tanh, lambda: nn.LeakyReLU(-0.5))


def traced(*layers: nn.Module, shape: tuple[int, ...] = (8, 1, 64, 64), dynamic: bool = False) -> Graph:
    torch.manual_seed(0)
    return graphprune.trace(nn.Sequential(*layers).eval(), torch.randn(shape), dynamic_batch=dynamic)


def rewritten(graph: Graph, target: Target = X86) -> tuple[Graph, tuple[str, ...]]:
    done = graph.copy()
    return done, stride_pooling(done, target)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 8), read=st.integers(1, 3), kernel=st.tuples(*[st.integers(1, 4)] * 2),
    stride=st.integers(1, 3), padding=st.tuples(*[st.integers(0, 3)] * 2), step=st.integers(2, 3),
    size=st.tuples(*[st.integers(12, 24)] * 2), bias=st.booleans(), how=st.sampled_from(EACH_BY_ITSELF),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_the_answers_are_the_same(
    count: int, read: int, kernel: Any, stride: int, padding: Any, step: int, size: Any, bias: bool,
    how: Any, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    conv = nn.Conv2d(read, count, kernel, stride, padding, bias=bias)
    net = nn.Sequential(conv, how(), nn.MaxPool2d(step)).eval()
    x = torch.randn(2, read, *size)
    if net[0](x).shape[-1] < step or net[0](x).shape[-2] < step:
        return
    graph = graphprune.trace(net, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphprune.backends.onnx_strides._saved", lambda *_: 10**12)
        patch.setattr("graphprune.backends.onnx_strides._ROOM", 10**12)
        done, notes = rewritten(graph)
    assert len(notes) == 1
    assert not list(done.find(torch.ops.aten.max_pool2d.default))
    torch.testing.assert_close(done.run(x)[0], net(x), rtol=1e-5, atol=1e-5)


def test_expected_graph() -> None:
    graph = traced(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    done, (note,) = rewritten(graph)
    assert str(done) == (
        "input_1: f32[8, 1, 64, 64]\n"
        "conv2d: f32[8, 16, 31, 31] = conv2d(input_1, %conv2d_weight, %conv2d_bias, [2, 2], [0, 0])\n"
        "relu: f32[8, 16, 31, 31] = relu(conv2d)\n"
        "unflatten_int: f32[8, 4, 4, 31, 31] = unflatten.int(relu, 1, [4, 4])\n"
        "amax_default: f32[8, 4, 31, 31] = amax(unflatten_int, [1])\n"
        "return (amax_default,)"
    )
    assert "max_pool2d in module '2'" in note
    assert "16 channels for 4" in note
    kept = done.tensors["conv2d_weight"]
    torch.testing.assert_close(kept[12:, :, 1:, 1:], graph.tensors["0.weight"])  # the last of the places
    assert float(kept[12:, :, 0].abs().sum() + kept[12:, :, :, 0].abs().sum()) == 0


class Twice(nn.Module):
    """The convolution is read by something else, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, 4, 3), nn.MaxPool2d(2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(x)
        return self.pool(y), y.mean((2, 3))


class Above(nn.Module):
    """At least a tensor's values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("least", torch.randn(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(x, min=self.least)


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(1, 12, 3), nn.MaxPool2d(2)),  # more blocks than before
        (nn.Conv2d(1, 6, 3), nn.MaxPool2d(2)),  # fewer blocks of 16, more of 8
        (nn.Conv2d(1, 4, 3), Above(), nn.MaxPool2d(2)),  # a bound for each channel
        (nn.Conv2d(1, 4, 3), nn.MaxPool2d(3, 2)),  # places overlap
        (nn.Conv2d(1, 4, 3), nn.MaxPool2d(2, padding=1)),
        (nn.Conv2d(1, 4, 3), nn.MaxPool2d(2, dilation=2)),
        (nn.Conv2d(1, 4, 3), nn.MaxPool2d((2, 1))),
        (nn.Conv2d(1, 4, 3), nn.MaxPool2d(4, ceil_mode=True)),  # 62 places
        (nn.Conv2d(1, 4, 3, dilation=2), nn.MaxPool2d(2)),
        (nn.Conv2d(1, 4, 3, stride=(1, 2)), nn.MaxPool2d(2)),
        (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2)),  # a value for each channel
        (nn.Conv2d(1, 4, 3), nn.Softmax(1), nn.MaxPool2d(2)),
        (nn.Conv2d(1, 4, 3), nn.AvgPool2d(2)),
        (Twice(),),
    ],
)
def test_what_stays(layers: tuple[nn.Module, ...]) -> None:
    graph = traced(*layers)
    done, notes = rewritten(graph)
    assert notes == ()
    assert str(done) == str(graph)


def test_groups_stay() -> None:
    graph = traced(nn.Conv2d(4, 4, 3, groups=4), nn.MaxPool2d(2), shape=(8, 4, 64, 64))
    assert rewritten(graph)[1] == ()


def test_a_weight_that_would_grow_much_stays() -> None:
    few, many = (traced(nn.Conv2d(n, 4, 5), nn.MaxPool2d(2), shape=(8, n, 64, 64)) for n in (2, 64))
    assert f"{(16 * 36 - 4 * 25) * 2 * 4:,} bytes more" in rewritten(few)[1][0]
    assert rewritten(many)[1] == ()


def test_a_pool_behind_a_pool() -> None:
    graph = traced(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.MaxPool2d(2, ceil_mode=True))
    x = torch.randn(8, 1, 64, 64)
    done, notes = rewritten(graph)
    assert len(notes) == 1
    torch.testing.assert_close(done.run(x)[0], graph.run(x)[0], rtol=1e-5, atol=1e-5)


def test_little_work_and_other_machines_stay() -> None:
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2)
    assert rewritten(traced(*layers, shape=(1, 1, 28, 28)))[1] == ()
    assert rewritten(traced(*layers), get("arm"))[1] == ()
    assert rewritten(traced(*layers), get("cuda"))[1] == ()
    assert len(rewritten(traced(*layers))[1]) == 1


def test_integers_stay() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    x = torch.randn(8, 1, 64, 64)
    result = graphprune.optimize(
        net, x, precision="int8", calibration=[x], backend="onnxruntime", target="x86", measure=False
    )
    assert not any("runs inside the convolution" in note for note in result.report.notes)


def test_in_the_runtime_any_batch(opened: Any) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(4 * 5 * 5, 10),
    ).eval()  # fmt: skip
    found = opened(net, torch.randn(64, 1, 28, 28), dynamic=True, target="x86")
    model = onnx.load_from_string(found.lowered.files["model.onnx"])
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("ReduceMax") == 2
    assert "MaxPool" not in operators
    assert sum("runs inside the convolution" in note for note in found.lowered.notes) == 2
    for batch in (1, 7, 64):
        found.matches(torch.randn(batch, 1, 28, 28))
