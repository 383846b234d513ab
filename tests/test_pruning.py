"""``optimize`` with a budget: rounds, training between them, plans shown first, limits by name."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graphprune.passes.train import Train
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.api import Options
from graphprune.calibration import Replayed, replayed
from graphprune.cost import cost
from graphprune.errors import InputError, PassError
from graphprune.importance import Data
from graphprune.pipeline import LOSSLESS, Context, Pipeline
from graphprune.plans.budget import solve
from graphprune.plans.candidates import Candidates, Limits
from graphprune.plans.plan import Plan
from graphprune.plans.schedule import SCHEDULES, shares


class Small(nn.Module):
    """A residual block behind a batch norm, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 32, 3, padding=1)
        self.outer = nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    made = Small()
    made.norm.running_mean = torch.randn(16)
    made.norm.running_var = torch.rand(16) + 0.5
    return made.eval()


@pytest.fixture(scope="module")
def data() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return list(torch.randn(64, 3, 8, 8).split(16))


X = torch.zeros(2, 3, 8, 8)


# ---- schedules ----------------------------------------


@given(remaining=st.floats(0.01, 1.0), steps=st.integers(1, 12), schedule=st.sampled_from(SCHEDULES))
def test_a_schedule_falls_to_exactly_what_was_asked(remaining: float, steps: int, schedule: str) -> None:
    found = shares(remaining, steps, schedule)
    assert len(found) == steps
    assert found[-1] == remaining
    assert all(a >= b - 1e-12 for a, b in zip([1.0, *found], found, strict=False))


