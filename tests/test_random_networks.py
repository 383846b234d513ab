"""Random networks: whatever a rule claims, the network without the positions is the one with them zeroed.

Everything runs in float64, where a right rewrite is off by 1e-12 and a wrong one by much more. The number
of random networks is ``GRAPHPRUNE_FUZZ`` (default 60, and a sixth of that with an open batch); every step on
its own comes besides.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import graphprune
from graphprune.axes.axis import Axis
from graphprune.axes.typing import RULES, Typing
from graphprune.errors import VerificationError
from graphprune.graph import Graph
from graphprune.verify import mask_equivalence
from tests.random_networks import IMAGE, SEQUENCE, Recipe, build, sandwich

EXAMPLES = int(os.environ.get("GRAPHPRUNE_FUZZ", "60"))
TOLERANCE = 1e-8

RECIPES = st.builds(
    Recipe,
    start=st.sampled_from(["image", "image", "sequence", "tokens"]),
    body=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 10**6)), min_size=2, max_size=6).map(tuple),
    turn=st.one_of(st.none(), st.none(), st.integers(1, 5)),
    end=st.integers(0, 3),
)


def check(recipe: Recipe, retrace: bool, say: Callable[[str], None] = print) -> None:
    """Type, prune, compare, prune statistical axes too, and capture what came out once more."""
    model, inputs, names = build(recipe)
    say(f"steps: {' → '.join(names)}")
    graph = graphprune.trace(model, inputs)
    rng = random.Random(repr(recipe))
    for axis in graph.axes.frozen:
        assert axis.reason, f"{axis.name} is frozen without a reason"
    for name in graph.parameters:
        assert graph.explain(name).startswith(name)
    for share in (1.0, 0.5):
        removed = {
            a.name: rng.sample(range(a.size), rng.randint(1, a.size - 1))
            for a in _cuttable(graph)
            if rng.random() <= share
        }
        if not removed:
            continue
        plan = graph.plan(removed)
        small = graph.apply(plan)
        certificate = mask_equivalence(graph, plan, pruned=small, tolerance=TOLERANCE)
        assert certificate.passed, f"{certificate.reason} after {removed}"
    chosen = {a.name: [rng.randrange(a.size)] for a in graph.axes.prunable if a.size > 1}
    if not chosen:
        assert graph.axes.frozen
        return
    small = graph.apply(graph.plan(chosen))
    small.run()
    if retrace:
        _retrace(small, inputs)


def _retrace(small: Graph, inputs: tuple[torch.Tensor, ...]) -> None:
    again = graphprune.trace(small.module, inputs)
    assert sorted(p.shape for p in again.parameters.values()) == sorted(
        p.shape for p in small.parameters.values()
    )
    for ours, theirs in zip(again.run(), small.run(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", IMAGE)
def test_every_step_on_images(name: str) -> None:
    for seed in range(2):
        check(sandwich("image", name, seed), retrace=False)


@pytest.mark.parametrize("name", SEQUENCE)
def test_every_step_on_sequences(name: str) -> None:
    for seed in range(2):
        check(sandwich("sequence", name, seed), retrace=False)


def check_open_batch(recipe: Recipe, say: Callable[[str], None] = print) -> None:
    """With an open batch: compared at the example's size and at three times that; then a second plan."""
    model, inputs, names = build(recipe)
    say(f"steps: {' → '.join(names)}")
    graph = graphprune.trace(model, inputs, dynamic_batch=True)
    assert graph.is_dynamic
    rng = random.Random(repr(recipe))
    removed = {a.name: rng.sample(range(a.size), rng.randint(1, a.size - 1)) for a in _cuttable(graph)}
    if not removed:
        return
    plan = graph.plan(removed)
    small = graph.apply(plan)
    wider = torch.cat([inputs[0], inputs[0].flip(1), inputs[0]])
    certificate = mask_equivalence(graph, plan, [inputs, (wider,)], pruned=small, tolerance=TOLERANCE)
    assert certificate.passed, f"{certificate.reason} after {removed}"
    second = small.plan({a.name: [rng.randrange(a.size)] for a in _cuttable(small)})
    certificate = mask_equivalence(
        graph, graph.compose(plan, second), pruned=small.apply(second), tolerance=TOLERANCE
    )
    assert certificate.passed, f"{certificate.reason} after {removed}, then {second.removed}"


def _cuttable(graph: Graph) -> list[Axis]:
    return [axis for axis in graph.axes.exact if axis.size > 1]


@pytest.mark.timeout(600 + EXAMPLES)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(RECIPES, st.sampled_from([False, False, True]))
def test_random_networks(recipe: Recipe, retrace: bool) -> None:
    check(recipe, retrace, note)


@pytest.mark.timeout(600 + EXAMPLES)
@settings(
    max_examples=EXAMPLES // 6,
    deadline=None,
    derandomize=EXAMPLES <= 60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(RECIPES)
def test_random_networks_with_an_open_batch(recipe: Recipe) -> None:
    check_open_batch(recipe, note)


@pytest.mark.parametrize("name", ["attention", "multihead", "bilinear", "recurrent"])
def test_steps_that_join_the_batch_with_other_dimensions(name: str) -> None:
    check_open_batch(sandwich("sequence", name, 5))


def test_what_random_networks_can_prune() -> None:
    """The check above would pass if everything were frozen: most plain steps leave something exact."""
    for name in ("conv", "grouped", "depthwise", "transposed", "batch_norm", "residual", "concat", "shuffle",
                 "squeeze_excitation", "chunk_gate", "pixel_shuffle", "einsum_mix", "scale"):  # fmt: skip
        model, inputs, _ = build(sandwich("image", name, 0))
        assert graphprune.trace(model, inputs).axes.exact, name
    for name in ("linear", "mlp", "gated_mlp", "attention", "recurrent", "low_rank", "tied", "conv_1d"):
        model, inputs, _ = build(sandwich("sequence", name, 0))
        assert graphprune.trace(model, inputs).axes.exact, name


@pytest.mark.parametrize(
    ("step", "operator"), [("layer_norm", "rms_norm"), ("token_mixer", "linear"), ("bilinear", "bilinear")]
)
def test_a_broken_rule_is_caught(step: str, operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle owes nothing to the rules: a rule that forgets what it relates fails here."""
    target = getattr(torch.ops.aten, operator).default

    def broken(t: Typing, node: torch.fx.Node) -> object:
        return tuple(t.fresh(size, node) for size in t.shape(node))

    check(sandwich("sequence", step, 0), retrace=False)
    monkeypatch.setitem(RULES, target, broken)
    with pytest.raises((AssertionError, VerificationError)):
        check(sandwich("sequence", step, 0), retrace=False)
