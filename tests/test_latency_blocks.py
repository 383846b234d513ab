"""Blocks: together they are the network, and at smaller sizes they are the pruned network's own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.blocks import Block
from graphprune.cost import cost, node_macs
from graphprune.fusion import blocks
from graphprune.graph import Graph


class Residual(nn.Module):
    """Two convolutions with batch norms around a shortcut, a depthwise one and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.first, self.second = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 16, 3, padding=1)
        self.depthwise, self.head = nn.Conv2d(16, 16, 3, groups=16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.second(self.first(x).relu()) + x).relu()
        x = self.depthwise(x).clamp(0, 6)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """One layer of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (m(x).view(1, 6, 4, 8).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(1, 6, 32))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Side(nn.Module):
    """Two branches, concatenated; a split behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 12, 3, padding=1)
        self.both, self.last = nn.Conv2d(20, 16, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.both(torch.cat([self.left(x).relu(), self.right(x)], 1)).chunk(2, 1)
        return self.last(a * b.sigmoid())


NETWORKS = {
    "residual": (Residual, (1, 3, 12, 12)),
    "attention": (Attention, (1, 6, 32)),
    "side": (Side, (2, 3, 8, 8)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def graph(request: pytest.FixtureRequest) -> Graph:
    torch.manual_seed(0)
    make, shape = NETWORKS[request.param]
    return graphprune.trace(make().eval(), torch.randn(shape))


def named(graph: Graph, name: str) -> Block:
    return next(block for block in blocks(graph) if name in str(block.nodes[0].meta.get("module")))


def test_together_they_are_the_network(graph: Graph) -> None:
    found = blocks(graph)
    nodes = [node for block in found for node in block.nodes]
    assert len(nodes) == len(set(nodes))
    assert sum(map(node_macs, nodes)) == cost(graph).macs
    assert sum(node_macs(n) for block in found for n in block.graph({}).nodes) == cost(graph).macs


@settings(deadline=None, max_examples=12)
@given(share=st.floats(0.0, 0.8), seed=st.integers(0, 99))
@pytest.mark.parametrize("name", NETWORKS)
def test_smaller_blocks_are_those_of_the_pruned_network(name: str, share: float, seed: int) -> None:
    """The text at some sizes, without pruning anything, against the blocks of what was really pruned."""
    make, shape = NETWORKS[name]
    graph = graphprune.trace(make().eval(), torch.zeros(shape))
    plan = graph.plan(ratio=share, importance="random", seed=seed)
    axes = graph.axes
    sizes = {axes[key].atom: axes[key].size - len(gone) for key, gone in plan.removed.items()}
    foreseen = Counter(block.text(sizes) for block in blocks(graph))
    assert foreseen == Counter(block.text({}) for block in blocks(graph.apply(plan)))


def test_a_block_alone_gives_the_shapes_it_has_in_the_pruned_network(graph: Graph) -> None:
    plan = graph.plan(ratio=0.5)
    axes = graph.axes
    sizes = {axes[key].atom: axes[key].size - len(gone) for key, gone in plan.removed.items()}
    small = {node.name: node for node in graph.apply(plan).nodes}
    for block in blocks(graph):
        alone = block.graph(sizes)
        outputs = alone.run(*alone.examples)
        inside = set(block.nodes)
        seen = [n for n in block.nodes if any(user not in inside for user in n.users)]
        wanted = [tuple(small[n.name].meta["val"].shape) for n in seen if "val" in small[n.name].meta
                  and isinstance(small[n.name].meta["val"], torch.Tensor)]  # fmt: skip
        assert [tuple(value.shape) for value in outputs] == wanted, block


def test_what_a_runtime_fuses_is_one_block() -> None:
    graph = graphprune.trace(Residual().eval(), torch.zeros(1, 3, 12, 12))
    assert [block.label for block in blocks(graph)] == [
        "convolution, batch-norm, relu", "convolution, relu", "convolution, add, relu", "convolution, clamp",
        "average-pool", "linear",
    ]  # fmt: skip


def test_equal_layers_have_equal_texts_and_others_do_not() -> None:
    net = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)), nn.Conv2d(8, 8, 3, padding=0))
    first, *others, last = (
        block.text({}) for block in blocks(graphprune.trace(net, torch.zeros(1, 8, 9, 9)))
    )
    assert all(other == first for other in others)
    assert last != first
    (wide,) = blocks(graphprune.trace(nn.Conv2d(8, 8, 3, padding=1), torch.zeros(2, 8, 9, 9)))
    assert wide.text({}) != first, "the batch is part of it"
    (half,) = blocks(graphprune.trace(net[0].half(), torch.zeros(1, 8, 9, 9, dtype=torch.half)))
    assert half.text({}) != first, "the precision is part of it"


def test_an_open_batch_counts_as_the_examples() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 4)).eval()
    x = torch.zeros(1, 3, 8, 8)
    fixed = [block.text({}) for block in blocks(graphprune.trace(net, x))]
    assert [block.text({}) for block in blocks(graphprune.trace(net, x, dynamic_batch=True))] == fixed


def test_axes_side_by_side_are_one_variable() -> None:
    graph = graphprune.trace(Side().eval(), torch.zeros(2, 3, 8, 8))
    both = named(graph, "both")
    assert sorted(len(variable) for variable in both.variables)[-1] == 2
    assert both.share(max(both.variables, key=len), {}) == 1.0
