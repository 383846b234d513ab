"""``prune-heads``: the heads asked for go, the least important first, and the rest computes as before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphprune.passes.attention import attentions
from graphprune.passes.michel import sensitivities
from graphprune.passes.prune_heads import PruneHeads
from torch import nn

import graphprune
from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.instruments import Recorder
from graphprune.pipeline import Context, PassResult, Pipeline
from graphprune.verify import mask_equivalence
from tests.passes.dead import shapes, x
from tests.passes.rewriting import assert_same, expected, randomise, refusals, text
from tests.passes.test_planted import TRANSFORMERS

STREAM = 10


class Attention(nn.Module):
    """Self-attention with every form a network may write it in; ``mask`` weighs each head's context."""

    def __init__(self, heads: int = 4, groups: int | None = None, width: int = 3, core: str = "sdpa") -> None:
        super().__init__()
        self.heads, self.groups, self.width, self.core = heads, groups or heads, width, core
        self.q = nn.Linear(STREAM, heads * width)
        self.k, self.v = (nn.Linear(STREAM, self.groups * width) for _ in range(2))
        self.out = nn.Linear(heads * width, STREAM)
        self.mask = torch.ones(heads, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.groups != self.heads and self.core != "gqa":
            k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        if self.core == "einsum":
            weights = (torch.einsum("bhid,bhjd->bhij", q, k) * self.width**-0.5).softmax(-1)
            return self.out(torch.einsum("bhij,bhjd->bihd", weights, v).flatten(2))
        if self.core == "spelled out":
            y = (q @ k.mT * self.width**-0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.core == "gqa")
        return self.out((y * self.mask.view(-1, 1, 1)).transpose(1, 2).flatten(2))


class Blocks(nn.Module):
    """Pre-norm layers of attention on one stream, and a head of 3 outputs."""

    def __init__(self, count: int = 2, **options: Any) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(STREAM) for _ in range(count))
        self.layers = nn.ModuleList(Attention(**options) for _ in range(count))
        self.last = nn.Linear(STREAM, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.last(x.mean(1))


def blocks(count: int = 2, seed: int = 1, **options: Any) -> Any:
    model = randomise(Blocks(count, **options).double(), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


def run(graph: Graph, calibration: Any = None, seed: int = 0, **options: Any) -> PassResult:
    """The pass, held to what every pass owes and to certificate 1."""
    before = graph.fingerprint()
    result = PruneHeads(**options).run(graph, Context(calibration=calibration, seed=seed))
    assert graph.fingerprint() == before
    result.graph.fx.lint()
    if result.changed:
        assert result.plan is not None
        assert mask_equivalence(graph, result.plan, pruned=result.pruned).passed
    return result


def trace(model: nn.Module, batch: int = 4, dynamic: bool = True) -> Graph:
    return graphprune.trace(model, x(batch, 5, STREAM), dynamic_batch=dynamic)


def data(count: int = 8, seed: int = 3) -> list[torch.Tensor]:
    return [x(4, 5, STREAM, seed=seed + i) for i in range(count)]


def ramp(graph: Graph, axis: Any) -> torch.Tensor:
    """The later a head the more it matters; a later layer's matter more."""
    later = [name for name in graph.axes if name.endswith(".0")].index(axis.name)
    return torch.arange(axis.size) + 100.0 * later


# ---- what goes ---------------------------------------------------------------------------------------


def test_expected_graph() -> None:
    model = randomise(Attention().double())
    result = run(graphprune.trace(model, x(2, 5, STREAM)), heads=2, importance=ramp)
    assert text(result.graph) == expected("""
        x: f64[2, 5, 10]
        linear: f64[2, 5, 6] = linear(x, %q.weight, %q.bias)
        unflatten: f64[2, 5, 2, 3] = unflatten.int(linear, -1, [-1, 3])
        transpose: f64[2, 2, 5, 3] = transpose.int(unflatten, 1, 2)
        linear_1: f64[2, 5, 6] = linear(x, %k.weight, %k.bias)
        unflatten_1: f64[2, 5, 2, 3] = unflatten.int(linear_1, -1, [-1, 3])
        transpose_1: f64[2, 2, 5, 3] = transpose.int(unflatten_1, 1, 2)
        linear_2: f64[2, 5, 6] = linear(x, %v.weight, %v.bias)
        unflatten_2: f64[2, 5, 2, 3] = unflatten.int(linear_2, -1, [-1, 3])
        transpose_2: f64[2, 2, 5, 3] = transpose.int(unflatten_2, 1, 2)
        scaled_dot_product_attention: f64[2, 2, 5, 3] = scaled_dot_product_attention(transpose, transpose_1, transpose_2)
        view: f64[2, 1, 1] = view(%mask, [-1, 1, 1])
        mul: f64[2, 2, 5, 3] = mul.Tensor(scaled_dot_product_attention, view)
        transpose_3: f64[2, 5, 2, 3] = transpose.int(mul, 1, 2)
        flatten: f64[2, 5, 6] = flatten.using_ints(transpose_3, 2)
        linear_3: f64[2, 5, 10] = linear(flatten, %out.weight, %out.bias)
        return (linear_3,)
    """)  # noqa: E501
    assert result.notes[0].message == "4 → 2 heads (positions 0, 1 removed)"
    model.mask[:2] = 0
    assert_same(result.graph, model, x(2, 5, STREAM))


@pytest.mark.parametrize("core", ["sdpa", "spelled out", "einsum"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_rest_computes_as_the_masked_network(core: str, dynamic: bool) -> None:
    """A head without its columns of the output projection, in the eager network, is the oracle."""
    model = blocks(core=core)
    result = run(trace(model, dynamic=dynamic), heads=0.5, importance=ramp)
    with torch.no_grad():
        model.layers[0].out.weight[:, :9] = 0
        model.layers[1].out.weight[:, :3] = 0
    assert shapes(result.graph, "layers.0.q.weight", "layers.1.out.weight") == [(3, 10), (10, 9)]
    assert_same(result.graph, model, x(4, 5, STREAM))


@pytest.mark.parametrize("core", ["gqa", "sdpa", "spelled out"])
def test_groups_go_with_their_queries(core: str) -> None:
    model = blocks(1, heads=6, groups=3, core=core)
    graph = trace(model)
    (layer,) = attentions(graph)
    assert [a.size for a in layer.heads] == [3]
    assert [a.size for a in layer.shared] == [2]
    assert layer.count == 6
    result = run(graph, heads=1, importance=lambda g, a: torch.tensor([2.0, 1.0, 3.0]))
    assert shapes(result.graph, "layers.0.q.weight", "layers.0.v.weight") == [(12, 10), (6, 10)]
    assert result.notes[0].message == "6 → 4 heads (group 1 removed)"
    model.layers[0].out.weight.data[:, 6:12] = 0
    assert_same(result.graph, model, x(4, 5, STREAM))


@pytest.mark.parametrize("core", ["gqa", "sdpa"])
def test_one_key_for_all_queries(core: str) -> None:
    graph = trace(blocks(1, heads=4, groups=1, core=core))
    result = run(graph, heads=3, importance="random")
    assert shapes(result.graph, "layers.0.q.weight", "layers.0.v.weight") == [(3, 10), (3, 10)]


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_across(need_weights: bool) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(STREAM, 5)

        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            return self.attention(x, memory, memory, need_weights=need_weights)[0]

    model: Any = randomise(Cross().double())
    graph = graphprune.trace(model, (x(3, 2, STREAM), x(7, 2, STREAM)))
    calibration = [(x(3, 2, STREAM, seed=s), x(7, 2, STREAM, seed=s + 9)) for s in range(4)]
    with torch.no_grad():
        model.attention.out_proj.weight[:, 6:8] = 1e-3
    result = run(graph, calibration, heads=1)
    assert result.graph.tensors["attention.in_proj_weight"].shape == (24, STREAM)
    with torch.no_grad():
        model.attention.out_proj.weight[:, 6:8] = 0
    assert_same(result.graph, model, x(3, 2, STREAM), x(7, 2, STREAM))


def test_shares_numbers_and_minimum() -> None:
    graph = trace(blocks(3))
    left = [layer.count for layer in attentions(run(graph, heads=0.5, importance="random").graph)]
    assert sum(left) == 6
    left = [layer.count for layer in attentions(run(graph, heads=6, minimum=2, importance=ramp).graph)]
    assert left == [2, 2, 2]
    left = [layer.count for layer in attentions(run(graph, heads=6, importance=ramp).graph)]
    assert left == [1, 1, 4]


@pytest.mark.parametrize("dimensions", [False, True])
def test_budgets_are_met_and_no_more_than_that(dimensions: bool) -> None:
    graph = trace(blocks(3, heads=6, groups=3, width=4))
    result = run(graph, data(2), macs=0.7, dimensions=dimensions)
    assert result.plan is not None
    before, after = result.plan.before["macs"], result.plan.after["macs"]
    step = max(row.macs / (row.before - row.after) for row in result.plan.rows)
    assert 0.7 * before - step < after <= 0.7 * before
    widths = {name for name in result.plan.removed if not name.endswith(".0")}
    assert bool(widths) == dimensions
    run(graph, importance="magnitude", params=0.9)
    run(graph, importance="magnitude", bytes=result.plan.before["bytes"] - 100)


def swin() -> tuple[nn.Module, tuple[torch.Tensor, ...], Any]:
    """Windows, shifted and masked, whose heads have a table of relative positions."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(2, 2), embed_dim=24, num_heads=(2, 4)
    )
    return model.eval(), (torch.randn(2, 3, 56, 56),), None


@pytest.mark.parametrize("name", [*TRANSFORMERS, "swin"])
@pytest.mark.parametrize("importance", ["michel", "magnitude"])
def test_networks_in_use(name: str, importance: str) -> None:
    """Post-norm and pre-norm, fused and apart, cross-attention, groups, windows."""
    model, inputs, _ = swin() if name == "swin" else TRANSFORMERS[name]()
    graph = graphprune.trace(model, inputs)
    before = [layer.count for layer in attentions(graph)]
    assert len(before) == {"swin": 4}.get(name, 2)
    result = run(graph, [inputs], heads=0.4, importance=importance)
    after = [layer.count for layer in attentions(result.graph)]
    assert sum(after) <= 0.6 * sum(before) + 1  # a group of two goes at once
    assert result.graph(*inputs) is not None


# ---- importance --------------------------------------------------------------------------------------


def masked_losses(model: Any, inputs: torch.Tensor, directions: torch.Tensor) -> list[torch.Tensor]:
    """Michel's importance of each layer's heads, by masks in the eager network, one input at a time."""
    totals = [torch.zeros(layer.heads, dtype=torch.float64) for layer in model.layers]
    for layer in model.layers:
        layer.mask = torch.ones(layer.heads, dtype=torch.float64, requires_grad=True)
    for sample, direction in zip(inputs, directions, strict=True):
        loss = (model(sample[None])[0] * direction).sum()
        for total, g in zip(totals, torch.autograd.grad(loss, [m.mask for m in model.layers]), strict=True):
            total += g.abs() / len(inputs)
    for layer in model.layers:
        layer.mask = torch.ones(layer.heads, dtype=torch.float64)
    return [total / total.norm() for total in totals]


@pytest.mark.parametrize("core", ["sdpa", "spelled out"])
def test_michel_is_the_gradient_of_masks(core: str) -> None:
    """With a loss of the caller's, the scores are those of masks in the eager network, to rounding."""
    model = blocks(core=core)
    inputs = torch.cat(data(3))
    directions = x(len(inputs), 3, seed=8)

    def loss(module: nn.Module) -> Iterator[torch.Tensor]:
        for sample, direction in zip(inputs, directions, strict=True):
            yield (module(sample[None])[0] * direction).sum()

    graph = trace(model)
    found = sensitivities(graph, attentions(graph), (), loss=loss)
    for score, wanted in zip(found.values(), masked_losses(model, inputs, directions), strict=True):
        assert torch.allclose(score, wanted, rtol=1e-9)
    ranked = torch.stack(list(found.values()))
    result = run(graph, heads=1, loss=loss)
    layer, head = divmod(int(ranked.argmin()), 4)
    assert result.plan is not None
    assert list(result.plan.removed.values()) == [(head,)]
    assert next(iter(result.plan.removed)).startswith(f"layers.{layer}.")


@pytest.mark.parametrize("batch", [1, 4])
def test_michel_without_labels_is_how_far_the_output_moves(batch: int) -> None:
    """In expectation ``√(2/π) ‖∂y/∂ξ‖``, sample by sample, whatever the batch size."""
    model = blocks()
    inputs = x(144, 5, STREAM, seed=5)
    graph = trace(model)
    found = sensitivities(graph, attentions(graph), [(part,) for part in inputs.split(batch)], probes=4)
    for layer in model.layers:
        layer.mask = torch.ones(4, dtype=torch.float64, requires_grad=True)
    total = [torch.zeros(4, dtype=torch.float64) for _ in model.layers]
    for sample in inputs:
        y = model(sample[None])[0]
        rows = [torch.autograd.grad(v, [m.mask for m in model.layers], retain_graph=True) for v in y]
        for i, into in enumerate(total):
            into += torch.stack([row[i] for row in rows]).norm(dim=0)
    moves = [t / t.norm() for t in total]
    for score, wanted in zip(found.values(), moves, strict=True):
        # 144 samples of 4 directions each, of a half-normal variable.
        assert torch.allclose(score, wanted, rtol=4 * 0.76 / (144 * 4) ** 0.5)


def test_queries_of_keys_and_values_have_masks_of_their_own() -> None:
    """The width of keys is masked in the query, that of values in the context."""
    model = blocks(1)
    inputs = x(6, 5, STREAM, seed=2)
    layer = model.layers[0]
    layer.mask = torch.ones(4, dtype=torch.float64, requires_grad=True)
    graph = trace(blocks(1))

    def loss(module: nn.Module) -> Iterator[torch.Tensor]:
        return (module(sample[None]).square().sum() for sample in inputs)

    found = sensitivities(graph, attentions(graph), (), loss=loss, widths=True)
    masks = {name: torch.ones(3, dtype=torch.float64, requires_grad=True) for name in "qv"}

    class Masked(nn.Module):
        def __init__(self, inner: nn.Module, mask: torch.Tensor) -> None:
            super().__init__()
            self.inner, self.mask = inner, mask

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * self.mask.repeat(4)

    layer.q, layer.v = Masked(layer.q, masks["q"]), Masked(layer.v, masks["v"])
    total = [torch.zeros(n, dtype=torch.float64) for n in (4, 3, 3)]
    for sample in inputs:
        value = model(sample[None]).square().sum()
        for into, g in zip(
            total, torch.autograd.grad(value, [layer.mask, masks["q"], masks["v"]]), strict=True
        ):
            into += g.abs()
    wanted = [t / total[0].norm() for t in total]
    assert len(found) == 3
    for score, want in zip(found.values(), wanted, strict=True):
        assert torch.allclose(score, want, rtol=1e-9)


def test_a_head_that_writes_little_goes_first() -> None:
    model = blocks()
    layer = model.layers[1]
    layer.out.weight.data[:, 3:6] *= 1e-3
    graph = trace(model)
    for importance in ("michel", "magnitude"):
        if importance == "magnitude":
            for tensor in (t for part in (layer.q, layer.k, layer.v) for t in part.parameters()):
                tensor.data[3:6] *= 1e-3
            graph = trace(model)
        result = run(graph, data(), heads=1, importance=importance)
        assert result.plan is not None
        assert dict(result.plan.removed) == {"layers.1.q.weight[0].0": (1,)}


def test_seeds_and_layers_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Attention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x + self.layer(x))

    model = randomise(Twice().double())
    graph = trace(model)
    (layer,) = attentions(graph)
    assert len(layer.contexts) == 2
    assert layer.count == 4
    once, again = (run(graph, data(2), heads=2, seed=4).plan for _ in range(2))
    assert once == again


# ---- around it ---------------------------------------------------------------------------------------


def test_in_a_pipeline() -> None:
    (step,) = Pipeline.parse("prune-heads{heads=3 importance=random minimum=2}").passes
    assert step == PruneHeads(heads=3, importance="random", minimum=2)
    assert str(step) == "prune-heads{heads=3 minimum=2 importance=random}"
    recorder = Recorder()
    pipeline = Pipeline.parse("fold-constants,prune-heads{macs=0.8},clean-up")
    pipeline.run(trace(blocks()), Context(calibration=data(2)), [recorder])
    _, record, _ = recorder.records
    assert record.mask is not None
    assert record.mask.passed
    assert record.after.macs <= 0.8 * record.before.macs


def test_nothing_to_do() -> None:
    graph = trace(blocks())
    result = run(graph, macs=1.0, importance="magnitude")
    assert not result.changed
    assert result.graph is graph


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs what to remove"),
        ({"heads": 1.0}, "a share between 0 and 1, not 1.0"),
        ({"heads": -0.1}, "a share between 0 and 1, not -0.1"),
        ({"heads": 0}, "at least 1"),
        ({"heads": True}, "at least 1"),
        ({"heads": 7}, "the closest is heads 2 for 1 asked"),
        ({"heads": 0.9}, "the closest is heads 2 for 1 asked"),
        ({"heads": 4, "minimum": 3}, "keep at least 3 each; the closest is heads 6 for 4 asked"),
        ({"heads": 1, "minimum": 0}, "at least 1, not 0"),
        ({"heads": 1, "dimensions": True}, "dimensions cannot be counted"),
        ({"macs": 0.01}, "cannot be reached"),
        ({"macs": 0}, "macs must be positive"),
        ({"params": 10**9}, "params=1,000,000,000 is more than"),
        ({"heads": 1, "importance": "michelle"}, "did you mean 'michel'"),
        ({"heads": 1, "importance": lambda g, a: torch.zeros(3)}, "must be 4 finite numbers"),
        ({"heads": 1, "importance": lambda g, a: torch.full((4,), torch.nan)}, "must be 4 finite numbers"),
        ({"heads": 1, "importance": "michel", "loss": lambda m: []}, "gave no losses"),
        ({"heads": 1, "importance": "michel", "loss": lambda m: torch.zeros(())}, "does not depend"),
        ({"heads": 1, "importance": "michel", "loss": lambda m: m(x(1, 5, STREAM))}, "scalar tensors, got"),
        ({"heads": 1, "importance": "michel", "loss": lambda m: [1.0]}, "scalar tensors, got float"),
        (
            {"heads": 1, "importance": "michel", "loss": lambda m: m(x(1, 5, STREAM)).sum() * torch.inf},
            "must be finite",
        ),
        ({"heads": 1, "importance": "magnitude", "loss": lambda m: []}, "only importance='michel'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    options = {"importance": "magnitude", **options}
    with pytest.raises((InputError, PassError), match=message):
        run(trace(blocks()), **options)


def test_bad_calibration() -> None:
    graph = trace(blocks())
    with pytest.raises(PassError, match="needs calibration inputs or a loss"):
        run(graph, heads=1)
    with pytest.raises(InputError, match="holds no inputs"):
        run(graph, [], heads=1)
    with pytest.raises(InputError, match="not finite"):
        run(graph, [torch.full((1, 5, STREAM), torch.nan, dtype=torch.float64)], heads=1)


def test_no_heads() -> None:
    graph = graphprune.trace(nn.Linear(3, 2), torch.zeros(1, 3))
    with pytest.raises(PassError, match="no attention heads"):
        run(graph, heads=1, importance="magnitude")


def test_heads_that_cannot_go() -> None:
    """Heads whose positions the caller sees are refused with the reason, the other layer's go."""

    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Attention(), nn.MultiheadAttention(STREAM, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> Any:
            return self.second(self.first(x), x, x, average_attn_weights=False)

    graph = trace(randomise(Shown().double()))
    result = run(graph, heads=2, importance="magnitude")
    assert shapes(result.graph, "first.q.weight", "second.in_proj_weight") == [(6, 10), (30, 10)]
    (refusal,) = refusals(result)
    assert "frozen (the caller sees it)" in refusal


def test_meta_weights() -> None:
    with torch.device("meta"):
        graph = graphprune.trace(blocks().to("meta"), torch.empty(2, 5, STREAM, dtype=torch.float64))
    with pytest.raises(PassError, match="have shapes only"):
        run(graph, heads=1)
