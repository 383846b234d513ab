"""An operator of one's own: frozen and named while it has no rule, prunable once it has one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import fx, nn

import graphprune
from graphprune.axes import Typed, Typing, rule
from graphprune.axes.typing import RULES, _rules
from graphprune.verify import mask_equivalence


@torch.library.custom_op("graphprune_tests::gated_mix", mutates_args=())
def gated_mix(x: torch.Tensor, gate: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """``x [N, C]`` times a gate ``[C]``, then mixed by ``[C, D]``."""
    return (x * gate.sigmoid()) @ mix


@gated_mix.register_fake
def _(x: torch.Tensor, gate: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], mix.shape[1])


OPERATOR = torch.ops.graphprune_tests.gated_mix.default


def gated_mix_rule(t: Typing, node: fx.Node) -> Typed:
    x, gate, mix = (t.of(a) for a in node.args)
    t.same(x[1], gate[0], node)
    t.same(x[1], mix[0], node)
    return (x[0], mix[1])


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(5, 8), nn.Linear(6, 3)
        self.gate, self.mix = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(gated_mix(self.before(x).relu(), self.gate, self.mix))


@pytest.fixture
def graph() -> Iterator[graphprune.Graph]:
    """The mixer's graph; rules registered meanwhile are forgotten afterwards."""
    known = dict(_rules())
    torch.manual_seed(0)
    yield graphprune.trace(Mixer().eval(), torch.randn(2, 5))
    RULES.clear()
    RULES.update(known)


def test_without_a_rule_it_freezes_what_it_touches_and_is_named(graph: graphprune.Graph) -> None:
    axes = graph.axes
    assert list(axes.unruled.values()) == [1]
    (name,) = axes.unruled
    assert "gated_mix" in name
    assert not axes.prunable
    for tensor, dim in (("before.weight", 0), ("gate", 0), ("mix", 0), ("mix", 1)):
        (axis, _), *_ = axes.of(tensor, dim)
        assert axis.kind == "frozen"
        assert axis.reason == f"no rule for operator {name}"
        assert "gated_mix" in axis.node
    (result, _), *_ = axes.of("after.weight", 1)
    assert result.reason == f"comes out of {name}, which has no rule"
    assert f"no rule for operator {name}" in axes.explain("gate")


def test_with_a_rule_it_prunes_and_is_proved(graph: graphprune.Graph) -> None:
    rule(OPERATOR)(gated_mix_rule)
    axes = graph.axes
    assert not axes.unruled
    assert {a.name: a.size for a in axes.exact} == {"gate[0]": 8, "mix[1]": 6}
    plan = graph.plan({"gate[0]": [0, 3, 7], "mix[1]": [2]})
    small = graph.apply(plan)
    assert small.tensors["mix"].shape == (5, 5)
    assert small.tensors["gate"].shape == (5,)
    certificate = mask_equivalence(graph, plan, [[torch.randn(2, 5)] for _ in range(3)], pruned=small)
    assert certificate.passed
    assert certificate.max_relative < 1e-5


def test_a_rule_that_claims_too_much_is_found_out(graph: graphprune.Graph) -> None:
    """No rule is believed: this one says that a softmax keeps its positions apart."""

    def wrong(t: Typing, node: fx.Node) -> Typed:
        return t.of(node.args[0])

    rule(torch.ops.aten.softmax.int)(wrong)
    model = nn.Sequential(nn.Linear(5, 8), nn.Softmax(-1), nn.Linear(8, 3))
    soft = graphprune.trace(model, torch.randn(2, 5))
    (axis,) = soft.axes.exact
    certificate = mask_equivalence(soft, soft.plan({axis: [0, 1]}))
    assert not certificate.passed
    assert "relative error" in certificate.reason


def test_the_fixture_forgets_rules() -> None:
    assert OPERATOR not in RULES


def test_an_early_rule_is_not_replaced_by_the_built_in_one() -> None:
    """A rule registered before the built-in ones are loaded stands; they load when they are first needed."""
    code = """
import torch
from graphprune.axes import rule
@rule(torch.ops.aten.linear.default)
def mine(t, node): return t.unknown(node)
from graphprune.axes.typing import RULES, _rules
assert _rules()[torch.ops.aten.linear.default] is mine
assert torch.ops.aten.conv2d.default in RULES
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
