"""What a graph's axes say in words, and calls that no rule can read."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import graphprune
from graphprune.axes.terms import leaves
from graphprune.errors import AxisError
from graphprune.graph import Graph
from graphprune.signature import Signature

aten = torch.ops.aten


class Block(nn.Module):
    """Attention with a fused projection, a tied layer, a norm, a table and a sort."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.again = self.up
        self.rank = nn.Linear(12, 6)
        self.register_buffer("order", torch.arange(12))
        self.register_buffer("gain", torch.rand(20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], 3, 4)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = self.down(self.up(x).relu() * self.gain) + self.down(self.again(x))
        return self.norm(x[..., self.get_buffer("order")]) + self.rank(x).sort(-1).values.sum(
            -1, keepdim=True
        )


@pytest.fixture(scope="module")
def graph() -> graphprune.Graph:
    torch.manual_seed(0)
    return graphprune.trace(Block().eval(), torch.randn(2, 5, 12))


def test_explain_an_axis(graph: graphprune.Graph) -> None:
    text = graph.explain("qkv.weight[0].0")
    assert text.splitlines()[0] == "axis qkv.weight[0].0: 3 positions, exact"
    assert "qkv.weight dim 0: [3]×4+[3]×4+3×4" in text or "qkv.weight dim 0: [3]×4+[3]×4+[3]×4" in text
    assert "out.weight dim 1: [3]×4" in text


def test_explain_a_parameter(graph: graphprune.Graph) -> None:
    lines = graph.explain("down.weight").splitlines()
    assert lines[0] == "down.weight [12, 20]"
    assert "frozen" in lines[1]
    assert lines[2].startswith("  dim 1: axis ")
    assert "20 positions, exact; coupled with " in lines[2]
    assert "gain[0] [20]" in lines[2]


def test_explain_a_frozen_dimension_names_operator_and_reason(graph: graphprune.Graph) -> None:
    (line,) = [t for t in graph.explain("rank.weight").splitlines() if "dim 0" in t]
    assert line == "  dim 0: frozen at sort: the order of its positions matters"
    assert "dim 1: frozen at x: the caller passes it" in graph.explain("qkv.weight")


def test_explain_a_module_and_a_tied_one(graph: graphprune.Graph) -> None:
    text = graph.explain("up")
    assert {line.split()[0] for line in text.splitlines() if not line.startswith(" ")} == {
        "up.weight",
        "up.bias",
    }
    assert graph.explain("again.weight") == graph.explain("up.weight")
    assert graph.explain("again") == text


@pytest.mark.parametrize(
    ("name", "suggested"),
    [("down.wieght", "down.weight"), ("dwn", "down"), ("qkv.weight[0].9", "qkv.weight[0].")],
)
def test_explain_what_is_not_there_suggests(graph: graphprune.Graph, name: str, suggested: str) -> None:
    with pytest.raises(AxisError) as caught:
        graph.explain(name)
    assert f"did you mean '{suggested}" in str(caught.value)


def test_kinds_and_coverage(graph: graphprune.Graph) -> None:
    axes = graph.axes
    assert not axes.statistical  # the norm runs over what the caller sees
    assert sorted(a.size for a in axes.exact) == [3, 4, 4, 12, 20]
    assert {*axes.exact, *axes.statistical, *axes.frozen} == set(axes.values())
    assert axes.unruled == {}
    assert 0 < axes.coverage < 1
    with pytest.raises(AxisError, match="did you mean"):
        axes["qkv.weight"]


def test_integer_buffers_freeze_and_float_buffers_follow(graph: graphprune.Graph) -> None:
    (order, _), *_ = graph.axes.of("order", 0)
    assert order.kind == "frozen"
    (gain, _), *_ = graph.axes.of("gain", 0)
    assert gain.kind == "exact"


def by_hand(*, named: bool) -> Graph:
    """``a.sum(1)`` with its dimension by name or by position, as a program from elsewhere may have it."""
    g, mode = fx.Graph(), FakeTensorMode()
    a = g.get_attr("a")
    a.meta["val"] = mode.from_tensor(torch.zeros(4, 6))
    y = g.call_function(aten.sum.dim_IntList, (a,), {"dim": [1]}) if named else g.call_function(
        aten.sum.dim_IntList, (a, [1]))  # fmt: skip
    y.meta["val"] = mode.from_tensor(torch.zeros(4))
    g.output(())
    return Graph(g, {"a": nn.Parameter(torch.zeros(4, 6))}, Signature((), {}, (), None), ())  # type: ignore[arg-type]


def test_arguments_by_name_are_never_misread() -> None:
    """Rules read arguments by position. A call that names them is frozen, with that as the reason."""
    assert all(axis.prunable for axis in by_hand(named=False).axes.values())
    axes = by_hand(named=True).axes
    assert not axes.prunable
    assert {a.reason for a in axes.frozen} == {"arguments are passed by name where a rule reads positions"}


def test_a_rule_that_crashes_says_where(graph: graphprune.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphprune.axes import typing

    def broken(t: typing.Typing, node: fx.Node) -> typing.Typed:
        raise IndexError("tuple index out of range")

    monkeypatch.setitem(typing._rules(), aten.sort.default, broken)
    with pytest.raises(IndexError) as caught:
        graph.copy().axes.values()
    (note,) = caught.value.__notes__
    assert note.startswith("while typing sort")
    assert "test_typing.py:" in note


def test_results_of_operators_without_a_rule_are_frozen() -> None:
    class Diagonal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.block_diag(self.a(x), self.a(x)))

    axes = graphprune.trace(Diagonal(), torch.randn(2, 4)).axes
    assert axes.unruled == {"block_diag": 1}
    assert not axes.prunable
    assert axes["b.weight[1]"].reason == "comes out of block_diag, which has no rule"


def test_typing_does_not_change_the_graph(graph: graphprune.Graph) -> None:
    copy = graph.copy()
    before = copy.fingerprint()
    assert copy.axes
    assert copy.fingerprint() == before


def test_every_value_has_a_type_of_its_shape(graph: graphprune.Graph) -> None:
    for node, typed in graph.typing.dims.items():
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            assert tuple(t.size for t in typed) == tuple(value.shape), node  # type: ignore[union-attr]
        elif isinstance(value, (tuple, list)):
            assert isinstance(typed, list)
            assert all(user.target is operator.getitem for user in node.users)


def test_atoms_of_tensors_are_axes_and_the_other_way_round(graph: graphprune.Graph) -> None:
    atoms = {a for dims in graph.typing.tensors.values() for t in dims for a in leaves(t)}
    assert atoms == {axis.atom for axis in graph.axes.values()}
    assert all(graph.axes.by_atom[axis.atom] is axis for axis in graph.axes.values())
