"""``fold-constants`` and ``fold-parameters``: expected graphs, size limits, what must not be folded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.passes.rewriting import apply, assert_same, expected, refusals, text, trace


class Positions(nn.Module):
    """Position ids, a mask of literals and a table: what language models compute again on every call."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.register_buffer("table", torch.arange(12.0).view(4, 3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(4) + 1
        mask = torch.triu(torch.full((4, 4), -1.0), diagonal=1)
        return mask @ (x + self.embedding(ids) + self.table * 2)


def test_literals_and_buffers() -> None:
    model, x = Positions(), torch.randn(2, 4, 3)
    result = apply("fold-constants", trace(model, x))
    assert text(result.graph) == expected("""
        x: f32[2, 4, 3]
        embedding: f32[4, 3] = embedding(%embedding.weight, %folded_add)
        add_1: f32[2, 4, 3] = add.Tensor(x, embedding)
        add_2: f32[2, 4, 3] = add.Tensor(add_1, %folded_mul)
        matmul: f32[2, 4, 3] = matmul(%folded_triu, add_2)
        return (matmul,)
    """)
    assert set(result.graph.parameters) == {"embedding.weight"}
    assert result.graph.tensors["folded_add"].tolist() == [1, 2, 3, 4]
    assert_same(result.graph, model, x, tolerance=1e-6)


def test_parameters_too() -> None:
    model, x = Positions(), torch.randn(2, 4, 3)
    result = apply("fold-parameters", trace(model, x))
    assert text(result.graph) == expected("""
        x: f32[2, 4, 3]
        add_1: f32[2, 4, 3] = add.Tensor(x, %embedding.folded_embedding)
        add_2: f32[2, 4, 3] = add.Tensor(add_1, %folded_mul)
        matmul: f32[2, 4, 3] = matmul(%folded_triu, add_2)
        return (matmul,)
    """)
    assert set(result.graph.parameters) == {"embedding.folded_embedding"}
    assert_same(result.graph, model, x, tolerance=1e-6)


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrised_weights_get_their_own_name(wrap: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(4, 4)), nn.ReLU()).eval()
    x = torch.randn(2, 4)
    result = apply("fold-parameters", trace(model, x))
    assert text(result.graph) == expected("""
        input_1: f32[2, 4]
        linear: f32[2, 4] = linear(input_1, %0.weight, %0.bias)
        relu: f32[2, 4] = relu(linear)
        return (relu,)
    """)
    assert set(result.graph.parameters) == {"0.weight", "0.bias"}
    assert_same(result.graph, model, x, tolerance=1e-6)


def test_weight_standardisation() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = self.weight.reshape(1, self.out_channels, -1)
            weight = nn.functional.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
            return self._conv_forward(x, weight, self.bias)

    model, x = Standardised(3, 4, 3), torch.randn(1, 3, 5, 5)
    graph = trace(model, x)
    assert not apply("fold-constants", graph).changed
    result = apply("fold-parameters", graph)
    assert text(result.graph).count(" = ") == 1
    assert_same(result.graph, model, x, tolerance=1e-6)


class Large(nn.Module):
    """A constant of a million numbers out of one of a thousand."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ramp = torch.arange(1000.0).sqrt()
        return x + ramp[:, None] * ramp


def test_what_would_grow_the_file_is_refused_and_its_operands_fold() -> None:
    model, x = Large(), torch.zeros(1000, 1000)
    graph = trace(model, x)
    result = apply("fold-constants", graph)
    assert text(result.graph) == expected("""
        x: f32[1000, 1000]
        mul: f32[1000, 1000] = mul.Tensor(%folded_unsqueeze, %folded_sqrt)
        add: f32[1000, 1000] = add.Tensor(x, mul)
        return (add,)
    """)
    assert refusals(result) == ["is constant, but 4,000,000 bytes larger than what it replaces"]
    assert_same(result.graph, model, x, tolerance=0)
    allowed = apply("fold-constants{max-bytes=4000000}", graph)
    assert not refusals(allowed)
    assert set(allowed.graph.tensors) == {"folded_mul"}


def test_a_tensor_that_stays_does_not_count_as_freed() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.sin()

    x = torch.randn(2, 8)
    assert apply("fold-parameters{max-bytes=0}", trace(Alone(), x)).changed

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x @ self.weight.sin(), self.weight)

    model = Tied()
    result = apply("fold-parameters{max-bytes=127}", trace(model, x))
    assert refusals(result) == ["is constant, but 128 bytes larger than what it replaces"]
    assert not result.changed
    assert apply("fold-parameters{max-bytes=128}", trace(model, x)).changed


KEPT: dict[str, Any] = {
    "random": lambda x: x + torch.rand(3),
    "uninitialised": lambda x: x + torch.empty(3),
    "depends on the input": lambda x: x + torch.zeros_like(x),
    "parameters stay trainable": None,
}


@pytest.mark.parametrize("name", KEPT)
def test_not_folded(name: str) -> None:
    class Program(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            function = KEPT[name]
            return x * self.weight.sin() if function is None else function(x)

    result = apply("fold-constants", trace(Program(), torch.randn(2, 3)))
    assert not result.changed
    assert result.notes[-1].message == "no constant operators to fold"


def test_a_symbolic_size_is_no_constant() -> None:
    class Ramp(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.arange(x.shape[0])[:, None] + torch.arange(3)

    result = apply("fold-constants", trace(Ramp(), torch.randn(2, 3), dynamic_batch=True))
    assert_same(result.graph, Ramp(), torch.randn(5, 3), tolerance=0)
    assert list(result.graph.tensors) == ["folded_arange_1"]


def test_a_constant_output_and_a_split() -> None:
    class Parts(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            a, b = torch.arange(4).split(2)
            return x + a, b

    result = apply("fold-constants", trace(Parts(), torch.randn(2, 2)))
    assert text(result.graph).count(" = ") == 1
    assert_same(result.graph, Parts(), torch.randn(2, 2), tolerance=0)


def test_without_weights_there_is_nothing_to_compute() -> None:
    with torch.device("meta"):
        graph = trace(Positions(), torch.empty(2, 4, 3))
    result = apply("fold-constants", graph)
    assert not result.changed
    assert "shapes only" in result.notes[0].message


@pytest.mark.parametrize("broadcasts", [True, False])
def test_copies_of_a_row_are_kept_once_where_readers_broadcast(broadcasts: bool) -> None:
    class Types(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            row = self.table(torch.zeros(1, 4, dtype=torch.long))
            return x + row if broadcasts else torch.cat([x, row], -1)

    model, x = Types(), torch.randn(1, 4, 3)
    result = apply("fold-parameters", trace(model, x))
    (folded,) = result.graph.tensors.values()
    assert folded.shape == ((1, 1, 3) if broadcasts else (1, 4, 3))
    assert_same(result.graph, model, x, tolerance=0)
