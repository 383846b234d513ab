"""Instruments: a wrong exact pass is caught, an approximate one is recorded, dumps are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import VerificationError
from graphprune.graph import Graph
from graphprune.instruments import Dump, Recorder
from graphprune.pipeline import Context, Note, Pass, PassResult, Pipeline


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies every weight: claims to be exact, and is not."""

    name: ClassVar[str] = "scale"
    by: float = 1.0

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = graph.copy()
        for name, value in graph.parameters.items():
            result.set_tensor(name, value.detach() * self.by)
        return PassResult(result, True, (Note("changed", "", f"by {self.by}"),))


@dataclass(frozen=True)
class Approximate(Scale):
    """The same, saying so."""

    name: ClassVar[str] = "approximate"
    exact: ClassVar[bool] = False


@pytest.fixture
def graph() -> Graph:
    torch.manual_seed(0)
    return graphprune.trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(3, 8))


def run(graph: Graph, *steps: Pass, **options: object) -> Recorder:
    recorder = Recorder(**options)  # type: ignore[arg-type]
    Pipeline(steps).run(graph, instruments=[recorder])
    return recorder


def test_a_wrong_exact_pass_is_caught(graph: Graph) -> None:
    with pytest.raises(VerificationError, match="pass 'scale' changed the network's outputs: relative error"):
        run(graph, Scale(1.01))


def test_rounding_is_tolerated(graph: Graph) -> None:
    (record,) = run(graph, Scale(1 + 1e-6)).records
    assert record.certificate is not None
    assert record.certificate.passed
    assert 0 < record.certificate.max_relative < 1e-4


def test_an_approximate_pass_is_recorded(graph: Graph) -> None:
    (record,) = run(graph, Approximate(1.1)).records
    assert record.certificate is not None
    assert record.certificate.passed
    assert not record.certificate.exact
    assert 0.05 < record.certificate.max_relative < 0.3
    assert 5 < record.certificate.sqnr < 30
    assert str(record.certificate).startswith("recorded, relative error")
    assert record.text == "approximate{by=1.1}"


def test_an_approximate_pass_that_gives_nan_fails(graph: Graph) -> None:
    with pytest.raises(VerificationError, match="output 0 is not finite where the reference is"):
        run(graph, Approximate(float("nan")))


def test_each_pass_is_compared_with_the_graph_it_was_given(graph: Graph) -> None:
    first, second = run(graph, Approximate(1.5), Scale(1.0)).records
    assert first.certificate is not None
    assert second.certificate is not None
    assert first.certificate.max_relative > 0.1
    assert second.certificate.max_relative == 0


def test_an_error_that_shows_on_other_inputs_only(graph: Graph) -> None:
    @dataclass(frozen=True)
    class Blind(Scale):
        def run(self, graph: Graph, context: Context) -> PassResult:
            result = graph.copy()
            weight = graph.tensors["0.weight"].detach().clone()
            weight[:, 0] = 9
            result.set_tensor("0.weight", weight)
            return PassResult(result, True)

    (example,) = graph.examples
    example[:, 0] = 0
    assert run(graph, Blind()).records[0].certificate is not None
    with pytest.raises(VerificationError):
        run(graph, Blind(), inputs=[graph.examples, (torch.ones(3, 8),)])


def test_switched_off(graph: Graph) -> None:
    (record,) = run(graph, Scale(2.0), verify=False).records
    assert record.certificate is None


def test_without_weights_there_is_nothing_to_compare() -> None:
    with torch.device("meta"):
        graph = graphprune.trace(nn.Linear(2, 2), torch.empty(1, 2))
    (record,) = run(graph, Scale(2.0)).records
    assert record.certificate is None


def test_records_hold_cost_time_and_notes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU()).eval()
    lines: list[str] = []
    graph = graphprune.trace(model, torch.randn(1, 3, 5, 5))
    recorder = Recorder(progress=lines.append)
    Pipeline.parse("clean-up,remove-dropout,fold-batch-norm").run(graph, instruments=[recorder])
    clean, dropout, batch_norm = recorder.records
    assert lines == ["pass clean-up", "pass remove-dropout", "pass fold-batch-norm"]
    assert not clean.changed
    assert clean.certificate is None
    assert (dropout.before.nodes, dropout.after.nodes, batch_norm.after.nodes) == (4, 3, 2)
    assert batch_norm.before.parameters - batch_norm.after.parameters == 8
    assert batch_norm.before.macs == batch_norm.after.macs == 4 * 3 * 3 * 3 * 3 * 3
    assert batch_norm.seconds >= 0
    assert batch_norm.notes[0].message == "1 batch norms folded, 0 left"


def test_dumps(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    graph = graphprune.trace(model, torch.randn(1, 3, 5, 5))
    Pipeline.parse("clean-up,fold-batch-norm").run(graph, instruments=[Dump(tmp_path / "graphs")])
    files = sorted(p.name for p in (tmp_path / "graphs").iterdir())
    assert files == ["00-captured.txt", "01-clean-up.txt", "02-fold-batch-norm.txt"]
    read: Callable[[str], str] = lambda name: (tmp_path / "graphs" / name).read_text()  # noqa: E731
    assert read(files[0]) == read(files[1]) == f"{graph}\n"
    assert "batch_norm" not in read(files[2])


class Amplifies(nn.Module):
    """A large offset added and taken away again: float32 keeps three digits of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.norm(self.conv(x)) + 1e4) - 1e4


def test_float32_rounding_is_settled_in_float64() -> None:
    torch.manual_seed(0)
    model = Amplifies().eval()
    for tensor in (model.norm.weight.data, model.norm.running_mean, model.norm.running_var):
        assert tensor is not None
        tensor.uniform_(0.5, 1.5)
    graph = graphprune.trace(model, torch.randn(2, 3, 128, 128))  # enough that some value rounds otherwise
    recorder = Recorder()
    Pipeline.parse("fold-batch-norm").run(graph, instruments=[recorder])
    certificate = recorder.records[0].certificate
    assert certificate is not None
    assert certificate.passed
    assert certificate.precision == "float64"
    assert certificate.max_relative < 1e-5
    assert str(certificate).endswith("(computed in float64)")
    with pytest.raises(VerificationError):
        run(graph, Scale(1.01))
