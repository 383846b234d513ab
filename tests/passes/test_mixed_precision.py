"""The fewest operators in float: ranking, search, bounds."""

from __future__ import annotations

import math

import pytest
import torch
from graphprune.passes.mixed_precision import _share
from graphprune.passes.quantize.sensitivity import ranked
from torch import Tensor, nn

import graphprune
from graphprune.errors import InputError, PassError
from graphprune.pipeline import Context
from graphprune.registry import passes
from graphprune.verify import compare

from .quantizing import audit, lossless, run

WIDTH = 16


class Planted(nn.Module):
    """Five linears; the third reads an enormous number that it ignores, and small ones that count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        with torch.no_grad():
            self.layers[1].bias[0] = 3000.0
            self.layers[2].weight[:, 0] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) if layer is not self.layers[1] else layer(x)
        return x


def data(count: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, WIDTH, generator=generator) for _ in range(count)]


def planted() -> graphprune.Graph:
    return lossless(Planted(), torch.zeros(1, WIDTH))


def left_out(done: graphprune.PassResult) -> list[str]:
    """What the ranking marks; the notes must name the same."""
    noted = [note.where for note in done.notes if note.message == "costs too much, stays in float"]
    (ranking,) = done.rankings
    assert list(ranking.chosen) == noted
    return noted


def sqnr(graph: graphprune.Graph, original: graphprune.Graph) -> float:
    calls = [(x,) for x in data()]
    outputs, wanted = ([g.run(*call) for call in calls] for g in (graph, original))
    return compare("pass", outputs, wanted, exact=False).sqnr


def test_the_planted_operator_is_first_and_alone_stays_in_float() -> None:
    graph = planted()
    staged = passes.load("quantize")().staged(graph, Context(calibration=data()))
    rows = ranked(staged, {})
    assert rows[0].node.name == "linear_2"
    assert rows[0].sqnr < rows[1].sqnr - 15
    done = run("mixed-precision", graph, data(), sqnr=25.0)
    assert left_out(done) == ["linear_2"]
    assert sqnr(done.graph, graph) >= 25.0
    assert sqnr(run("quantize", graph, data()).graph, graph) < 25.0
    found = audit(done.graph)
    assert found.macs == {"int8": 4 * WIDTH**2, "float32": WIDTH**2}
    assert not any(row.fell_back for row in found.rows)


def test_a_ranking_agrees_with_quantizing_each_operator_alone() -> None:
    """Independent oracle: the pass itself, with one operator at a time."""
    graph = planted()
    staged = passes.load("quantize")().staged(graph, Context(calibration=data()))
    for row in ranked(staged, {}):
        alone = run("quantize", graph, data(), only=(row.node.name,), rounding="nearest")
        assert sqnr(alone.graph, graph) == pytest.approx(row.sqnr, abs=0.5)


def test_the_ranking_holds_every_operator_in_order() -> None:
    graph = planted()
    (ranking,) = run("mixed-precision", graph, data(), sqnr=25.0).rankings
    assert sorted(row.name for row in ranking.rows) == ["linear", *(f"linear_{i}" for i in range(1, 5))]
    values = [row.value for row in ranking.rows]
    assert values == sorted(values)
    first, second = ranking.rows[:2]
    assert (first.share, first.chosen, first.remark) == (1.0, True, "linear, stays in float")
    assert (second.chosen, second.remark) == (False, "linear")
    assert 20 * math.log10(first.share / second.share) == pytest.approx(second.value - first.value)
    shares = [row.share for row in ranking.rows]
    assert shares == sorted(shares, reverse=True)


def test_bars_are_errors_next_to_the_largest() -> None:
    assert _share(30.0, 10.0) == pytest.approx(0.1)
    assert _share(10.0, 10.0) == 1.0
    assert _share(math.inf, 10.0) == _share(math.inf, math.inf) == _share(10.0, -math.inf) == 0.0
    assert _share(-math.inf, -math.inf) == 1.0


def test_a_score_is_held() -> None:
    graph = planted()
    wanted = torch.cat([graph.run(x)[0] for x in data()])

    def evaluate(module: nn.Module) -> float:
        with torch.no_grad():
            found = torch.cat([module(x) for x in data()])
        return 1.0 - float((found - wanted).norm() / wanted.norm())

    step = passes.load("mixed-precision")(max_drop=0.05)
    done = step.run(graph, Context(calibration=data(), evaluate=evaluate))
    assert evaluate(done.graph.module) >= 0.95
    assert evaluate(run("quantize", graph, data()).graph.module) < 0.95
    assert left_out(done) == ["linear_2"]
    assert "in float 1, all in integers" in done.notes[0].message


def test_nothing_is_left_out_where_nothing_needs_to_be() -> None:
    done = run("mixed-precision", planted(), data(), sqnr=-50.0)
    assert left_out(done) == []
    assert done.notes[0].message.startswith("0 of 5 operators stay in float")


def test_a_bound_that_only_float_meets_leaves_everything_in_float() -> None:
    graph = planted()
    done = run("mixed-precision", graph, data(), sqnr=500.0)
    assert not done.changed
    assert "nothing is in integers" in done.notes[0].message
    assert len(left_out(done)) == len(done.rankings[0].rows) == 5


def test_more_than_may_stay_is_an_error() -> None:
    with pytest.raises(PassError, match="5 of 5 operators would have to stay in float"):
        run("mixed-precision", planted(), data(), sqnr=500.0, most=0.5)


def test_four_bits_fall_back_to_eight() -> None:
    graph = planted()
    four = sqnr(run("quantize", graph, data(), bits=4, ignored=("linear_2",)).graph, graph)
    step = {"bits": 4, "fallback": "int8", "ignored": ("linear_2",)}
    done = run("mixed-precision", graph, data(), sqnr=four + 3, **step)
    widths = [
        int(t.abs().max()) for name, t in done.graph.tensors.items() if name.endswith("weight.integers")
    ]
    assert sorted({width > 7 for width in widths}) == [False, True]
    marked = [row.remark for row in done.rankings[0].rows if row.chosen]
    assert marked
    assert set(marked) == {"linear, stays in int8"}
    assert sqnr(done.graph, graph) >= four + 3


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({}, PassError, "needs a bound"),
        ({"sqnr": 20.0, "max_drop": 0.1}, PassError, "needs a bound"),
        ({"max_drop": 0.1}, PassError, "measured with `evaluate`"),
        ({"sqnr": 20.0, "fallback": "fp16"}, InputError, "fallback must be float or int8"),
        ({"sqnr": 20.0, "fallback": "int8"}, InputError, "fewer bits than 8"),
        ({"sqnr": 20.0, "most": 2.0}, InputError, "share of the operators"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        run("mixed-precision", planted(), data(), **options)


def test_a_score_that_is_no_number() -> None:
    step = passes.load("mixed-precision")(max_drop=0.1)
    with pytest.raises(InputError, match="evaluate gave nan"):
        step.run(planted(), Context(calibration=data(), evaluate=lambda module: float("nan")))
