"""Plans: what they refuse, what they choose, and that they come back from a file as they were."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphprune
from graphprune.axes.axis import Axis
from graphprune.cost import cost
from graphprune.errors import AxisError, InputError
from graphprune.plans.plan import Plan


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, bias=False), nn.BatchNorm2d(10), nn.ReLU(),
        nn.Conv2d(10, 7, 1), nn.LayerNorm([7, 6, 6]), nn.Flatten(), nn.Linear(252, 4),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def graph() -> graphprune.Graph:
    return graphprune.trace(network(), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        ({"0.wight[0]": [1]}, "no axis is called '0.wight[0]' (did you mean '0.weight[0]'?)"),
        ({"0.weight[1]": [1]}, "axis '0.weight[1]' is frozen: the caller passes it (decided at "),
        ({"0.weight[2]": [1]}, "is frozen: kernel extent (decided at conv2d)"),
        ({"6.weight[0]": [1]}, "is frozen: the caller sees it"),
        ({"0.weight[0]": [0, 10]}, "axis '0.weight[0]' has positions 0 to 9, not 10"),
        ({"0.weight[0]": [-1]}, "not -1"),
        ({"0.weight[0]": range(10)}, "would lose all 10 positions; keep at least one"),
        ({"0.weight[0]": np.arange(10) > 4}, "not a boolean mask"),
        ({"0.weight[0]": torch.arange(10) > 4}, "not a boolean mask"),
        ({"0.weight[0]": [1.0]}, "1.0 is not a position"),
    ],
)
def test_what_a_plan_refuses(graph: graphprune.Graph, removed: dict[Any, Any], words: str) -> None:
    with pytest.raises(AxisError) as caught:
        graph.plan(removed)
    assert words in str(caught.value)


def test_arguments_of_plan(graph: graphprune.Graph) -> None:
    for bad in (
        {"ratio": 1.0},
        {"ratio": -0.1},
        {"ratio": 0.5, "align": 0},
        {"ratio": 0.5, "importance": "best"},
    ):
        with pytest.raises(InputError):
            graph.plan(**bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="either"):
        graph.plan()
    with pytest.raises(InputError, match="either"):
        graph.plan({"0.weight[0]": [1]}, ratio=0.5)


def test_positions_may_be_numbers_of_any_kind_in_any_order(graph: graphprune.Graph) -> None:
    plans = [
        graph.plan({"0.weight[0]": positions})
        for positions in ([4, 1, 1], (1, 4), {4, 1}, np.array([4, 1]), torch.tensor([1, 4]), iter([1, 4]))
    ]
    assert all(p == plans[0] for p in plans)
    assert plans[0].removed == {"0.weight[0]": (1, 4)}
    assert graph.plan({graph.axes["0.weight[0]"]: [1, 4]}) == plans[0]


def test_an_empty_plan_is_false_and_changes_nothing(graph: graphprune.Graph) -> None:
    plan = graph.plan({"0.weight[0]": []})
    assert not plan
    assert plan == graph.plan(ratio=0.0)
    assert graph.apply(plan).fingerprint() == graph.fingerprint()
    assert graph.apply(plan) is not graph


def test_a_ratio_takes_exact_axes_only_unless_asked(graph: graphprune.Graph) -> None:
    assert set(graph.plan(ratio=0.5).removed) == {"0.weight[0]"}
    assert set(graph.plan(ratio=0.5, statistical=True).removed) == {"0.weight[0]", "3.weight[0]"}


@pytest.mark.parametrize(
    ("ratio", "align", "kept"),
    [(0.5, 1, 5), (0.3, 1, 7), (0.7, 1, 3), (0.99, 1, 1), (0.5, 4, 8), (0.7, 8, 8), (0.1, 16, 10)],
)
def test_a_ratio_is_a_share(graph: graphprune.Graph, ratio: float, align: int, kept: int) -> None:
    removed = graph.plan(ratio=ratio, align=align).removed.get("0.weight[0]", ())
    assert 10 - len(removed) == kept


def test_the_least_important_go(graph: graphprune.Graph) -> None:
    """By hand: the norms of what belongs to a channel of the first layer, each by its mean over channels."""
    t = graph.tensors
    members = [t["0.weight"], t["1.weight"], t["1.bias"], t["3.weight"].transpose(0, 1)]
    norms = [m.detach().reshape(10, -1).norm(dim=1) for m in members]
    order = torch.stack([n / n.mean() if n.any() else n for n in norms]).sum(0).argsort()
    expected = sorted(order[:4].tolist())
    assert graph.plan(ratio=0.4, importance="l2").removed["0.weight[0]"] == tuple(expected)


def test_random_importance_is_repeatable(graph: graphprune.Graph) -> None:
    plans = [graph.plan(ratio=0.5, importance="random", seed=s) for s in (1, 1, 2, 3)]
    assert plans[0] == plans[1]
    assert len({p.removed["0.weight[0]"] for p in plans}) > 1


def test_totals_are_those_of_the_pruned_graph(graph: graphprune.Graph) -> None:
    plan = graph.plan(ratio=0.4, statistical=True)
    before, after = cost(graph), cost(graph.apply(plan))
    assert plan.before == {"macs": before.macs, "parameters": before.parameters, "bytes": before.bytes}
    assert plan.after == {"macs": after.macs, "parameters": after.parameters, "bytes": after.bytes}


def test_rows_say_what_an_axis_saves_alone(graph: graphprune.Graph) -> None:
    plan = graph.plan(ratio=0.4, statistical=True)
    for row in plan.rows:
        alone = graph.plan({row.axis: plan.removed[row.axis]})
        assert (row.before, row.after) == (
            graph.axes[row.axis].size,
            row.before - len(plan.removed[row.axis]),
        )
        assert row.macs == alone.before["macs"] - alone.after["macs"]
        assert row.parameters == alone.before["parameters"] - alone.after["parameters"]
        assert row.bytes == alone.before["bytes"] - alone.after["bytes"]


def test_a_plan_prints_its_table(graph: graphprune.Graph) -> None:
    text = str(graph.plan({"0.weight[0]": [1, 4]}))
    head, row, total = text.splitlines()
    assert head.split()[:3] == ["axis", "before", "after"]
    assert row.split()[:3] == ["0.weight[0]", "10", "8"]
    assert total.startswith("whole network: macs ")
    assert len({len(line) for line in (head, row)}) == 1


def test_json_round_trip(graph: graphprune.Graph, tmp_path: Path) -> None:
    plan = graph.plan(ratio=0.5, statistical=True)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert (again.rows, again.before, again.after) == (plan.rows, plan.before, plan.after)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert graph.apply(again).fingerprint() == graph.apply(plan).fingerprint()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"format": 1}', '{"format": "x", "network": "", "removed": {}}',
     '{"format": 1, "network": "", "removed": []}', '{"format": 1, "network": "", "removed": {"a": [null]}}',
     '{"format": 1, "network": "", "removed": {}, "rows": [{"axes": 1}]}'],
)  # fmt: skip
def test_what_is_no_plan(text: str) -> None:
    with pytest.raises(InputError, match="not a plan"):
        Plan.from_json(text)


def test_a_newer_format_is_refused(graph: graphprune.Graph) -> None:
    data = json.loads(graph.plan(ratio=0.5).to_json())
    with pytest.raises(InputError, match="format 2, this version reads up to 1"):
        Plan.from_json(json.dumps({**data, "format": 2}))


def test_another_networks_plan_is_refused(graph: graphprune.Graph) -> None:
    other = graphprune.trace(nn.Sequential(nn.Linear(3, 10), nn.Linear(10, 2)), torch.randn(1, 3))
    with pytest.raises(AxisError, match="another network"):
        other.apply(graph.plan(ratio=0.5))
    pruned = graph.apply(graph.plan(ratio=0.5))
    with pytest.raises(AxisError, match="another network"):
        pruned.apply(graph.plan(ratio=0.5))


@pytest.mark.parametrize(
    "removed",
    [{"0.weight[2]": (1,)}, {"0.weight[0]": (10,)}, {"0.weight[0]": tuple(range(10))}, {"nothing": (1,)}],
)
def test_a_plan_that_was_altered_is_refused(graph: graphprune.Graph, removed: dict[str, Any]) -> None:
    """A plan read from a file is checked like one that is made: its digest covers the network alone."""
    with pytest.raises(AxisError):
        graph.apply(dataclasses.replace(graph.plan(ratio=0.5), removed=removed))


def test_the_same_network_with_other_weights_takes_the_plan(graph: graphprune.Graph) -> None:
    model = network()
    nn.init.normal_(model[0].weight)  # type: ignore[index,arg-type]
    twin = graphprune.trace(model, torch.randn(1, 3, 8, 8))
    assert twin.apply(graph.plan(ratio=0.5)).tensors["0.weight"].shape == (5, 3, 3, 3)


def test_axes_are_values(graph: graphprune.Graph) -> None:
    axis = graph.axes["0.weight[0]"]
    assert isinstance(axis, Axis)
    assert axis.prunable
    assert str(axis) == "0.weight[0]: 10 positions, exact"
    assert [m.tensor for m in axis.members if m.dim == 0][:2] == ["0.weight", "1.weight"]
