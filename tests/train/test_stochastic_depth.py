"""Blocks left out at random: which, how often, and that nothing of it stays."""

from __future__ import annotations

import copy

import pytest
import torch
from graphprune.passes.residual import drop, residual_blocks
from torch import Tensor, nn

import graphprune
from graphprune.errors import InputError
from graphprune.module import TracedModule
from graphprune.train import Constant, Shrink, StochasticDepth

from .networks import batches, net, train

DATA = batches(1)[0][0]


def without(module: TracedModule, names: tuple[str, ...]) -> TracedModule:
    """The same network with blocks really gone."""
    graph = copy.deepcopy(module).captured
    result: TracedModule = drop(graph, [b for b in residual_blocks(graph) if b.add in names]).module
    return result


def fix_statistics(module: TracedModule) -> None:
    """Batch statistics would move from one pass to the next."""
    for node in module.graph.nodes:
        node.meta.pop("follows_training", None)


def test_a_pass_is_that_of_the_network_without_the_blocks() -> None:
    _, module = net()
    fix_statistics(module)
    module.train()
    seen = set()
    torch.manual_seed(3)
    with StochasticDepth(module, 0.5) as depth:
        assert len(depth.blocks) == 2
        for _ in range(12):
            found = module(DATA)
            seen.add(depth.dropped)
            torch.testing.assert_close(found, without(module, depth.dropped)(DATA))
    assert seen == {(), ("add",), ("add_1",), ("add", "add_1")}


def test_blocks_go_at_the_rate_that_was_asked() -> None:
    module = graphprune.trace(Chain(), torch.randn(2, 4)).module.train()
    torch.manual_seed(0)
    with StochasticDepth(module, 0.3) as depth:
        counts = []
        for _ in range(400):
            module(torch.zeros(2, 4))
            counts.append(len(depth.dropped))
    assert sum(counts) / (400 * 3) == pytest.approx(0.3, abs=0.05)


class Chain(nn.Module):
    """Three residual linears, numbered, the first two in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(n)) for n in (2, 1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            for linear in layer:  # type: ignore[attr-defined]
                x = x + linear(x)
        return x


def test_whole_layers_of_a_transformer_with_a_dynamic_batch() -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    module = graphprune.trace(model, torch.zeros(2, 5, 12), dynamic_batch=True).module
    depth = StochasticDepth(module, whole=True)
    assert {name: len(blocks) for name, blocks in depth._groups.items()} == {"layers.0": 2, "layers.1": 2}


def test_in_evaluation_every_block_is_there() -> None:
    model, module = net()
    with StochasticDepth(module, 0.9) as depth:
        torch.testing.assert_close(module(DATA), model(DATA))
        assert depth.dropped == ()


def test_nothing_stays_behind() -> None:
    model, module = net()
    before, code = set(module.state_dict()), module.code
    graph = str(module.captured)
    with StochasticDepth(module, 0.5):
        assert set(module.state_dict()) == before
        assert str(module.captured) == graph
        assert module.code != code
        twin = copy.deepcopy(module)
        torch.testing.assert_close(twin.train(False)(DATA), model(DATA))
    assert module.code == code
    assert not list(module.named_buffers())[-1][0].startswith("stochastic")
    torch.testing.assert_close(module(DATA), model(DATA))


def test_dropped_blocks_get_no_gradient() -> None:
    _, module = net()
    module.train()
    torch.manual_seed(0)
    with StochasticDepth(module, 0.5) as depth:
        while depth.dropped != ("add_1",):
            module.zero_grad()
            loss = module(DATA).sum() + module(DATA).sum()  # two passes before one backward
            loss.backward()
            module.zero_grad()
            module(DATA).sum().backward()
    weights = [module.get_parameter(f"blocks.{b}.conv2.weight").grad for b in (0, 1)]
    assert weights[0] is not None
    assert weights[0].any()
    assert weights[1] is None or not weights[1].any()


def test_it_follows_a_network_that_shrinks() -> None:
    _, module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    shrink = Shrink(module, Constant(0.5, begin=1), optimizer=optimizer)
    torch.manual_seed(0)
    with StochasticDepth(module, 0.8) as depth:
        seen = []
        for batch in batches(8):
            train(module, optimizer, [batch], [shrink])
            fix_statistics(module)
            module.train()
            found = module(DATA)  # at once after the change of graph
            torch.testing.assert_close(found, without(module, depth.dropped)(DATA))
            seen.append(depth.dropped)
    assert seen[0], "the very pass after the removal leaves something out"
    assert len(set(seen)) > 1
    assert shrink.sparsity >= 0.5
    assert "stochastic" not in module.code


def test_the_draws_are_torchs() -> None:
    _, module = net()
    module.train()

    def draws() -> list[tuple[str, ...]]:
        torch.manual_seed(4)
        found = []
        with StochasticDepth(module, 0.5) as depth:
            for _ in range(6):
                module(DATA)
                found.append(depth.dropped)
        return found

    first = draws()
    assert len(set(first)) > 1
    assert draws() == first


def test_names() -> None:
    chain = graphprune.trace(Chain(), torch.randn(2, 4)).module
    assert len(StochasticDepth(chain).blocks) == 3
    _, module = net()
    assert StochasticDepth(module, whole=True).blocks == ("blocks.0", "blocks.1")
    assert StochasticDepth(module, ignored=("blocks.0",)).blocks == ("add_1",)
    with pytest.raises(InputError, match="matches no residual block"):
        StochasticDepth(module, ignored=("nothing",))
    with pytest.raises(InputError, match="probability"):
        StochasticDepth(module, 1.0)
    with pytest.raises(InputError, match="no residual block"):
        StochasticDepth(graphprune.trace(nn.Linear(2, 2), torch.zeros(1, 2)).module)
    with StochasticDepth(module), pytest.raises(InputError, match="another StochasticDepth"):
        StochasticDepth(module).attach()
