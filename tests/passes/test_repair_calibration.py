"""Calibration inputs of repair: what is taken, what is refused, and what is kept in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graphprune.passes.repair import repair
from torch import nn

import graphprune
from graphprune.errors import AxisError, InputError
from graphprune.graph import Graph
from graphprune.plans.plan import Plan
from graphprune.runner import Runner

from .repairing import normal, pruned_residual, trace
from .rewriting import randomise


@pytest.fixture
def pruned() -> Iterator[tuple[Graph, Plan, Graph]]:
    yield from pruned_residual()


def test_kinds_of_inputs(pruned: tuple[Graph, Plan, Graph]) -> None:
    graph, plan, small = pruned
    x = normal(8, 3, 8, 8)
    kinds: list[Any] = [[x], [(x,)], [[x]], [{"x": x}], (batch for batch in [x])]
    assert len({repair(graph, small, plan, kind).graph.fingerprint() for kind in kinds}) == 1


def test_an_endless_generator_ends_at_the_limit(pruned: tuple[Graph, Plan, Graph]) -> None:
    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield normal(8, 3, 8, 8)

    result = repair(*pruned[::2], pruned[1], endless(), limit=20)
    messages = [note.message for note in result.notes if note.where == "calibration"]
    assert messages == ["20 samples in 3 calls", "reading ended at the limit of 20 samples"]


def test_a_fixed_batch_size_gets_pieces_of_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 2))
    x = normal(11, 3, 2, 2)
    graph = trace(model, x[:2])
    plan = graph.plan(ratio=0.5)
    small = graph.apply(plan)
    result = repair(graph, small, plan, [x])
    assert "1 samples left over: the graph takes batches of 2" in [n.message for n in result.notes]
    pieces = repair(graph, small, plan, x[:10].split(2))
    assert result.graph.fingerprint() == pieces.graph.fingerprint()
    with pytest.raises(InputError, match="captured for batches of 2"):
        repair(graph, small, plan, [x[:1]])


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "holds no inputs"),
        (normal(4, 3, 8, 8), "a single Tensor; it must be an iterable"),
        (3, "must be an iterable of inputs, got 3"),
        ([normal(4, 3, 8, 8).float()], "argument 'x': is torch.float32, captured was torch.float64"),
        ([normal(4, 3, 8, 8), normal(4, 2, 8, 8)], r"input 1, argument 'x': has shape \[4, 2, 8, 8\]"),
        ([normal(4, 3, 8)], r"has shape \[4, 3, 8\], the graph takes \[any, 3, 8, 8\]"),
        ([normal(4, 3, 8, 8) / 0], "not finite"),
        ([normal(0, 3, 8, 8)], "an empty batch"),
        ([normal(4, 3, 8, 8).to("meta")], "is on meta, the graph is on cpu"),
        ([(normal(4, 3, 8, 8), torch.zeros(4))], "input 0: 2 positional arguments given"),
        ([{"z": normal(4, 3, 8, 8)}], "without argument 'z'"),
        (["image.png"], "argument 'x' must be a tensor, got str"),
    ],
)  # fmt: skip
def test_calibration_that_cannot_be_used(
    pruned: tuple[Graph, Plan, Graph], calibration: Any, message: str
) -> None:
    graph, plan, small = pruned
    with pytest.raises(InputError, match=message):
        repair(graph, small, plan, calibration)


@pytest.mark.parametrize(
    "options",
    [{"statistics": "new"}, {"ridge": -1.0}, {"sweeps": 0}, {"positions": 0}, {"limit": 0}],
    ids=lambda o: next(iter(o)),
)
def test_options_out_of_range(pruned: tuple[Graph, Plan, Graph], options: dict[str, Any]) -> None:
    graph, plan, small = pruned
    with pytest.raises(InputError, match=next(iter(options))):
        repair(graph, small, plan, [normal(4, 3, 8, 8)], **options)


def test_a_plan_of_another_network(pruned: tuple[Graph, Plan, Graph]) -> None:
    _, plan, small = pruned
    with pytest.raises(AxisError, match="another network"):
        repair(small, small, plan, [normal(4, 3, 8, 8)])


def test_activations_that_overflow_are_refused() -> None:
    model = randomise(nn.Sequential(nn.Linear(3, 8), nn.Hardtanh(-1e30, 1e38), nn.Linear(8, 2)))
    model[2].weight.data *= 1e30
    x = torch.full((4, 3), 1e30)
    graph = graphprune.trace(model, x)
    plan = graph.plan(ratio=0.5)
    result = repair(graph, graph.apply(plan), plan, [x])
    assert not result.changed
    assert any("not finite on calibration inputs" in note.message for note in result.notes)


def test_activations_are_let_go_of() -> None:
    graph = trace(nn.Sequential(*[nn.Linear(3, 3) for _ in range(20)]), normal(2, 3))
    last = [n for n in graph.nodes if n.op == "call_function"]
    runner = Runner(graph, [(normal(2, 3),)] * 2, keep=[last[0]])
    runner.advance(last[10])
    assert [set(values) for values in runner._values] == [{last[0], last[10]}] * 2
    runner.release(last[0])
    assert [set(values) for values in runner._values] == [{last[10]}] * 2
