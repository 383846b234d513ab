"""The user's own class back, smaller: real networks, what torch's layers call their sizes, and refusals."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import AxisError
from graphprune.graph import Graph
from tests import zoo

X = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))


def traced(model: nn.Module, *inputs: torch.Tensor) -> Graph:
    return graphprune.trace(model, inputs)


def same(module: nn.Module, graph: Graph, *args: Any, **kwargs: Any) -> None:
    """The module computes what the graph does, on inputs the check inside has not seen."""
    with torch.no_grad():
        found, wanted = module(*args, **kwargs), graph(*args, **kwargs)
    for ours, theirs in zip(
        torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(wanted), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.network
@pytest.mark.parametrize(
    "name",
    ["tv_resnet18", "tv_mobilenet_v2", "hf_bert", "hf_llama_grouped", "lstm", "gru", "channel_shuffle",
     "grouped_conv_transpose", "group_normed", "tied_embedding", "weight_norm", "weight_norm_hook",
     "spectral_norm", "weight_standardised"],
)  # fmt: skip
def test_half_of_every_exact_axis(name: str) -> None:
    network = zoo.get(name)
    model = network.build()
    before = copy.deepcopy(model.state_dict())
    graph = graphprune.trace(model, network.inputs(), network.kwargs() or None)
    plan = graph.plan(ratio=0.5, importance="random")
    assert plan
    small = graph.apply(plan)
    module: Any = small.write_back(model)
    assert type(module) is type(model)
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in model.parameters())
    assert {k for k, _ in module.named_parameters()} == {k for k, _ in model.named_parameters()}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"write_back changed the model it was given: {key}"
    generator = torch.Generator().manual_seed(7)
    fresh = [
        torch.randn(v.shape, generator=generator) if v.is_floating_point() else v for v in network.inputs()
    ]
    same(module, small, *fresh, **network.kwargs())
    again = graphprune.trace(module, network.inputs(), network.kwargs() or None)
    assert {n: t.shape for n, t in again.parameters.items()} == {
        n: t.shape for n, t in small.parameters.items()
    }


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(
    "name", ["tv_densenet121", "tv_swin_v2_t", "tv_convnext_tiny", "timm_dla34", "hf_t5"]
)
def test_half_of_every_exact_axis_of_larger_networks(name: str) -> None:
    test_half_of_every_exact_axis(name)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("name", ["tv_swin_t", "tv_vit_b_16"])
def test_hidden_units_of_attention_whose_heads_are_fixed(name: str) -> None:
    network = zoo.get(name)
    model = network.build()
    graph = graphprune.trace(model, network.inputs())
    hidden = {a.name: range(a.size // 2) for a in graph.axes.exact if ".mlp." in a.name}
    assert hidden
    small = graph.apply(graph.plan(hidden))
    same(small.write_back(model), small, *network.inputs())


# ---- what torch's layers call their sizes ---------------------------------------------------------


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.depth = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.bn = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.act = nn.PReLU(12)
        self.gn = nn.GroupNorm(3, 12)
        self.inorm = nn.InstanceNorm2d(12, affine=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.depth(self.conv(x)))
        return self.head(self.inorm(self.gn(self.act(self.up(x)))).sum((2, 3)))


def test_every_layer_says_its_new_sizes() -> None:
    model = zoo.prepare(Layers(), 1)
    x = torch.randn(1, 3, 4, 4)
    graph = traced(model, x)
    small = graph.apply(graph.plan({"conv.weight[0]": [1, 4], "up.weight[1].0": [1]}))
    module: Any = small.write_back(model)
    assert (module.conv.in_channels, module.conv.out_channels, module.conv.groups) == (3, 6, 1)
    assert (module.depth.in_channels, module.depth.out_channels, module.depth.groups) == (6, 12, 6)
    assert module.bn.num_features == 12
    assert module.bn.running_mean.shape == (12,)
    assert (module.up.in_channels, module.up.out_channels) == (12, 8)
    assert module.act.num_parameters == 8
    assert (module.gn.num_groups, module.gn.num_channels) == (2, 8)
    assert module.inorm.num_features == 8
    assert (module.head.in_features, module.head.out_features) == (8, 5)
    same(module, small, torch.randn(3, 3, 6, 6)) if small.is_dynamic else same(
        module, small, torch.randn_like(x)
    )


def test_statistical_axes_reach_norms_and_embeddings() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 12)
            self.norm = nn.LayerNorm(12)
            self.rms = nn.RMSNorm(12)
            self.out = nn.Linear(12, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.rms(self.norm(self.table(ids))))

    model = Stream().eval()
    ids = torch.randint(0, 20, (2, 5))
    graph = traced(model, ids)
    module: Any = graph.apply(graph.plan({"table.weight[1]": [0, 5, 7, 11]})).write_back(model)
    assert (module.table.num_embeddings, module.table.embedding_dim) == (20, 8)
    assert module.norm.normalized_shape == module.rms.normalized_shape == (8,)
    assert module.out.in_features == 8


def test_a_projected_lstm_runs_on_flat_weights_of_the_new_sizes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Linear(4, 6)
            self.lstm = nn.LSTM(6, 10, num_layers=2, proj_size=5, batch_first=True)
            self.out = nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.lstm(self.into(x))[0])

    model = Net().eval()
    graph = traced(model, torch.randn(2, 3, 4))
    small = graph.apply(graph.plan(ratio=0.4))
    module: Any = small.write_back(model)
    lstm = module.lstm
    assert lstm.input_size < 6
    assert lstm.input_size == module.into.out_features == lstm.weight_ih_l0.shape[1]
    assert lstm.hidden_size * 4 == lstm.weight_ih_l0.shape[0]
    assert all(a is b for a, b in zip(lstm._flat_weights, lstm.parameters(), strict=True))
    same(module, small, torch.randn(2, 3, 4))
    module.train()(torch.randn(2, 3, 4)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


# ---- attention ------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Sizes in attributes, in a list, and in a configuration that blocks share."""

    def __init__(self, config: SharedConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.num_heads, config.dim // config.num_heads
        self.sizes = [config.dim] * 3
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, _ = x.shape
        q, k, v = (
            t.view(n, length, self.config.num_heads, self.head_dim).transpose(1, 2)
            for t in self.qkv(x).split(self.sizes, dim=-1)
        )
        weights = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, length, self.num_heads * self.head_dim))


