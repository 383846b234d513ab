"""What an artifact keeps of its graph: stored, read back, and told from what is not it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphprune
from graphprune import reference
from graphprune.errors import ArtifactError


def trace(model: nn.Module, *args: torch.Tensor):
    torch.manual_seed(0)
    return graphprune.trace(model.eval(), args)


def stored(graph) -> reference.Reference:
    content, reason = reference.make(graph)
    assert content is not None, reason
    return reference.read(content, graph.run())


class Chaotic(nn.Module):
    """Amplifies what float32 rounds by so much that no tolerance holds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(12):
            x = 3.9 * x * (1 - x)
        return x


class Many(nn.Module):
    def forward(self, x: torch.Tensor):
        return x.half(), 3, {"n": x.long(), "b": x > 0}


def quantized():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)).eval()
    inputs = [torch.randn(1, 3, 8, 8) for _ in range(4)]
    result = graphprune.optimize(
        model, inputs[0], precision="int8", calibration=inputs, target="cpu", measure=False
    )
    return result.graph


def test_what_was_stored_reads_back() -> None:
    graph = trace(Many(), torch.randn(2, 3))
    found = stored(graph)
    assert torch.equal(found.inputs[0], graph.examples[0])
    for one, other in zip(found.outputs, graph.run(), strict=True):
        if isinstance(other, torch.Tensor):
            assert one.dtype is other.dtype
            assert torch.equal(one, other)
        else:
            assert one == other


def test_equal_graphs_make_equal_bytes() -> None:
    x = torch.ones(1, 3)
    assert reference.make(trace(nn.Linear(3, 2), x)) == reference.make(trace(nn.Linear(3, 2), x))


def test_a_wrong_answer_fails() -> None:
    graph = trace(nn.Linear(3, 2), torch.ones(1, 3))
    found = stored(graph)
    assert reference.judge(found, graph.run()).passed
    wrong = reference.judge(found, [graph.run()[0] * 1.01])
    assert not wrong.passed
    assert "above" in wrong.reason
    assert not reference.judge(found, [graph.run()[0][:, :1]]).passed
    assert not reference.judge(found, []).passed


def test_rounding_that_a_network_amplifies_is_no_mistake() -> None:
    graph = trace(Chaotic(), torch.linspace(0.1, 0.9, 200))
    found = stored(graph)
    assert found.kind == "float64"
    # Another order of operations, in float32: as good an evaluation as PyTorch's.
    x = graph.examples[0]
    for _ in range(12):
        x = 3.9 * x - 3.9 * (x * x)
    certificate = reference.judge(found, [x])
    assert certificate.max_relative > 1e-6
    assert certificate.passed
    assert not reference.judge(found, [x + 0.1]).passed


def test_integers_may_round_otherwise_by_no_more_than_they_do() -> None:
    graph = quantized()
    found = stored(graph)
    assert found.kind == "float"
    mine, truth = graph.run()[0], graph.floating.run()[0]
    noise = mine - truth
    assert reference.judge(found, [mine]).passed
    half = reference.judge(found, [truth + noise / 2])  # further from the graph than any tolerance of float
    assert half.passed
    assert half.precision.startswith("integers: noise against float")
    assert not reference.judge(found, [truth - noise]).passed  # twice its own noise away
    assert not reference.judge(found, [mine + 10 * noise.abs().max()]).passed


def test_what_is_too_large_is_not_stored(monkeypatch) -> None:
    monkeypatch.setattr(reference, "LIMIT", 100)
    content, reason = reference.make(trace(nn.Identity(), torch.zeros(1, 13)))
    assert content is None
    assert reason == "the example call and its result take 104 bytes, stored are at most 100"


def test_a_graph_that_float64_cannot_run_keeps_its_tolerance(monkeypatch) -> None:
    def refuses(graph):
        raise RuntimeError("no kernel")

    graph = trace(nn.Linear(3, 2), torch.ones(1, 3))
    monkeypatch.setattr(reference, "in_float64", refuses)
    found = stored(graph)
    assert (found.kind, found.truth) == ("", ())
    assert not reference.judge(found, [graph.run()[0] * 1.01]).passed


@pytest.mark.parametrize("damage", [lambda c: c[:20], lambda c: b"", lambda c: b"x" * 50])
def test_a_file_that_is_none_is_an_artifact_error(damage) -> None:
    graph = trace(nn.Linear(3, 2), torch.ones(1, 3))
    content, _ = reference.make(graph)
    with pytest.raises(ArtifactError, match=r"reference\.safetensors does not read"):
        reference.read(damage(content), graph.run())


def test_a_file_of_another_graph_is_an_artifact_error() -> None:
    from graphprune.backend import TensorSpec

    content, _ = reference.make(trace(nn.Linear(3, 2), torch.ones(1, 3)))
    specs = [TensorSpec("a", (1, 2), "float32"), TensorSpec("b", (1, 2), "float32")]
    with pytest.raises(ArtifactError, match="lacks 'b'"):
        reference.read(content, specs)
