"""Pruned graphs: equal to the masked original, trainable, exportable, and leaving the original alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import graphprune
from graphprune.axes.rules import indexing
from graphprune.errors import AxisError
from tests import zoo

from .pruning import Small, proved, small_net

BLOCKS = [n for n in zoo.networks("block") if zoo.NO_EXPORT not in n.tags]

VANISHES_NOT = {
    "weight_norm": "g / |v| of a zeroed row is 0 / 0",
    "weight_norm_hook": "g / |v| of a zeroed row is 0 / 0",
}
FROZEN_ALTOGETHER = {"symmetric_linear": "triu and its transpose tie both dimensions to an order"}


@pytest.mark.parametrize("network", BLOCKS, ids=lambda n: n.name)
def test_blocks_without_what_was_removed_are_the_users_module_with_zeros(network: zoo.Network) -> None:
    """Independent of types and masks: zero the removed slices in a ``state_dict`` and run eager."""
    args, kwargs = network.inputs(), network.kwargs()
    graph = graphprune.trace(network.build(), args, kwargs)
    plan = graph.plan(ratio=0.5, importance="random", seed=1)
    assert bool(plan) != (network.name in FROZEN_ALTOGETHER)
    pruned = proved(graph, plan)
    model = network.build()
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, positions in plan.removed.items():
            for member in graph.axes[name].members:
                if member.tensor in state and "running_var" not in member.tensor:
                    gone = [
                        place
                        for axis, index in graph.axes.of(member.tensor, member.dim)
                        for place in (i for i, p in enumerate(index) if axis.name == name and p in positions)
                    ]
                    state[member.tensor].index_fill_(member.dim, torch.tensor(gone, dtype=torch.int64), 0)
        expected = pytree.tree_leaves(model(*args, **kwargs))
    got = pytree.tree_leaves(pruned(*args, **kwargs))
    if network.name in VANISHES_NOT:
        assert not all(torch.isfinite(e).all() for e in expected)
        return
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def graph() -> graphprune.Graph:
    return graphprune.trace(small_net(), torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)))


def test_the_old_graph_is_untouched(graph: graphprune.Graph) -> None:
    before, text, axes = graph.fingerprint(), str(graph), [str(a) for a in graph.axes.values()]
    pruned = proved(graph, graph.plan(ratio=0.5))
    with torch.no_grad():
        for tensor in pruned.module.parameters():
            tensor.zero_()
    assert (graph.fingerprint(), str(graph), [str(a) for a in graph.axes.values()]) == (before, text, axes)


def test_names_dtypes_and_flags_are_kept(graph: graphprune.Graph) -> None:
    model = small_net()
    model.get_parameter("0.weight").requires_grad_(False)
    frozen = graphprune.trace(model, torch.randn(2, 3, 6, 6))
    pruned = proved(frozen, frozen.plan(ratio=0.5))
    assert list(pruned.tensors) == list(frozen.tensors)
    assert pruned.module.state_dict().keys() == frozen.module.state_dict().keys()
    for name, tensor in frozen.tensors.items():
        assert pruned.tensors[name].dtype == tensor.dtype
        assert pruned.tensors[name].requires_grad == tensor.requires_grad
        assert isinstance(pruned.tensors[name], nn.Parameter) == isinstance(tensor, nn.Parameter)


def test_slices_are_bit_for_bit(graph: graphprune.Graph) -> None:
    plan = graph.plan({"0.weight[0].0": [1], "8.weight[0]": [0, 5]})
    pruned = graph.apply(plan)
    keep = torch.tensor([i for i in range(12) if i not in (3, 4, 5)])
    for name in ("0.weight", "0.bias", "1.weight", "1.running_var", "4.weight", "5.bias"):
        torch.testing.assert_close(pruned.tensors[name], graph.tensors[name][keep], rtol=0, atol=0)
    rest = torch.tensor([1, 2, 3, 4, 6, 7])
    torch.testing.assert_close(
        pruned.tensors["8.weight"], graph.tensors["8.weight"][rest][:, keep], rtol=0, atol=0
    )


def test_pruning_twice_is_pruning_once_with_the_composed_plan(graph: graphprune.Graph) -> None:
    first = graph.plan(ratio=0.3, importance="random", seed=5)
    once = graph.apply(first)
    second = once.plan(ratio=0.5, importance="random", seed=6)
    twice = once.apply(second)
    both = graph.compose(first, second)
    assert graph.apply(both).fingerprint() == twice.fingerprint()
    proved(graph, both)
    assert graph.compose(first, once.plan({})) == first


@pytest.mark.parametrize(
    "name",
    [
        "grouped_multiplier", "channel_shuffle", "fused_qkv_chunk", "rotary", "expanded_keys",
        "channel_padding", "index_select", "multihead_attention", "gru",
    ],
)  # fmt: skip
def test_composition_in_blocks(name: str) -> None:
    network = zoo.get(name)
    whole = graphprune.trace(network.build(), network.inputs(), network.kwargs())
    first = whole.plan(ratio=0.3, importance="random", seed=5)
    once = whole.apply(first)
    second = once.plan(ratio=0.5, importance="random", seed=6)
    assert second
    both = whole.compose(first, second)
    twice, direct = once.apply(second), whole.apply(both)
    assert twice.tensors.keys() == direct.tensors.keys() or name == "index_select"
    for tensor in whole.tensors:
        assert torch.equal(twice.tensors[tensor], direct.tensors[tensor]) if tensor in twice.tensors else True
    for ours, theirs in zip(twice.run(), direct.run(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_composition_refuses_what_the_original_cannot_express(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smaller network may be typed more finely than the original; then there is no one plan."""
    order = torch.tensor([3, 0, 1, 2])
    model = Small(lambda m, x: m.b(m.a(x)[:, order].relu()) + m.c(x), a=nn.Linear(3, 4), b=nn.Linear(4, 2),
                  c=nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2)))  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "MAX_RUNS", 1)
        graph = graphprune.trace(model, torch.randn(2, 3))
        assert graph.axes["a.weight[0]"].kind == "frozen"
    first = graph.plan({"c.0.weight[0]": [1]})
    once = graph.apply(first)
    with pytest.raises(AxisError, match="second plan cuts dimension 0"):
        graph.compose(first, once.plan({"a.weight[0].0": [0]}))