class SharedConfig:
    def __init__(self) -> None:
        self.num_heads, self.dim, self.vocab_size = 4, 12, 4


def test_attributes_lists_and_a_shared_configuration_follow_block_by_block() -> None:
    config = SharedConfig()
    model: Any = nn.Sequential(Attention(config), Attention(config)).eval()
    graph = traced(model, torch.randn(2, 5, 12))
    heads = [a for a in graph.axes.exact if a.size == 4]
    assert len(heads) == 2
    small = graph.apply(graph.plan({heads[0].name: [1], heads[1].name: [0, 3]}))
    module: Any = small.write_back(model)
    assert [m.num_heads for m in module] == [3, 2]
    assert [m.config.num_heads for m in module] == [3, 2]
    assert [m.sizes for m in module] == [[9, 9, 9], [6, 6, 6]]
    assert [m.head_dim for m in module] == [3, 3]
    assert {m.config.vocab_size for m in module} == {4}, "a vocabulary is no head, whatever its size"
    assert config.num_heads == 4
    assert model[0].config is model[1].config is config
    same(module, small, torch.randn(2, 5, 12))


def test_multihead_attention_with_the_stream_pruned_as_much_as_its_heads() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Linear(5, 12)
            self.attention = nn.MultiheadAttention(12, 4, batch_first=True)
            self.out = nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.into(x)
            return self.out(self.attention(x, x, x, need_weights=False)[0])

    model = zoo.prepare(Block(), 3)
    graph = traced(model, torch.randn(2, 4, 5))
    heads = next(a for a in graph.axes.exact if a.size == 4)
    stream = graph.axes.of("into.weight", 0)[0][0]
    out = graph.axes.of("attention.out_proj.weight", 0)[0][0]
    removed = {heads.name: [2], stream.name: [0, 1, 2], out.name: [3, 6, 9]}
    small = graph.apply(graph.plan(removed))
    module: Any = small.write_back(model)
    found = module.attention
    assert (found.embed_dim, found.num_heads, found.head_dim, found.kdim, found.vdim) == (9, 3, 3, 9, 9)
    assert found.in_proj_weight.shape == (27, 9)
    same(module, small, torch.randn(2, 4, 5))
    alone = graph.apply(graph.plan({heads.name: [2]}))
    with pytest.raises(AxisError, match=r"'attention' \(MultiheadAttention\) has one .* 12 and 9 wide"):
        alone.write_back(model)


# ---- refusals -------------------------------------------------------------------------------------


class HardCoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x.view(-1, 2, 4)  # the line that is named
        return self.second(x)


