"""``remove-dropout``: expected graphs; dropout that is part of the result stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphprune.pipeline import Pipeline
from tests.passes.rewriting import apply, assert_same, expected, refusals, text, trace


def test_every_kind_goes() -> None:
    model = nn.Sequential(
        nn.Dropout(0.3),
        nn.Conv2d(3, 4, 1),
        nn.Dropout2d(),
        nn.ReLU(),
        nn.AlphaDropout(),
        nn.FeatureAlphaDropout(),
    ).eval()
    result = apply("remove-dropout", trace(model, torch.randn(1, 3, 2, 2)))
    assert text(result.graph) == expected("""
        input_1: f32[1, 3, 2, 2]
        conv2d: f32[1, 4, 2, 2] = conv2d(input_1, %1.weight, %1.bias)
        relu: f32[1, 4, 2, 2] = relu(conv2d)
        return (relu,)
    """)
    assert len([n for n in result.notes if n.kind == "changed"]) == 4
    assert_same(result.graph, model, torch.randn(1, 3, 2, 2), tolerance=0)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_dropout_goes(need_weights: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x, x, x, need_weights=need_weights)[0]

    x = torch.randn(1, 3, 8)
    graph = trace(Attention().eval(), x)
    module = graph.module.train()
    assert not torch.equal(module(x), module(x)), "attention dropout follows the mode"
    result = apply("remove-dropout", graph)
    assert [n.message for n in result.notes] == ["removed" if need_weights else "attention dropout removed"]
    module = result.graph.module.train()
    assert torch.equal(module(x), module(x))


def test_monte_carlo_dropout_stays() -> None:
    class Sampling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(x, 0.5, training=True)

    result = apply("remove-dropout", trace(Sampling(), torch.randn(2, 3)))
    assert not result.changed
    assert refusals(result) == ["is on in evaluation mode too, so it is part of the result"]


def test_detach_goes() -> None:
    class Stopped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).detach().relu()

    result = apply("remove-dropout", trace(Stopped(), torch.randn(2, 3)))
    assert "detach" not in text(result.graph)


def test_nothing_to_do_is_said() -> None:
    result = apply("remove-dropout", trace(nn.Linear(2, 2), torch.randn(1, 2)))
    assert not result.changed
    assert result.notes[0].message == "no dropout to remove"


def test_the_trainable_graph_is_the_one_before() -> None:
    graph = trace(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), torch.randn(1, 2))
    result = Pipeline.parse("clean-up,remove-dropout").run(graph)
    assert "dropout" in text(result.trainable)
    assert "dropout" not in text(result.graph)
