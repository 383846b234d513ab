"""``remove-dead-channels`` on convolutional networks: all that is planted is found, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphprune.pipeline import Context, Pipeline
from tests.passes.dead import changes, double, remove, shapes, values, x
from tests.passes.rewriting import apply, assert_same, expected, randomise, refusals, text, trace

# ---- unread, zero, constant ----------------------------------------------------------------------


def test_expected_graph() -> None:
    model = double(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False)
    )
    model[3].weight.data[:, 0] = 0  # unread
    model[1].weight.data[2] = 0  # zero, or constant
    model[1].bias.data[2] = -0.5
    model[1].weight.data[5] = 0
    model[1].bias.data[5] = 0.75
    result = remove(model, x(2, 3, 7, 7))
    assert text(result.graph) == expected("""
        input_1: f64[2, 3, 7, 7]
        conv2d: f64[2, 3, 5, 5] = conv2d(input_1, %0.weight)
        batch_norm: f64[2, 3, 5, 5] = batch_norm(conv2d, %1.weight, %1.bias, %1.running_mean, %1.running_var, False, 0.1, 1e-05, False)
        relu: f64[2, 3, 5, 5] = relu(batch_norm)
        conv2d_1: f64[2, 4, 3, 3] = conv2d(relu, %3.weight, %3.bias)
        return (conv2d_1,)
    """)  # noqa: E501
    assert changes(result) == {
        "0.weight[0]": "3 of 6 removed (positions 0, 2, 5): 1 unread, 1 zero, "
        "1 constant, taken into the bias behind it"
    }
    assert isinstance(result.graph.tensors["3.bias"], nn.Parameter)
    assert torch.allclose(result.graph.tensors["3.bias"], 0.75 * model[3].weight[:, 5].sum((1, 2)))


def test_nothing_planted_is_the_same_graph() -> None:
    model = double(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    graph = trace(model, x(1, 3, 5, 5))
    result = apply("remove-dead-channels", graph)
    assert not result.changed
    assert result.graph is graph
    assert [n.message for n in result.notes] == ["no dead channels to remove"]


def test_constant_before_padding_is_refused_and_zero_is_not() -> None:
    model = double(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))
    model[1].weight.data[1:3] = 0
    model[1].bias.data[1:3] = values(0.5, -0.5)
    result = remove(model, x(1, 3, 5, 5))
    assert changes(result) == {"0.weight[0]": "1 of 6 removed (position 2): 1 zero"}
    assert refusals(result) == [
        "position 1 constant, but conv2d (conv2d_1) pads with zeros, which the constant is not"
    ]


@pytest.mark.parametrize("padding", [0, "valid", "same", 1])
@pytest.mark.parametrize("kernel", [1, 3])
def test_padding(padding: Any, kernel: int) -> None:
    """A constant goes exactly where every result meets the whole kernel."""
    model = double(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, kernel, padding=padding))
    model[0].weight.data[1] = 0
    even = padding in (0, "valid") or (padding == "same" and kernel == 1)
    assert remove(model, x(1, 2, 6, 6)).changed == even


@pytest.mark.parametrize(
    ("layer", "even"),
    [
        (nn.ConvTranspose2d(4, 3, 1), True),
        (nn.ConvTranspose2d(4, 6, 1, groups=2), True),
        (nn.ConvTranspose2d(4, 3, 2, stride=2), False),
        (nn.ConvTranspose2d(4, 3, 1, stride=2), False),
        (nn.ConvTranspose2d(4, 3, 3, padding=1), False),
    ],
)
def test_transposed_convolutions(layer: nn.Module, even: bool) -> None:
    model = double(nn.Conv2d(2, 4, 1), layer)
    model[0].weight.data[[0, 2]] = 0
    assert remove(model, x(1, 2, 4, 4)).changed == even
    model[0].bias.data[[0, 2]] = 0  # of a grouped layer, one in each group: both rows go
    assert shapes(remove(model, x(1, 2, 4, 4)).graph, "0.weight") == [(2, 2, 1, 1)]


# ---- coupled channels ------------------------------------------------------------------------------


class Residual(nn.Module):
    """A stream of 8 channels, a block that reads and writes it, a depthwise one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 6, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.outer = nn.Conv2d(6, 8, 3, padding=1)
        self.wise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.outer(self.norm(self.inner(x)).relu())
        return self.head((x + self.wise(x).relu()).mean((2, 3)))


def residual() -> Residual:
    model = randomise(Residual().double(), 3)
    assert isinstance(model, Residual)
    return model


