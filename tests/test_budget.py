"""Budgets mean what they say: met, by no more than one step; aligned widths; clear errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.cost import cost
from graphprune.errors import InputError, PassError
from graphprune.pipeline import Pipeline
from graphprune.plans.budget import solve
from graphprune.plans.candidates import RESOURCES, Limits


def network() -> nn.Module:
    """Residual and plain convolutions, a depthwise one, and a linear head."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner = nn.Conv2d(width, 2 * width, 3, padding=1)
            self.deep = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
            self.outer = nn.Conv2d(2 * width, width, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.outer(torch.relu(self.deep(torch.relu(self.inner(x)))))

    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), Block(32), nn.Conv2d(32, 48, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def graph() -> graphprune.Graph:
    return graphprune.trace(network(), torch.randn(2, 3, 10, 10))


@settings(max_examples=25, deadline=None)
@given(
    budget=st.floats(0.25, 1.0),
    resource=st.sampled_from(["macs", "params", "bytes"]),
    align=st.sampled_from([1, 4, 8, 16]),
    scope=st.sampled_from(["global", "local"]),
    importance=st.sampled_from(["l1", "l2", "random"]),
)
def test_a_budget_is_met_and_one_step_less_would_not_meet_it(
    graph: graphprune.Graph, budget: float, resource: str, align: int, scope: str, importance: str
) -> None:
    limits = Limits(minimum=0.0, channel_alignment=align, linear_alignment=4)
    plan = solve(graph, {resource: budget}, importance, scope=scope, limits=limits)
    small = graph.apply(plan)
    found = cost(small)
    assert {"macs": found.macs, "parameters": found.parameters, "bytes": found.bytes} == dict(plan.after)
    key = RESOURCES[resource]
    assert plan.after[key] <= budget * plan.before[key]
    for row in plan.rows:
        assert row.after % min(align, 4) == 0
    if not plan:
        return
    # Giving the most important step that went back to its axis must break the budget.
    steps = solve(graph, {resource: min(1.0, budget * 1.0001)}, importance, scope=scope, limits=limits)
    assert steps.after[key] >= plan.after[key]
    larger = solve(graph, {resource: plan.after[key] + 1}, importance, scope=scope, limits=limits)
    assert larger.removed == plan.removed


def test_absolute_and_fractional_budgets_agree(graph: graphprune.Graph) -> None:
    macs = cost(graph).macs
    assert solve(graph, {"macs": 0.5}).removed == solve(graph, {"macs": macs // 2}).removed


def test_every_budget_of_several_is_met(graph: graphprune.Graph) -> None:
    plan = solve(graph, {"macs": 0.6, "params": 0.4})
    assert plan.after["macs"] <= 0.6 * plan.before["macs"]
    assert plan.after["parameters"] <= 0.4 * plan.before["parameters"]


def test_widths_land_on_the_alignment(graph: graphprune.Graph) -> None:
    plan = solve(graph, {"macs": 0.5}, limits=Limits(channel_alignment=16))
    convolutions = [row for row in plan.rows if graph.tensors[row.axis.partition("[")[0]].dim() == 4]
    assert len(convolutions) >= 2
    assert all(row.after % 16 == 0 for row in convolutions)


def test_ignored_axes_keep_every_position(graph: graphprune.Graph) -> None:
    free = solve(graph, {"macs": 0.7})
    assert {"3.inner.weight[0]", "8.weight[0]"} <= set(free.removed)
    plan = solve(graph, {"macs": 0.7}, limits=Limits(ignored=("3.deep", "*10.weight*")))
    assert not {"3.inner.weight[0]", "8.weight[0]"} & set(plan.removed)


def test_the_minimum_is_kept(graph: graphprune.Graph) -> None:
    plan = solve(graph, {"macs": 0.6}, limits=Limits(minimum=0.5))
    assert all(row.after >= row.before / 2 for row in plan.rows)


def test_local_scope_takes_the_same_share_of_each(graph: graphprune.Graph) -> None:
    plan = solve(graph, {"macs": 0.3}, scope="local", limits=Limits(minimum=0.0))
    shares = [row.after / row.before for row in plan.rows]
    assert max(shares) - min(shares) <= 0.05


@pytest.mark.parametrize(
    ("budgets", "options", "message"),
    [
        ({"macs": 0.0}, {}, "must be positive"),
        ({"macs": -3}, {}, "must be positive"),
        ({"macs": 10**12}, {}, "more than the network has"),
        ({"flops": 0.5}, {}, "unknown budget 'flops'"),
        ({}, {}, "give a budget"),
        ({"macs": 0.01}, {}, "cannot be reached; the closest is macs"),
        ({"macs": 0.5}, {"scope": "everywhere"}, "unknown scope"),
        ({"macs": 0.5}, {"importance": "l3"}, "unknown importance 'l3'"),
        ({"macs": 0.5}, {"limits": Limits(ignored=("nothing.like.it",))}, "matches no axis"),
        ({"macs": 0.5}, {"importance": lambda graph, axis: torch.ones(3)}, "finite numbers, got shape"),
    ],
)  # fmt: skip
def test_bad_requests_say_what_to_do(
    graph: graphprune.Graph, budgets: dict[str, float], options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        solve(graph, budgets, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [{"minimum": 1.5}, {"minimum": -0.1}, {"channel_alignment": 0}])
def test_limits_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Limits(**bad)  # type: ignore[arg-type]


def test_the_pass_prunes_in_a_pipeline_and_its_text_round_trips() -> None:
    text = 'prune-channels{macs=0.5 importance=l1 ignored=["10.*"]}'
    pipeline = Pipeline.parse(text)
    assert Pipeline.parse(str(pipeline)) == pipeline
    model = network()
    result = graphprune.optimize(
        model, torch.randn(2, 3, 10, 10), pipeline=f"{text},fold-batch-norm", measure=False
    )
    record = result.report.passes[0]
    assert record.mask is not None
    assert record.mask.exact
    assert record.mask.passed
    assert record.after.macs <= record.before.macs / 2
    assert result.report.final.macs <= result.report.original.macs / 2
    assert "3.inner.weight[0]" in {note.where for note in record.notes}


def test_a_budget_that_already_holds_changes_nothing(graph: graphprune.Graph) -> None:
    result = Pipeline.parse("prune-channels{macs=1.0}").run(graph)
    assert result.graph is graph


def test_the_pass_without_a_budget_is_an_error(graph: graphprune.Graph) -> None:
    with pytest.raises(PassError, match="needs a budget"):
        Pipeline.parse("prune-channels").run(graph)


def test_optimize_takes_a_budget() -> None:
    x = torch.randn(2, 3, 10, 10)
    result = graphprune.optimize(network(), x, macs=0.5, measure=False, target="x86")
    assert result.report.final.macs <= result.report.original.macs / 2
    assert result(x).shape == (2, 10)
    result.module.train()(x).sum().backward()
    assert not list(result.graph.find(torch.ops.aten.batch_norm.default))
    with pytest.raises(InputError, match="both a pipeline and a budget"):
        graphprune.optimize(network(), x, macs=0.5, pipeline="clean-up")
