"""An expected graph, a comparison with PyTorch, and what must not happen."""

from __future__ import annotations

import pytest
import torch
from graphprune_merge_activations import MergeActivations
from torch import nn

import graphprune
from graphprune.pipeline import Context, PassResult, Pipeline


def run(model: nn.Module, **options: tuple[str, ...]) -> PassResult:
    x = torch.linspace(-9, 9, 37)
    graph = graphprune.trace(model, x)
    result = MergeActivations(**options).run(graph, Context())
    assert torch.equal(result.graph(x), model(x))
    return result


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ((nn.ReLU(), nn.ReLU6()), "clamp(input_1, 0, 6)"),
        ((nn.ReLU6(), nn.Hardtanh(2, 8)), "clamp(input_1, 2, 6)"),
        ((nn.ReLU(), nn.ReLU()), "clamp(input_1, 0, None)"),
        ((nn.Hardtanh(), nn.Hardtanh(2, 3)), "clamp(input_1, 2, 2)"),
        ((nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-1, 4)), "clamp(input_1, 0, 4)"),
    ],
)
def test_merged(layers: tuple[nn.Module, ...], wanted: str) -> None:
    lines = str(run(nn.Sequential(*layers)).graph).splitlines()
    assert len(lines) == 3
    assert lines[1].endswith(f"= {wanted}")


def test_integers_stay_integers() -> None:
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    x = torch.arange(-3, 4)
    result = MergeActivations().run(graphprune.trace(model, x), Context())
    assert torch.equal(result.graph(x), model(x))
    assert result.graph(x).dtype == torch.int64


def test_what_others_read_stays() -> None:
    class Fork(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.relu()
            return nn.functional.relu6(y) + y

    result = run(Fork())
    assert not result.changed
    assert result.notes[0].message == "relu is also read by others"


def test_kept_by_name() -> None:
    assert not run(nn.Sequential(nn.ReLU(), nn.ReLU6()), keep=("relu",)).changed


def test_installed_it_is_a_name_like_any_other() -> None:
    pipeline = Pipeline.parse("clean-up,merge-activations{keep=[other]}")
    assert str(pipeline) == "clean-up,merge-activations{keep=[other]}"
    graph = graphprune.trace(nn.Sequential(nn.ReLU(), nn.ReLU6()), torch.zeros(2))
    assert "clamp(input_1, 0, 6)" in str(pipeline.run(graph).graph)