def test_a_stream_that_one_reader_needs_stays() -> None:
    model = residual()
    model.head.weight.data[:, 2] = 0
    assert not remove(model, x(2, 3, 5, 5)).changed  # the block still reads it
    model.inner.weight.data[:, 2] = 0
    result = remove(model, x(2, 3, 5, 5))
    assert changes(result) == {"stem.weight[0]": "1 of 8 removed (position 2): 1 unread"}
    assert shapes(result.graph, "wise.weight", "outer.weight", "inner.weight") == [
        (7, 1, 3, 3), (7, 6, 3, 3), (6, 7, 1, 1),
    ]  # fmt: skip
    assert next(result.graph.find(torch.ops.aten.conv2d.default)).meta["val"].shape == (2, 7, 5, 5)


def test_a_stream_goes_where_all_that_write_to_it_are_constant() -> None:
    model = residual()
    for layer in (model.stem, model.outer):
        layer.weight.data[4] = 0
    model.wise.weight.data[4] = 0
    result = remove(model, x(2, 3, 5, 5))  # mean, 1×1 and depthwise with zero weight: nothing pads it
    assert changes(result) == {
        "stem.weight[0]": "1 of 8 removed (position 4): 1 constant, taken into the bias behind it"
    }
    model.wise.weight.data[4] = 1.0
    result = remove(model, x(2, 3, 5, 5))
    assert not result.changed
    model.stem.weight.data[4] = 0.5
    model.wise.weight.data[4] = 0
    assert not remove(model, x(2, 3, 5, 5)).changed


def test_dead_together() -> None:
    """A channel of the stream that only a unit reads that only that channel reads."""
    model = residual()
    model.head.weight.data[:, 6] = 0
    model.inner.weight.data[:, 6] = 0
    model.inner.weight.data[3, 6] = 1.0
    model.outer.weight.data[:, 3] = 0
    model.outer.weight.data[6, 3] = 1.0
    result = remove(model, x(2, 3, 5, 5))
    assert changes(result) == {
        "stem.weight[0]": "1 of 8 removed (position 6): 1 unread",
        "inner.weight[0]": "1 of 6 removed (position 3): 1 unread",
    }


def test_a_block_that_adds_nothing_keeps_one_channel() -> None:
    model = residual()
    model.outer.weight.data.zero_()
    result = remove(model, x(2, 3, 5, 5))
    assert changes(result) == {"inner.weight[0]": "5 of 6 removed (positions 1, 2, 3, 4, 5): 5 unread"}
    assert refusals(result) == ["every position is dead; one stays, for an axis cannot be empty"]
    again = apply("remove-dead-channels", result.graph)
    assert not again.changed