def test_a_size_in_forward_is_refused_with_its_line() -> None:
    model = HardCoded().eval()
    graph = traced(model, X)
    axis = next(a for a in graph.axes.exact if a.size == 4)
    small = graph.apply(graph.plan({axis.name: [1]}))
    lines = Path(__file__).read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if text.endswith("# the line that is named"))
    with pytest.raises(AxisError) as caught:
        small.write_back(model)
    message = str(caught.value)
    assert f"test_writeback.py:{line} " in message
    assert "4 (now 3) of view" in message
    assert f"keep axis {axis.name} whole" in message
    assert model.second.in_features == 4
    assert "graph.module" in message
    small.module(X)  # which indeed has no such limit


def test_a_scale_computed_from_the_width_is_refused() -> None:
    class Scaled(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self_scale, self.scale = self.scale, 1 / math.sqrt(self.head_dim)
            try:
                return super().forward(x)
            finally:
                self.scale = self_scale

    model = Scaled(SharedConfig()).eval()
    graph = traced(model, torch.randn(2, 5, 12))
    width = next(a for a in graph.axes.exact if a.size == 3)
    with pytest.raises(AxisError, match="a scale of 1/√width"):
        graph.apply(graph.plan({a.name: [1] for a in graph.axes.exact if a.size == 3})).write_back(model)
    assert width.kind == "exact"


def test_the_default_scale_of_fused_attention_is_named() -> None:
    class Fused(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (
                t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
                for t in self.qkv(x).split(self.sizes, dim=-1)
            )
            return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = Fused(SharedConfig()).eval()
    graph = traced(model, torch.randn(2, 5, 12))
    widths = {a.name: [1] for a in graph.axes.exact if a.size == 3}
    with pytest.raises(AxisError, match="computes the scale of attention from the width"):
        graph.apply(graph.plan(widths)).write_back(model)


def test_another_model_is_refused() -> None:
    graph = traced(nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 2)).eval(), X)
    small = graph.apply(graph.plan({"0.weight[0]": [1]}))
    with pytest.raises(AxisError, match=r"not the model the graph came from: 0.weight has shape \(9, 12\)"):
        small.write_back(nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 2)))
    with pytest.raises(AxisError, match="share no parameter name"):
        small.write_back(nn.ModuleDict({"body": nn.Linear(12, 2)}))


# ---- weights --------------------------------------------------------------------------------------


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def test_two_plans_compose_and_training_in_between_is_kept() -> None:
    model: Any = two_layers()
    graph = traced(model, X)
    once = graph.apply(graph.plan({"0.weight[0]": [1, 2]}))
    with torch.no_grad():
        for parameter in once.module.parameters():
            parameter.add_(0.25)
    twice = once.apply(once.plan({"0.weight[0]": [0, 3]}))
    module: Any = twice.write_back(model)
    assert module[0].out_features == 4
    assert torch.equal(module[2].bias, model[2].bias + 0.25)
    same(module, twice, torch.randn(2, 12))


def test_without_a_plan_the_copy_has_the_graphs_weights() -> None:
    model: Any = two_layers()
    graph = traced(model, X)
    module: Any = graph.write_back(model)
    assert module is not model
    same(module, graph, X)


def test_tied_weights_stay_tied_and_flags_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 8)
            self.inner = nn.Linear(8, 8, bias=False)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.table.weight
            self.inner.weight.requires_grad_(False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(self.table(ids)).relu())

    model = Tied().train()
    graph = traced(model, torch.randint(0, 11, (2, 3)))
    axis = graph.axes.of("table.weight", 1)[0][0]
    small = graph.apply(graph.plan({axis.name: [2, 5]}))
    module: Any = small.write_back(model)
    assert module.head.weight is module.table.weight
    assert module.head.weight.shape == (11, 6)
    assert module.training
    assert not module.inner.weight.requires_grad
    assert module.table.weight.requires_grad


def test_a_constant_choice_of_channels_is_written_anew() -> None:
    class Pick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 8), nn.Linear(6, 2)
            self.register_buffer("chosen", torch.tensor([4, 5, 6, 0, 1, 2]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).index_select(1, self.chosen))

    model = Pick().eval()
    graph = traced(model, X)
    axis = graph.axes.of("second.weight", 1)[0][0]
    small = graph.apply(graph.plan({axis.name: [1]}))
    module: Any = small.write_back(model)
    assert module.chosen.numel() == module.second.in_features == 5
    same(module, small, torch.randn(2, 12))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model: Any = two_layers().to(dtype)
    graph = traced(model, X.to(dtype))
    module: Any = graph.apply(graph.plan(ratio=0.5)).write_back(model)
    assert module[0].weight.dtype is dtype


def test_a_batch_size_that_stays_open() -> None:
    model: Any = two_layers()
    graph = graphprune.trace(model, X, dynamic_batch=True)
    small = graph.apply(graph.plan(ratio=0.5))
    same(small.write_back(model), small, torch.randn(9, 12))
