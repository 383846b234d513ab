"""Repair as a pass: what a graph remembers of its removal, in one step, in several, and after training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from graphprune.passes.repair import repair
from torch import nn

import graphprune
from graphprune.errors import InputError
from graphprune.graph import Graph
from graphprune.instruments import Recorder
from graphprune.pipeline import Context, Pipeline
from graphprune.plans.rewrite import compose

from .repairing import Residual, error, fold, normal, trace
from .rewriting import randomise


def network() -> Graph:
    return trace(Residual(), normal(2, 3, 8, 8), dynamic_batch=True)


def run(text: str, graph: Graph, *calibration: torch.Tensor, **options: Any) -> tuple[Graph, list[str]]:
    """The graph after a pipeline, and what was noted."""
    recorder = Recorder()
    context = Context(calibration=list(calibration) or None, **options)
    result = Pipeline.parse(text).run(graph, context, [recorder])
    return result.graph, [note.message for record in recorder.records for note in record.notes]


def test_in_a_pipeline_it_is_the_function() -> None:
    graph, x = network(), normal(48, 3, 8, 8)
    pruned, _ = run("prune-channels{macs=0.5 importance=l2}", graph)
    repaired, notes = run(
        "prune-channels{macs=0.5 importance=l2},repair{ridge=0.01 positions=none}", graph, x
    )
    assert pruned.removal is not None
    wanted = repair(graph, pruned, pruned.removal.plan, [x], ridge=0.01, positions=None)
    assert repaired.fingerprint() == wanted.graph.fingerprint()
    assert [note.message for note in wanted.notes] == notes[-len(wanted.notes) :]
    held_out = normal(64, 3, 8, 8, seed=9)
    assert error(graph, repaired, held_out) < 0.6 * error(graph, pruned, held_out)


def test_the_seed_is_the_contexts() -> None:
    graph, x = network(), normal(16, 3, 8, 8)
    text = "prune-channels{macs=0.5 importance=l2},repair{positions=5}"
    prints = {run(text, graph, x, seed=seed)[0].fingerprint() for seed in (0, 0, 1)}
    assert len(prints) == 2


def test_nothing_removed_is_said() -> None:
    graph = network()
    result, notes = run("repair", graph, normal(4, 3, 8, 8))
    assert result is graph
    assert notes == ["nothing was removed from this network, so there is nothing to repair"]


def test_without_data_it_says_what_it_rests_on() -> None:
    graph = network()
    pruned, _ = run("prune-channels{macs=0.5 importance=l2}", graph)
    result, notes = run("prune-channels{macs=0.5 importance=l2},repair", graph)
    assert any("no calibration: 2 operators compensated from batch norms alone" in note for note in notes)
    wanted = repair(graph, pruned, pruned.removal.plan, None).graph  # type: ignore[union-attr]
    assert result.fingerprint() == wanted.fingerprint() != pruned.fingerprint()


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "calibration holds no inputs"),
        ([normal(4, 3, 8, 8) * float("nan")], "input 0, argument 'x': holds values that are not finite"),
        ([normal(4, 3, 7, 8)], r"has shape \[4, 3, 7, 8\], the graph takes \[any, 3, 8, 8\]"),
    ],
)
def test_calibration_that_cannot_be_used(calibration: list[torch.Tensor], message: str) -> None:
    graph = network()
    pipeline = Pipeline.parse("prune-channels{macs=0.5 importance=l2},repair")
    with pytest.raises(InputError, match=message):
        pipeline.run(graph, Context(calibration=calibration))


# ---- what a graph remembers ------------------------------------------------------------------------------


def test_a_removal_is_remembered_without_copies() -> None:
    graph = network()
    plan = graph.plan(ratio=0.5)
    small = graph.apply(plan)
    assert graph.removal is None
    for kept in (small, small.copy(), small.module.captured, copy.deepcopy(small.module).captured):
        assert kept.removal is not None
        assert kept.removal.plan == plan
        original = kept.removal.original
        assert original.fx is graph.fx
        assert all(original.tensors[name] is tensor for name, tensor in graph.tensors.items())
    assert copy.deepcopy(small.removal) is small.removal
    alone = small.copy()
    alone.removal = None
    assert small.fingerprint() == alone.fingerprint()
    assert "removal" not in repr(small)


def test_training_the_original_later_leaves_the_target() -> None:
    graph = network()
    small = graph.apply(graph.plan(ratio=0.5))
    with torch.no_grad():
        for parameter in graph.module.parameters():
            parameter.zero_()
    x = normal(32, 3, 8, 8)
    assert small.removal is not None
    assert float(small.removal.original(x).abs().sum()) > 0
    assert run("repair", small, x)[0] is not small


def test_steps_compose_into_one_removal() -> None:
    graph = network()
    first = graph.plan({"stem.weight[0]": [0, 5], "conv1.weight[0]": [1]})
    small = graph.apply(first)
    second = small.plan({"stem.weight[0]": [1, 2], "conv1.weight[0]": [0, 6]})
    smaller = small.apply(second)
    assert smaller.removal is not None
    assert smaller.removal.original.fx is graph.fx
    assert smaller.removal.plan == compose(graph, first, second)
    assert dict(smaller.removal.plan.removed) == {
        "stem.weight[0]": (0, 2, 3, 5), "conv1.weight[0]": (0, 1, 7),
    }  # fmt: skip


def test_pruning_and_repairing_by_turns_is_held_to_the_first_network() -> None:
    graph, x = network(), normal(128, 3, 8, 8)
    step = "prune-channels{macs=0.7 align=1 importance=l2},repair"
    result, notes = run(f"{step},{step},{step}", graph, x)
    assert not any("target is unknown" in note or "later network" in note for note in notes)
    assert sum("refitted on" in note for note in notes) >= 6
    removal = result.removal
    assert removal is not None
    assert removal.original.fx is graph.fx
    for name, value in result.tensors.items():
        if name in removal.refitted:
            assert torch.equal(removal.refitted[name], value)
    pruned = graph.apply(removal.plan)
    held_out = normal(64, 3, 8, 8, seed=9)
    assert {n: t.shape for n, t in pruned.tensors.items()} == {n: t.shape for n, t in result.tensors.items()}
    assert error(graph, result, held_out) < 0.8 * error(graph, pruned, held_out)


def test_statistics_are_corrected_from_the_first_networks_however_often() -> None:
    graph, x = network(), normal(64, 3, 8, 8)
    once, _ = run("prune-channels{macs=0.5 importance=l2},repair{ridge=0.0}", graph, x)
    twice, notes = run("repair{ridge=0.0}", once, x)
    assert not any("target is unknown" in note for note in notes)
    for name in once.buffers:
        assert torch.allclose(once.tensors[name], twice.tensors[name], rtol=1e-6, atol=1e-8), name


def test_a_bias_that_a_repair_added_is_fitted_again() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6, bias=False), nn.Tanh(), nn.Linear(6, 2))
    x = normal(200, 3)
    graph = trace(model, x[:2], dynamic_batch=True)
    step = Pipeline.parse("repair{add-bias=true}")
    context = Context(calibration=[x])
    once = step.run(graph.apply(graph.plan({"0.weight[0]": [1, 2]})), context).graph
    again = once.apply(once.plan({"0.weight[0]": [0], "2.weight[0]": [3]}))
    assert again.removal is not None
    assert set(again.removal.refitted) == {"2.weight", "2.bias", "4.weight", "4.bias"}
    twice = step.run(again, context).graph
    assert len(twice.tensors["2.bias"]) == 5
    assert not torch.equal(twice.tensors["2.bias"], again.tensors["2.bias"])
    assert error(graph, twice, x) < error(graph, again, x)


def test_without_data_means_are_not_counted_twice() -> None:
    model = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)
    )
    graph = trace(model, normal(4, 3))
    small = graph.apply(graph.plan({"0.weight[0]": [1, 2]}))
    again, _ = run("repair,repair", small)
    once, _ = run("repair", small)
    assert once.fingerprint() == again.fingerprint() != small.fingerprint()
    further = once.apply(once.plan({"0.weight[0]": [3]}))
    steps, _ = run("repair", further)
    whole, _ = run("repair", graph.apply(further.removal.plan))  # type: ignore[union-attr]
    assert all(torch.allclose(t, whole.tensors[n], rtol=1e-12) for n, t in steps.tensors.items())


def test_weights_fitted_on_inputs_are_not_compensated_without() -> None:
    graph = network()
    fitted, _ = run("prune-channels{macs=0.5 importance=l2},repair", graph, normal(32, 3, 8, 8))
    again, notes = run("repair", fitted)
    assert again is fitted
    assert any("was fitted on inputs before" in note for note in notes)


# ---- weights that are others by now ------------------------------------------------------------------------


def trained(graph: Graph) -> Graph:
    """The graph after a step of training of everything."""
    module = graph.module
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.01 * parameter.abs().mean()
    return module.captured


@pytest.mark.parametrize(
    "first", ["prune-channels{macs=0.5 importance=l2}", "prune-channels{macs=0.5 importance=l2},repair"]
)
def test_trained_weights_are_refused(first: str) -> None:
    x = normal(32, 3, 8, 8)
    pruned, _ = run(first, network(), x)
    graph = trained(pruned)
    result, notes = run("repair{statistics=kept}", graph, x)
    assert result is graph
    assert sum("is not the original's any more" in note for note in notes) == 3 + 1  # the stem, too


def test_after_training_a_removal_starts_anew() -> None:
    x = normal(64, 3, 8, 8)
    pruned, _ = run("prune-channels{macs=0.7 importance=l2},repair", network(), x)
    graph = trained(pruned)
    result, notes = run("prune-channels{macs=0.7 importance=l2},repair", graph, x)
    assert any("was changed after the removal before" in note for note in notes)
    assert not any("target is unknown" in note for note in notes)
    smaller = graph.apply(result.removal.plan)  # type: ignore[union-attr]
    assert error(graph, result, normal(64, 3, 8, 8, seed=9)) < error(
        graph, smaller, normal(64, 3, 8, 8, seed=9)
    )


def test_a_network_folded_between_two_removals_is_the_next_ones_target() -> None:
    x = normal(64, 3, 8, 8)
    pruned, _ = run("prune-channels{macs=0.7 importance=l2},repair", network(), x)
    folded = fold(pruned)
    result, notes = run("prune-channels{macs=0.7 importance=l2},repair", folded, x)
    assert any("repaired to a later network" in note for note in notes)
    assert result.removal is not None
    assert result.removal.original.fx is folded.fx


# ---- dead channels ---------------------------------------------------------------------------------------


class Constant(nn.Module):
    """A channel that is 1.5 whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.middle(torch.relu(self.first(x)))))


def with_constant() -> Graph:
    model = Constant().double()
    randomise(model)
    with torch.no_grad():
        model.first.weight[2], model.first.bias[2] = 0, 1.5
    return graphprune.trace(model, normal(4, 3), dynamic_batch=True)


@pytest.mark.parametrize("before", ["", "prune-channels{macs=0.8 importance=l2},repair,"])
def test_a_constant_taken_into_a_bias_is_not_counted_twice(before: str) -> None:
    graph, x = with_constant(), normal(200, 3)
    dead, _ = run(f"{before}remove-dead-channels", graph, x)
    start = run(before[:-1], graph, x)[0] if before else graph
    assert len(dead.tensors["first.bias"]) == len(start.tensors["first.bias"]) - 1
    result, notes = run("prune-channels{macs=0.7 importance=l2},repair{ridge=0.0}", dead, x)
    assert not any("target is unknown" in note or "later network" in note for note in notes)
    target = result.removal.original  # type: ignore[union-attr]
    assert error(graph, target, x) < 1e-12
    last = result.tensors["last.weight"]
    assert not torch.equal(last, dead.tensors["last.weight"][:, : last.shape[1]])