class Joined(nn.Module):
    """Concatenation, a gate, groups, a shuffle and a split."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.squeeze, self.excite = nn.Conv2d(10, 4, 1), nn.Conv2d(4, 10, 1)
        self.mixed = nn.Conv2d(10, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, padding=1)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.cat([self.a(x), self.b(x)], 1)).relu()
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        value, gate = self.grouped(self.mixed(x)).chunk(2, 1)
        return self.last(value * gate.sigmoid())


def joined() -> Joined:
    model = randomise(Joined().double(), 5)
    assert isinstance(model, Joined)
    return model


def test_concatenation_and_gate() -> None:
    model = joined()
    model.norm.weight.data[[1, 7]] = 0
    model.norm.bias.data[[1, 7]] = values(-1.0, 0.0)  # relu(·) is 0 in both
    model.squeeze.weight.data[3] = 0
    model.squeeze.bias.data[3] = 0.5  # a constant inside the gate
    result = remove(model, x(2, 3, 5, 5))
    assert changes(result) == {
        "a.weight[0]": "1 of 4 removed (position 1): 1 zero",
        "b.weight[0]": "1 of 6 removed (position 3): 1 zero",
        "squeeze.weight[0]": "1 of 4 removed (position 3): 1 constant, taken into the bias behind it",
    }
    assert shapes(result.graph, "norm.weight", "excite.weight", "mixed.weight") == [
        (8,), (8, 3, 1, 1), (8, 8, 1, 1),
    ]  # fmt: skip


def test_a_group_goes_when_all_of_it_is_dead() -> None:
    """``chunk`` ties groups 0 and 2, and 1 and 3; each result group holds three channels."""
    model = joined()
    model.last.weight.data[:, :2] = 0
    assert not remove(model, x(2, 3, 5, 5)).changed  # one channel of the group is still read
    model.last.weight.data[:, 2] = 0
    result = remove(model, x(2, 3, 5, 5))
    assert shapes(result.graph, "mixed.weight", "grouped.weight", "last.weight") == [
        (4, 10, 1, 1), (6, 2, 3, 3), (2, 3, 1, 1),
    ]  # fmt: skip


def test_pools_flatten_and_resampling() -> None:
    model = double(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2, padding=1), nn.Upsample(scale_factor=2),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6 * 16, 5), nn.ReLU(), nn.Linear(5, 2),
    )  # fmt: skip
    graph_input = x(2, 3, 8, 8)
    model[0].weight.data[1] = 0
    model[0].bias.data[1] = 0.5
    model[6].weight.data.view(5, 6, 16)[:, 4] = 0
    model[8].weight.data[:, 2] = 0
    result = remove(model, graph_input)
    assert shapes(result.graph, "0.weight", "6.weight", "8.weight") == [(4, 3, 3, 3), (4, 64), (2, 4)]
    padded = double(nn.Conv2d(3, 6, 3), nn.AvgPool2d(3, padding=1), nn.Conv2d(6, 2, 1))
    padded[0].weight.data[1] = 0
    assert not remove(padded, graph_input).changed


def test_group_norm_reads_whole_groups() -> None:
    model = double(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 2, 1))
    model[2].weight.data[:, 3:6] = 0  # 3, and the group of 4 and 5
    result = remove(model, x(2, 3, 4, 4))
    assert shapes(result.graph, "0.weight", "1.weight", "2.weight") == [(6, 3, 1, 1), (6,), (2, 6, 1, 1)]


def test_weight_norm() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm
    model = double(nn.Linear(3, 6), nn.ReLU(), layer(nn.Linear(6, 2)))
    model[2].parametrizations.weight.original1.data[:, 4] = 0
    result = remove(model, x(2, 3))
    assert shapes(result.graph, "0.weight", "2.parametrizations.weight.original1") == [(5, 3), (2, 5)]


# ---- around it -----------------------------------------------------------------------------------


def test_dynamic_batch() -> None:
    model = residual()
    model.head.weight.data[:, 2] = 0
    model.inner.weight.data[:, 2] = 0
    result = remove(model, x(2, 3, 5, 5), dynamic_batch=True)
    assert_same(result.graph, model, x(7, 3, 5, 5))
    assert result.changed


@pytest.mark.parametrize(
    "order", ["fold-batch-norm,remove-dead-channels", "remove-dead-channels,fold-batch-norm"]
)
def test_with_fold_batch_norm(order: str) -> None:
    model = double(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Conv2d(5, 2, 3, padding=1),
    )  # fmt: skip
    model[1].weight.data[[0, 3]] = 0
    model[1].bias.data[[0, 3]] = values(0.5, -0.5)
    model[4].weight.data[1] = 0
    model[4].bias.data[1] = -0.5
    graph = trace(model, x(2, 3, 8, 8))
    small = Pipeline.parse(order).run(graph, Context()).graph
    assert shapes(small, "0.weight", "3.weight", "6.weight") == [(4, 3, 3, 3), (4, 4, 3, 3), (2, 4, 3, 3)]
    assert_same(small, model, x(2, 3, 8, 8))


def test_a_shared_bias_takes_no_constant() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)
            self.bias = nn.Parameter(torch.zeros(2))
            self.weight = nn.Parameter(torch.zeros(2, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(self.first(x), self.weight, self.bias) * self.bias

    model = randomise(Shared().double())
    model.first.weight.data[1] = 0  # type: ignore[union-attr,operator]
    result = remove(model, x(2, 3))
    assert not result.changed
    assert refusals(result) == ["position 1 constant, but the bias of linear (linear_1) is shared"]


def test_statistical_and_frozen_axes_are_refused_with_their_reason() -> None:
    model = double(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    model[2].weight.data[:, 5] = 0
    model[0].weight.data[:, 3] = 0
    assert refusals(remove(model, x(2, 4))) == [
        "position 5 could go, but the axis is statistical: layer statistics run over it (at layer_norm)",
        "position 3 could go, but the axis is frozen: the caller passes it (at input_1)",
    ]


def test_meta_weights() -> None:
    with torch.device("meta"):
        graph = trace(nn.Sequential(nn.Linear(3, 2)), torch.empty(1, 3))
    result = apply("remove-dead-channels", graph)
    assert not result.changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precisions(dtype: torch.dtype) -> None:
    model = double(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 4)).to(dtype)
    model[0].weight.data[[1, 6]] = 0
    model[2].weight.data[:, 3] = 0
    graph = trace(model, x(3, 6).to(dtype))
    result = apply("remove-dead-channels", graph)
    assert shapes(result.graph, "0.weight", "2.weight") == [(5, 6), (4, 5)]
    assert_same(result.graph, model, x(3, 6).to(dtype), tolerance={torch.float32: 1e-5}.get(dtype, 2e-2))
    assert {t.dtype for t in result.graph.tensors.values()} == {dtype}
