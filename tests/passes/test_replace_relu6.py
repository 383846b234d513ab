"""``replace-relu6``: what becomes a ReLU, what stays, and how often each was counted to saturate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.pipeline import Context, PassResult, Pipeline
from graphprune.textual import parse_pipeline

from .rewriting import expected, text, trace


class Clamps(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seldom = nn.functional.relu6(x)
        often = nn.functional.hardtanh(x, 0.0, 1.0)
        both = x.clamp(0.0, 8.0) + x.clamp(-1.0, 1.0) + x.clamp(min=0.0)
        return seldom + often + both


def run(graph: Graph, given: torch.Tensor | None, options: str = "") -> PassResult:
    before = graph.fingerprint()
    (step,) = parse_pipeline(f"replace-relu6{options}")
    result = step.run(graph, Context(calibration=None if given is None else [given]))
    assert graph.fingerprint() == before
    assert result.changed == (result.graph is not graph)
    return result


def given() -> torch.Tensor:
    """400 numbers, 1 % of them at 7, a quarter above 1."""
    values = torch.linspace(-2, 0.9, 400)
    values[:100], values[-4:] = 2.0, 7.0
    return values.reshape(4, 100)


def test_what_saturates_seldom_is_a_relu() -> None:
    graph = trace(Clamps(), given()[:4])
    result = run(graph, given(), "{share=0.01}")
    assert text(result.graph) == expected("""
        x: f32[4, 100]
        relu6: f32[4, 100] = relu(x)
        hardtanh: f32[4, 100] = hardtanh(x, 0.0, 1.0)
        clamp: f32[4, 100] = relu(x)
        clamp_1: f32[4, 100] = clamp(x, -1.0, 1.0)
        add: f32[4, 100] = add.Tensor(clamp, clamp_1)
        clamp_2: f32[4, 100] = clamp(x, 0.0)
        add_1: f32[4, 100] = add.Tensor(add, clamp_2)
        add_2: f32[4, 100] = add.Tensor(relu6, hardtanh)
        add_3: f32[4, 100] = add.Tensor(add_2, add_1)
        return (add_3,)
    """)
    assert [(n.kind, n.message) for n in result.notes if n.where != "calibration"] == [
        ("changed", "1.00% of its values reach 6"),
        ("refused", "26.00% of its values reach 1"),
        ("changed", "0.00% of its values reach 8"),
    ]
    small = given().clamp(max=0.99)
    torch.testing.assert_close(result.graph(small), graph(small))


def test_a_share_of_nothing_keeps_what_saturates_at_all() -> None:
    graph = trace(Clamps(), given())
    assert [n.kind for n in run(graph, given(), "{share=0}").notes[1:]] == ["refused", "refused", "changed"]
    assert not run(graph, given() + 100, "{share=0}").changed


def test_it_lets_equalize_through() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU6(), nn.Linear(8, 3))
    graph = trace(model, torch.randn(4, 6))
    context = Context(calibration=[torch.randn(4, 6)])
    alone, behind = (
        Pipeline.parse(p).run(graph, context).graph for p in ("equalize", "replace-relu6,equalize")
    )
    assert alone is graph
    assert not torch.equal(behind.tensors["0.weight"], graph.tensors["0.weight"])


def test_bad_input() -> None:
    graph = trace(Clamps(), given())
    with pytest.raises(PassError, match="needs calibration inputs"):
        run(graph, None)
    with pytest.raises(InputError, match="share must be between 0 and 1"):
        run(graph, given(), "{share=2}")
    plain = trace(nn.ReLU(), given())
    assert run(plain, None).notes[0].message == "no clamp between zero and a number"
