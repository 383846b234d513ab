"""``remove-dead-channels`` on random networks: exact whatever is damaged, and complete for what is planted.

Exact: random slices of random parameters are set to 0, 1 or far below 0; the eager network is the judge.
Complete: positions of exact axes are set to 0 in every parameter that has them, and all of those have to
go, for every family of operators but the few that no rule of the pass sees through.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from graphprune.passes.dead.constancy import Constancy
from graphprune.passes.dead.liveness import Liveness
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

import graphprune
from tests.passes.plants import damage, kill
from tests.passes.rewriting import apply, assert_same
from tests.random_networks import IMAGE, SEQUENCE, Recipe, build, sandwich
from tests.test_random_networks import RECIPES

EXAMPLES = int(os.environ.get("GRAPHPRUNE_FUZZ", "60")) // 3

# Operators that read everything as far as the pass knows: fold, projected LSTMs, bilinear layers, and those
# for which the order of features matters.
OPAQUE = {"patches", "recurrent", "bilinear", "features_in_order", "unknown"}
FAMILIES = [("image", name) for name in IMAGE] + [("sequence", name) for name in SEQUENCE]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(RECIPES, st.integers(0, 10**6))
def test_exact_on_damaged_networks(recipe: Recipe, seed: int) -> None:
    model, inputs, names = build(recipe)
    note(f"steps: {' → '.join(names)}")
    note(f"damage: {damage(model, random.Random(seed))}")
    with torch.no_grad():
        assume(bool(torch.isfinite(model(*inputs)).all()))
    result = apply("remove-dead-channels", graphprune.trace(model, inputs))
    assert_same(result.graph, model, *inputs)
    again = apply("remove-dead-channels", result.graph)
    assert_same(again.graph, model, *inputs)


@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_all_that_is_planted_goes(family: str, name: str) -> None:
    rng = random.Random(name)
    model, inputs, _ = build(sandwich(family, name, rng.randrange(3)))
    graph = graphprune.trace(model, inputs)
    axes = [axis for axis in graph.axes.exact if axis.size > 1]
    planted = {
        a.name: rng.sample(range(a.size), rng.randint(1, a.size // 2))
        for a in rng.sample(axes, min(len(axes), 3))
    }
    for axis, positions in planted.items():
        kill(graph, graph.axes[axis], positions)
    if not all(bool(torch.isfinite(o).all()) for o in graph.run(*inputs)):
        pytest.skip("a weight norm of 0 is not a number in the original")
    result = apply("remove-dead-channels", graph)
    assert_same(result.graph, model, *inputs)
    dead = Liveness(Constancy(graph)).suppose([axis.atom for axis in graph.axes.exact])
    left = {
        axis: [p for p in positions if dead.keep[graph.axes[axis].atom][p]]
        for axis, positions in planted.items()
        if graph.axes[axis].atom not in dead.spared
    }
    assert name in OPAQUE or not any(left.values()), left
    assert result.changed or not planted or name in OPAQUE
