"""Pipelines: order, errors that name the pass, results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.pipeline import INITIAL, Context, Note, Pass, PassResult, Pipeline


@dataclass(frozen=True)
class Same(Pass):
    """Changes nothing."""

    name: ClassVar[str] = "same"

    def run(self, graph: Graph, context: Context) -> PassResult:
        return PassResult(graph, False, (Note("info", "", "nothing"),))


@dataclass(frozen=True)
class Quantized(Same):
    """Ends ``float``."""

    name: ClassVar[str] = "quantized"
    ensures: ClassVar[frozenset[str]] = frozenset({"quantized"})
    destroys: ClassVar[frozenset[str]] = frozenset({"float", "trainable"})


@dataclass(frozen=True)
class NeedsFloat(Same):
    """Needs what :class:`Quantized` ends."""

    name: ClassVar[str] = "needs-float"
    requires: ClassVar[frozenset[str]] = frozenset({"float"})


@dataclass(frozen=True)
class NeedsQuantized(Same):
    """Needs what nothing has at first."""

    name: ClassVar[str] = "needs-quantized"
    requires: ClassVar[frozenset[str]] = frozenset({"quantized"})


@dataclass(frozen=True)
class Copies(Same):
    """A new graph each time."""

    name: ClassVar[str] = "copies"

    def run(self, graph: Graph, context: Context) -> PassResult:
        return PassResult(graph.copy(), True)


@dataclass(frozen=True)
class Fails(Same):
    """Raises."""

    name: ClassVar[str] = "fails"
    deliberate: bool = False

    def run(self, graph: Graph, context: Context) -> PassResult:
        if self.deliberate:
            raise PassError(self.name, "has no data", node="conv2d")
        raise ZeroDivisionError("a mistake")


@pytest.fixture
def graph() -> Graph:
    return graphprune.trace(nn.Linear(2, 2), torch.zeros(1, 2))


def test_a_possible_order_passes() -> None:
    Pipeline((NeedsFloat(), Quantized(), NeedsQuantized())).check()
    assert {"float", "batch-norm", "trainable"} == INITIAL


def test_what_was_ended_is_named_with_who_ended_it(graph: Graph) -> None:
    message = r"pass 'needs-float': needs float \(ended by 'quantized'\); change the order"
    with pytest.raises(PassError, match=message):
        Pipeline((Quantized(), NeedsFloat())).run(graph)


def test_what_was_never_there(graph: Graph) -> None:
    with pytest.raises(PassError, match="pass 'needs-quantized': needs quantized; change the order"):
        Pipeline((NeedsQuantized(), Quantized())).run(graph)


def test_the_order_is_checked_before_anything_runs(graph: Graph) -> None:
    with pytest.raises(PassError, match="needs-quantized"):
        Pipeline((Fails(), NeedsQuantized())).run(graph)


def test_a_defect_in_a_pass_names_the_pass(graph: Graph) -> None:
    with pytest.raises(PassError, match="pass 'fails': ZeroDivisionError: a mistake") as caught:
        Pipeline((Same(), Fails())).run(graph)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.exit_code == 5


def test_a_deliberate_error_names_pass_and_node(graph: Graph) -> None:
    with pytest.raises(PassError, match="pass 'fails' at node 'conv2d': has no data"):
        Pipeline((Fails(deliberate=True),)).run(graph)


def test_other_deliberate_errors_come_through(graph: Graph) -> None:
    class Refuses(Same):
        def run(self, graph: Graph, context: Context) -> PassResult:
            raise InputError("no calibration data")

    with pytest.raises(InputError, match="no calibration data"):
        Pipeline((Refuses(),)).run(graph)


def test_the_trainable_graph_is_the_last_before_training_ends(graph: Graph) -> None:
    result = Pipeline((Copies(), Quantized(), Copies())).run(graph)
    assert result.graph is not result.trainable
    assert result.trainable is not graph
    only = Pipeline((Copies(), Copies())).run(graph)
    assert only.graph is only.trainable


def test_an_empty_pipeline_gives_the_graph_back(graph: Graph) -> None:
    assert Pipeline(()).run(graph).graph is graph


def test_instruments_stand_around_every_pass(graph: Graph) -> None:
    seen: list[str] = []

    class Watch:
        def before(self, step: Pass, graph: Graph) -> None:
            seen.append(f"before {step.name}")

        def after(self, step: Pass, graph: Graph, result: PassResult) -> None:
            assert result.graph is graph or result.changed
            seen.append(f"after {step.name}")

    Pipeline((Same(), Copies())).run(graph, instruments=[Watch()])
    assert seen == ["before same", "after same", "before copies", "after copies"]


def test_the_real_lossless_order() -> None:
    text = "clean-up,fold-constants,remove-dropout,fold-parameters,fold-batch-norm,clean-up"
    pipeline = Pipeline.parse(text)
    pipeline.check()
    assert str(pipeline) == text


def test_passes_are_values() -> None:
    assert Fails(deliberate=True) == Fails(deliberate=True)
    assert hash(Fails()) == hash(Fails())
    with pytest.raises(AttributeError):
        Fails().deliberate = True  # type: ignore[misc]
