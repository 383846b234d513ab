"""What is known of axes costs time linear in the graph, and needs shapes only.

Work is counted in function calls, which no other load on the machine changes; processor time is compared with
a wide margin, for what calls do not show. ``python -m benchmarks.axes.speed`` and ``.llm`` give the figures.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphprune
from benchmarks.axes import llm
from benchmarks.axes.chains import calls, chain, seconds
from graphprune.axes.axis import Axes
from graphprune.axes.typing import Typing
from graphprune.graph import Graph

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


@pytest.fixture(scope="module")
def chains() -> tuple[Graph, Graph]:
    """Chains of about 200 and 2,000 nodes; everything that is loaded on first use is loaded."""
    short, long = chain(200), chain(2_000)
    for graph in (short, long):
        graph.apply(graph.plan(ratio=0.5))
    return short, long


def explained(graph: Graph) -> list[str]:
    """Every axis in words."""
    return [graph.explain(name) for name in graph.axes]


@pytest.mark.parametrize(
    ("what", "tolerance"),
    [
        (Typing, 0.02),
        (lambda graph: Axes(graph.typing), 0.02),
        (lambda graph: graph.plan(ratio=0.5), 0.05),
        (lambda graph: graph.plan(ratio=0.5, importance="random"), 0.05),
        (lambda graph: graph.apply(graph.plan(ratio=0.5, importance="random")), 0.15),
        (explained, 0.05),
        (lambda graph: graph.copy(), 0.02),
    ],
    ids=["typing", "axes", "plan", "plan-random", "apply", "explain", "copy"],
)
def test_work_grows_with_the_graph(
    chains: tuple[Graph, Graph], what: Callable[[Graph], Any], tolerance: float
) -> None:
    short, long = chains
    per_node = [calls(lambda graph=graph: what(graph)) / len(graph.nodes) for graph in chains]  # type: ignore[misc]
    assert len(long.nodes) == pytest.approx(10 * len(short.nodes), rel=0.02)
    assert per_node[1] <= per_node[0] * (1 + tolerance), f"calls a node: {per_node}"


@pytest.mark.parametrize(
    "what",
    [Typing, lambda graph: graph.plan(ratio=0.5), lambda graph: graph.copy()],
    ids=["typing", "plan", "copy"],
)
def test_no_hidden_loop(chains: tuple[Graph, Graph], what: Callable[[Graph], Any]) -> None:
    """A search through a list is one call however long it is; it would show in time, tenfold here."""
    per_node = [seconds(lambda graph=graph: what(graph), 5) / len(graph.nodes) for graph in chains]  # type: ignore[misc]
    assert per_node[1] < 3 * per_node[0], f"seconds a node: {per_node}"


def test_counting_calls_sees_a_square() -> None:
    def square(n: int) -> int:
        return sum(abs(j) for _ in range(n) for j in range(n))

    assert calls(lambda: square(100)) > 50 * calls(lambda: square(10))


class Circle:
    """Garbage that only a collection finds, and that calls as it goes."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        sum(abs(j) for j in range(100))


def test_counting_calls_leaves_out_the_garbage_of_others() -> None:
    def work() -> list[list[int]]:
        return [[j] for j in range(100_000)]  # enough for a collection of everything

    alone = calls(work)
    left = [Circle() for _ in range(100)]
    del left
    assert calls(work) == alone


@pytest.mark.slow
def test_typing_of_twenty_thousand_nodes_is_proportional() -> None:
    graphs = [chain(2_000), chain(20_000)]
    per_node = [calls(lambda graph=graph: Typing(graph)) / len(graph.nodes) for graph in graphs]  # type: ignore[misc]
    assert per_node[1] == pytest.approx(per_node[0], rel=0.01)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["resnet152", "vit_l_16", "swin_b", "densenet201"])
def test_large_networks_are_typed_in_a_tenth_of_a_second(name: str) -> None:
    """The floor of several runs of one thread; a busy machine may double it, and there is that much room."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    from tests.zoo import torchvision_schemas

    torchvision_schemas.declare()
    from torchvision import models

    with torch.device("meta"):
        model = getattr(models, name)(weights=None).eval()
        x = torch.empty(1, 3, 224, 224)
    graph = graphprune.trace(model, x)
    assert not graph.axes.unruled
    assert seconds(lambda: Typing(graph), 5) < 0.1
    start = time.process_time()
    graph.plan(ratio=0.5, importance="random")
    assert time.process_time() - start < 1


@needs_transformers
@pytest.mark.network
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("heads", [32, 8])
def test_a_wide_language_model_without_weights(heads: int) -> None:
    """Two of the thirty-two layers: what one of them shares with the next is all there."""
    row = llm.examine("short", layers=2, heads=heads, tokens=16)
    assert row.parameters > 600e6
    assert row.coverage > 0.99
    # A layer's hidden width, its key/value heads, their width (and repeats, where heads are grouped).
    assert row.exact >= 2 * 3
    assert row.parameters_after < 0.7 * row.parameters
    assert row.tracing + row.typing + row.planning + row.applying < 60


@needs_transformers
@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("shape", list(llm.SHAPES))
def test_seven_billion_parameters_fit(shape: str) -> None:
    row = llm.in_a_process(shape, *llm.SHAPES[shape])
    assert row.parameters > 5.5e9
    assert row.coverage > 0.99
    assert row.seconds < llm.LIMITS["seconds"]
    assert row.gigabytes < llm.LIMITS["gigabytes"]


def test_magnitudes_of_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        x = torch.empty(1, 4)
    graph = graphprune.trace(model, x)
    with pytest.raises(graphprune.errors.InputError, match="random"):
        graph.plan(ratio=0.5)
    small = graph.apply(graph.plan(ratio=0.5, importance="random"))
    assert small.tensors["0.weight"].shape == (4, 4)
    assert small.tensors["0.weight"].is_meta