def test_schedules_are_the_papers_curves() -> None:
    assert shares(0.25, 2, "exponential") == [0.5, 0.25]
    assert shares(0.5, 2, "linear") == [0.75, 0.5]
    assert shares(0.5, 3, "constant") == [0.5, 0.5, 0.5]
    # Zhu and Gupta, eq. 1: sparsity s = s_f (1 - (1 - t)^3) from nothing.
    assert shares(0.2, 4, "polynomial")[0] == pytest.approx(1 - 0.8 * (1 - 0.75**3))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0.5, 0, "linear"), "at least 1"),
        ((0.5, 2, "liner"), "did you mean 'linear'"),
        ((0.0, 1, "linear"), "above 0"),
    ],
)
def test_a_schedule_out_of_range_is_an_error(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        shares(*arguments)


# ---- rounds ----------------------------------------


def test_rounds_prune_repair_and_train_until_the_budget_is_met(
    model: nn.Module, data: list[torch.Tensor]
) -> None:
    seen: list[tuple[int, int]] = []

    def train(module: nn.Module, step: int) -> None:
        seen.append((step, sum(p.numel() for p in module.parameters())))
        optimizer = torch.optim.SGD(module.parameters(), 0.01)
        module.train()
        module(data[0]).square().mean().backward()
        optimizer.step()

    before = cost(graphprune.trace(model, X)).macs
    result = graphprune.optimize(
        model, X, calibration=iter(data), macs=0.4, steps=3, schedule="linear", callback=train,
        target=graphprune.Target("unaligned", "x86_64", channel_alignment=1, linear_alignment=1),
        measure=False, dynamic_batch=True,
    )  # fmt: skip
    assert [step for step, _ in seen] == [1, 2, 3]
    assert [size for _, size in seen] == sorted((size for _, size in seen), reverse=True)
    names = [str(record.text).split("{")[0] for record in result.report.passes]
    assert names[:9] == ["prune-channels", "repair", "train"] * 3
    assert cost(result.graph).macs <= 0.4 * before
    assert cost(result.graph).macs > 0.3 * before
    for record in result.report.passes:
        if record.text.startswith("prune-channels"):
            assert record.mask is not None
            assert record.mask.passed


def test_one_call_prunes_and_repairs_better_than_without_repair(
    model: nn.Module, data: list[torch.Tensor]
) -> None:
    torch.manual_seed(2)
    x = torch.randn(32, 3, 8, 8)
    wanted = model(x).detach()

    def error(**options: Any) -> float:
        result = graphprune.optimize(
            model, X, calibration=data, macs=0.4, measure=False, dynamic_batch=True, **options
        )
        return float((result(x) - wanted).norm() / wanted.norm())

    assert error() < 0.5 * error(repair=False)


def test_dry_run_shows_the_plan_that_would_be_carried_out(model: nn.Module, data: list[torch.Tensor]) -> None:
    plan = graphprune.optimize(model, X, calibration=data, macs=0.5, dry_run=True, dynamic_batch=True)
    assert isinstance(plan, Plan)
    assert plan.after["macs"] <= 0.5 * plan.before["macs"]
    done = graphprune.optimize(model, X, calibration=data, macs=0.5, measure=False, dynamic_batch=True)
    assert cost(done.graph).macs == plan.after["macs"]
    assert graphprune.Plan.from_json(plan.to_json()) == plan


def test_what_makes_no_sense_is_said_before_anything_runs(model: nn.Module, data: list[torch.Tensor]) -> None:
    for options, words in (
        ({"steps": 2}, "go with a budget"),
        ({"callback": print}, "go with a budget"),
        ({"macs": 0.5, "steps": 0}, "at least 1"),
        ({"macs": 0.5, "steps": 2, "schedule": "agp"}, "unknown schedule"),
        ({"macs": 0.5, "pipeline": LOSSLESS}, "both a pipeline and a budget"),
        ({"latency": 0.5, "steps": 2}, "in one step"),
        ({"macs": 10**12}, "more than the network has"),
        ({"macs": -1.0}, "must be positive"),
        ({"macs": 0.001}, "cannot be reached; the closest is"),
        ({"dry_run": True}, "nothing is pruned"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            graphprune.optimize(model, X, calibration=data, measure=False, **options)  # type: ignore[call-overload]


def test_the_keywords_for_type_checkers_are_those_of_the_function() -> None:
    import inspect

    parameters = inspect.signature(graphprune.optimize).parameters
    given = {name for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert set(Options.__annotations__) | {"dry_run"} == given


# ---- training ----------------------------------------


def test_train_leaves_the_graph_it_was_given_alone(model: nn.Module) -> None:
    graph = graphprune.trace(model, X)
    before = graph.fingerprint()

    def double(module: nn.Module, step: int) -> None:
        with torch.no_grad():
            module.head.weight.mul_(2)

    result = Train(double).run(graph, Context())
    assert result.changed
    assert graph.fingerprint() == before
    assert torch.equal(result.graph.tensors["head.weight"], 2 * graph.tensors["head.weight"])
    assert not Train(lambda module, step: None).run(graph, Context()).changed


def test_train_refuses_what_is_no_training(model: nn.Module) -> None:
    graph = graphprune.trace(model, X)

    def diverge(module: nn.Module, step: int) -> None:
        with torch.no_grad():
            module.head.bias.fill_(float("nan"))

    with pytest.raises(PassError, match=r"'head.bias' is not finite"):
        Train(diverge).run(graph, Context())
    with pytest.raises(PassError, match="only Python can give"):
        Pipeline.parse("train").run(graph)


# ---- limits ----------------------------------------


def test_limits_by_name_and_number(model: nn.Module) -> None:
    graph = graphprune.trace(model, X)
    limits = Limits(minimum={"inner.weight[0]": 20, "*": 0.25}, maximum={"stem": 12, "*": 1.0})
    plan = solve(graph, {"macs": 0.7}, limits=limits)
    sizes = {row.axis: row.after for row in plan.rows}
    assert sizes["inner.weight[0]"] >= 20
    assert 4 <= sizes["stem.weight[0]"] <= 12
    only = solve(graph, {"macs": 0.6}, limits=Limits(only=("inner",)))
    assert set(only.removed) == {"inner.weight[0]"}
    forced = solve(graph, {"macs": 1.0}, limits=Limits(maximum={"inner": 8}))
    assert [(row.axis, row.after) for row in forced.rows] == [("inner.weight[0]", 8)]


@pytest.mark.parametrize("what", ["ignored", "only"])
def test_a_name_that_matches_nothing_is_an_error(model: nn.Module, what: str) -> None:
    graph = graphprune.trace(model, X)
    with pytest.raises(InputError, match=rf"{what} name 'layer9\.\*' matches no axis"):
        solve(graph, {"macs": 0.5}, limits=Limits(**{what: ("layer9.*",)}))
    with pytest.raises(InputError, match="minimum name 'layer9' matches no axis"):
        solve(graph, {"macs": 0.5}, limits=Limits(minimum={"layer9": 0.5}))


@pytest.mark.parametrize("value", [-0.1, 1.5, True])
def test_a_limit_that_is_neither_share_nor_number_is_an_error(value: float) -> None:
    with pytest.raises(InputError, match="minimum is a share"):
        Limits(minimum=value)


def test_scopes_differ_and_isomorphic_axes_shrink_alike() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for scale in (1.0, 30.0):  # the second pair is louder: one queue would empty the first
        layers += [nn.Conv2d(8, 8, 1), nn.ReLU()]
        with torch.no_grad():
            layers[-2].weight.mul_(scale)  # type: ignore[union-attr]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), *layers, nn.Flatten(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 2)
    )
    graph = graphprune.trace(model.eval(), torch.zeros(1, 3, 2, 2))

    def left(scope: str) -> dict[str, float]:
        plan = solve(graph, {"params": 0.5}, "l1", scope=scope, limits=Limits(minimum=0.0))
        gone = {axis.name: 0 for axis in graph.axes.exact}
        return {**gone, **{row.axis: 1 - row.after / row.before for row in plan.rows}}

    local = left("local")
    assert max(local.values()) - min(local.values()) <= 1 / 8 + 1e-9
    kinds = left("isomorphic")
    hidden = kinds.pop("6.weight[0]") if "6.weight[0]" in kinds else kinds.pop("7.weight[0]")
    whole = sum(kinds.values()) / len(kinds)
    assert abs(hidden - whole) <= 1 / 8 + 1e-9
    with pytest.raises(InputError, match="unknown scope"):
        left("everywhere")


# ---- the solver's speed and calibration given once ----------------------------------------


def test_a_plan_for_a_thousand_axes_takes_about_a_second() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(1001)])
    graph = graphprune.trace(model, torch.zeros(1, 64, device="meta"))
    assert len(graph.axes.exact) == 1000
    candidates = Candidates.of(graph, "random", limits=Limits())
    started = time.process_time()
    priced = Candidates(graph, candidates.steps, {}, "global", True, candidates.model)
    queue = priced.queue({}, {"macs": 1.0})
    count = queue.first(lambda k: queue.totals(k)["macs"] <= 0.5 * queue.totals(0)["macs"])
    plan = queue.plan(count)
    assert time.process_time() - started < 3  # 0.8 s of a free core; on a busy one less than thrice that
    assert plan.after["macs"] <= 0.5 * plan.before["macs"]


def test_an_iterator_can_be_read_twice() -> None:
    source: Iterator[int] = iter(range(5))
    again = replayed(source)
    assert isinstance(again, Replayed)
    assert [n for n, _ in zip(again, range(2), strict=False)] == [0, 1]
    assert list(again) == list(again) == [0, 1, 2, 3, 4]
    known = [1, 2]
    assert replayed(known) is known


def test_data_is_read_up_to_its_limit(model: nn.Module, data: list[torch.Tensor]) -> None:
    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield data[0]

    graph = graphprune.trace(model, X, dynamic_batch=True)
    plan = solve(graph, {"macs": 0.5}, "reconstruction", data=Data(endless(), limit=32))
    assert plan