def test_a_pruned_module_trains_and_batch_norm_and_dropout_follow(graph: graphprune.Graph) -> None:
    module = proved(graph, graph.plan(ratio=0.5)).module
    x = torch.randn(8, 3, 6, 6)
    module.train()
    assert not torch.equal(module(x), module(x))
    before = module.state_dict()["1.running_mean"].clone()
    optimiser = torch.optim.SGD(module.parameters(), 0.05)
    losses = []
    for _ in range(20):
        torch.manual_seed(0)
        loss = nn.functional.cross_entropy(module(x), torch.arange(8) % 5)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in module.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(before, module.state_dict()["1.running_mean"])
    module.eval()
    assert torch.equal(module(x), module(x))


def test_a_pruned_module_is_captured_again_and_pruned_again(graph: graphprune.Graph) -> None:
    pruned = proved(graph, graph.plan(ratio=0.5))
    x = graph.examples[0]
    again = graphprune.trace(copy.deepcopy(pruned.module).eval(), x)
    torch.testing.assert_close(again.run(x)[0], pruned.run(x)[0])
    assert {a.name: a.size for a in again.axes.exact} == {a.name: a.size for a in pruned.axes.exact}
    proved(again, again.plan(ratio=0.5))


@pytest.mark.filterwarnings("ignore")
def test_a_pruned_module_exports_to_onnx(graph: graphprune.Graph) -> None:
    ort = pytest.importorskip("onnxruntime")
    pruned = proved(graph, graph.plan(ratio=0.5))
    x = graph.examples[0]
    program = torch.onnx.export(pruned.module.eval(), (x,), dynamo=True, verbose=False)
    assert program is not None
    session = ort.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), pruned.run(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "exponent"), [(torch.bfloat16, 6e-2), (torch.float16, 1e-2), (torch.float64, 1e-9)]
)
def test_precisions(dtype: torch.dtype, exponent: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).to(dtype).eval()
    graph = graphprune.trace(model, torch.randn(3, 6, dtype=dtype))
    pruned = proved(graph, graph.plan(ratio=0.5))
    assert {t.dtype for n, t in pruned.tensors.items() if "num_batches" not in n} == {dtype}
    assert pruned.run()[0].dtype is dtype


# ---- tied weights and buffers ----------------------------------------------------------------------


def test_tied_weights_are_pruned_once_and_stay_tied() -> None:
    network = zoo.get("tied_embedding")
    graph = graphprune.trace(network.build(), network.inputs(), network.kwargs())
    assert graph.tied
    pruned = proved(graph, graph.plan(ratio=0.5))
    assert pruned.tied == graph.tied
    (alias, name), *_ = pruned.tied.items()
    state = pruned.module.state_dict(keep_vars=True)
    assert state[alias] is state[name]


def test_float_buffers_follow_and_integer_ones_stay() -> None:
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
            self.register_buffer("gain", torch.rand(8))
            self.register_buffer("hidden", torch.rand(8), persistent=False)
            self.register_buffer("rows", torch.tensor([1, 0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows: torch.Tensor = self.get_buffer("rows")
            return self.b(self.a(x[rows]) * self.gain - self.hidden)

    graph = graphprune.trace(Buffers(), torch.randn(2, 4))
    pruned = proved(graph, graph.plan(ratio=0.5))
    assert [pruned.tensors[n].shape[0] for n in ("gain", "hidden", "rows")] == [4, 4, 2]
    assert pruned.tensors["rows"] is graph.tensors["rows"]
    assert pruned.persistent == graph.persistent


def test_an_output_that_would_change_shape_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last guard: a rule that forgets to freeze cannot get past the shapes of the outputs."""
    from graphprune.axes import typing
    from graphprune.errors import VerificationError

    monkeypatch.setattr(typing, "freeze", lambda term, reason: None)
    graph = graphprune.trace(nn.Linear(4, 6), torch.randn(2, 4))
    with pytest.raises(VerificationError, match="changes the shape of output"):
        graph.apply(graph.plan({"weight[0]": [1]}))
