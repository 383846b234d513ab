"""The dependency graph holds exactly what the axes say, and every way it is written can be read again."""

from __future__ import annotations

import json
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.axes.dependency import selection, to_dot, to_json, to_svg, write
from graphprune.axes.drawing import ROW, _apart, layout
from graphprune.errors import InputError, MissingExtraError
from graphprune.graph import Graph


class Block(nn.Module):
    """Three convolutions, two of them coupled by a residual, a LayerNorm stream and a table of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.inner = nn.Conv2d(6, 5, 1)
        self.outer = nn.Conv2d(5, 6, 1)
        self.norm = nn.LayerNorm(6)
        self.square = nn.Parameter(torch.randn(6, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.outer(self.inner(x).relu())
        x = self.norm(x.sum((2, 3)))
        return self.head(x @ self.square + x)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graphprune.trace(Block().eval(), torch.zeros(1, 3, 4, 4))


def test_nodes_and_edges_are_the_axes_and_their_members(graph: Graph) -> None:
    found = graph.dependencies
    axes = {n: d for n, d in found.nodes(data=True) if d["kind"] == "axis"}
    assert set(axes) == set(graph.axes)
    for name, axis in graph.axes.items():
        assert (axes[name]["size"], axes[name]["status"], axes[name]["reason"]) == (
            axis.size,
            axis.kind,
            axis.reason,
        )
        edges = {(other, d["dim"], d["placement"]) for _, other, d in found.edges(name, data=True)}
        assert edges == {(m.tensor, m.dim, m.placement) for m in axis.members}
    shapes = {n: tuple(d["shape"]) for n, d in found.nodes(data=True) if d["kind"] == "parameter"}
    assert shapes == {n: tuple(t.shape) for n, t in graph.tensors.items()}


def test_what_is_known_of_this_block(graph: Graph) -> None:
    found = graph.dependencies
    assert found.nodes["inner.weight[0]"]["status"] == "exact"
    assert set(found["inner.weight[0]"]) == {"inner.weight", "inner.bias", "outer.weight"}
    stream = found.nodes["square[0]"]
    assert stream["status"] == "statistical"
    assert "layer statistics" in stream["reason"]
    assert {"first.weight", "outer.weight", "norm.weight", "head.weight", "square"} <= set(found["square[0]"])
    # A square matrix on the stream is coupled in both of its dimensions: two edges.
    assert sorted(d["dim"] for d in found["square[0]"]["square"].values()) == [0, 1]
    assert found.nodes["head.weight[0]"]["status"] == "frozen"


def test_it_is_made_once_and_cannot_be_changed(graph: Graph) -> None:
    assert graph.dependencies is graph.dependencies
    with pytest.raises(nx.NetworkXError, match=r"[Ff]rozen"):
        graph.dependencies.add_node("more")


def test_a_smaller_graph_has_its_own(graph: Graph) -> None:
    small = graph.apply(graph.plan({"inner.weight[0]": [1, 2]}))
    assert small.dependencies.nodes["inner.weight[0]"]["size"] == 3
    assert graph.dependencies.nodes["inner.weight[0]"]["size"] == 5


def test_the_selection_keeps_what_can_be_pruned_and_what_it_touches(graph: Graph) -> None:
    chosen = selection(graph.dependencies)
    statuses = {d["status"] for _, d in chosen.nodes(data=True) if d["kind"] == "axis"}
    assert statuses == {"exact", "statistical"}
    assert "head.bias" not in chosen  # only the caller's classes run through it
    assert "head.weight" in chosen
    assert selection(graph.dependencies, frozen=True) is graph.dependencies


def test_json_reads_back_as_the_same_graph(graph: Graph) -> None:
    again = nx.node_link_graph(json.loads(to_json(graph.dependencies)), edges="edges")
    assert nx.utils.graphs_equal(again, nx.MultiGraph(graph.dependencies))


def test_dot_reads_back_with_every_node_and_edge(graph: Graph) -> None:
    pydot = pytest.importorskip("pydot")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # its parser uses names that pyparsing has renamed; writing does not parse
        (read,) = pydot.graph_from_dot_data(to_dot(graph.dependencies))
    names = {n.get_name().strip('"') for n in read.get_nodes()} - {"graph", "\\n"}
    assert names == set(graph.dependencies)
    assert len(read.get_edges()) == graph.dependencies.number_of_edges()


def test_svg_is_xml_that_names_every_node_it_draws(graph: Graph) -> None:
    pytest.importorskip("matplotlib")
    chosen = selection(graph.dependencies)
    text = to_svg(chosen)
    words = {
        "".join(e.itertext()).strip() for e in ElementTree.fromstring(text).iter() if e.tag.endswith("text")
    }
    for name, data in chosen.nodes(data=True):
        assert any(word.startswith(f"{name} ") for word in words), name
        assert data["kind"] == "parameter" or f"{name} · {data['size']}" in words
    assert {"exact axis", "statistical axis", "parameter"} <= words
    assert "frozen axis" not in words
    assert text == to_svg(chosen)


def test_labels_never_overlap_even_for_hundreds_of_axes() -> None:
    many = nx.MultiGraph()
    for index in range(240):
        many.add_node(f"axis{index}", kind="axis", size=3, status="exact", reason="", node="")
    for index in range(80):
        many.add_node(f"p{index}", kind="parameter", shape=[3], trainable=True)
    for index in range(240):
        many.add_edge(f"axis{index}", f"p{index % 80}", dim=0, placement="[3]")
    axes, parameters = [f"axis{i}" for i in range(240)], [f"p{i}" for i in range(80)]
    places = layout(many, axes, parameters)
    assert len(places) == 320
    for column in (axes, parameters):
        heights = sorted(places[n][1] for n in column)
        assert min(np.diff(heights)) >= 1 - 1e-9
    assert ROW * 72 > 7.0  # a row is higher than the letters in it


@given(st.lists(st.floats(0, 50), max_size=30))
def test_rows_move_apart_in_order_and_no_further_than_needed(wanted: list[float]) -> None:
    wanted = sorted(wanted)
    placed = _apart(wanted)
    assert all(b - a >= 1 - 1e-6 for a, b in pairwise(placed))
    assert not placed or min(placed) >= 0
    if all(b - a >= 1 for a, b in pairwise(wanted)):
        assert placed == pytest.approx(wanted)


def test_the_suffix_chooses_the_format(graph: Graph, tmp_path: Path) -> None:
    write(graph.dependencies, tmp_path / "axes.json")
    assert json.loads((tmp_path / "axes.json").read_text())["multigraph"] is True
    with pytest.raises(InputError, match=r"\.json, \.dot, \.svg"):
        write(graph.dependencies, tmp_path / "axes.png")


@pytest.mark.parametrize(("package", "export"), [("matplotlib", to_svg), ("pydot", to_dot)])
def test_a_missing_package_names_its_extra(
    graph: Graph, package: str, export: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"graphprune\[draw\]"):
        export(graph.dependencies)  # type: ignore[operator]
