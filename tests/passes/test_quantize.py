"""Static quantization: what becomes integers, with which scales, and what ONNX Runtime makes of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from graphprune.passes.quantize.annotate import annotate
from graphprune.passes.quantize.prepare import written_out
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.cost import cost
from graphprune.errors import InputError, PassError
from graphprune.integers import INT8, OPENVINO, UINT8
from graphprune.kinds import kind
from graphprune.pipeline import Context, Pipeline
from graphprune.registry import passes
from graphprune.target import get

from .quantizing import CPU, Block, Dense, Inverted, Residual, Words, audit, images, lossless, noise, run

qd = torch.ops.quantized_decomposed
NETWORKS = {"residual": Residual, "inverted": Inverted, "dense": Dense}


@pytest.mark.parametrize("name", NETWORKS)
def test_all_that_multiplies_runs_in_int8(name: str) -> None:
    torch.manual_seed(1)
    graph = lossless(NETWORKS[name](), torch.randn(1, 3, 16, 16))
    done = run("quantize", graph, images(1, 3, 16, 16))
    found = audit(done.graph)
    assert set(found.macs) == {"int8"}
    assert not [row for row in found.rows if row.reason]
    # One quantizer at the input, at most one dequantizer at the output: nothing is undone in between.
    assert found.counts["QuantizeLinear"] == 1
    assert found.counts.get("DequantizeLinear", 0) <= 1
    assert noise(done.graph, graph, *images(1, 3, 16, 16, seed=9, count=1)) < 0.1


@pytest.mark.parametrize("masked", [False, True])
def test_a_transformer_keeps_its_sums_in_float(masked: bool) -> None:
    torch.manual_seed(2)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    example = (torch.randn(1, 6, 32), mask) if masked else (torch.randn(1, 6, 32),)
    graph = lossless(Block(), *example)
    calibration = [(x, mask) if masked else x for x in images(1, 6, 32)]
    done = run("quantize", graph, calibration)  # type: ignore[arg-type]
    found = audit(done.graph)
    assert set(found.macs) == {"int8"}
    assert found.counts["QGemm"] == 6
    assert found.counts["Add"] + found.counts.get("SkipLayerNormalization", 0) >= 2
    assert "QLinearAdd" not in found.counts
    assert not [row for row in found.rows if row.fell_back]
    refused = [note for note in done.notes if note.kind == "refused" and "add stays in float" in note.message]
    assert len(refused) == 2
    assert noise(done.graph, graph, *example) < 0.05


def test_operands_of_products_have_no_zero_point_where_the_runtime_wants_none() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.table = nn.Parameter(torch.rand(8, 4))

        def forward(self, x):
            product = (x @ self.a(x).relu().transpose(1, 2)).softmax(-1) @ self.b(x)
            return self.c(product) @ self.table

    data = images(2, 5, 8)
    graph = lossless(Products(), data[0])
    context = Context(replace(CPU, integers=OPENVINO), calibration=data)
    done = passes.load("quantize")().run(graph, context).graph
    found = []
    for node in done.find(torch.ops.aten.matmul.default):
        read = [value.args[0] if kind(value) == "transpose" else value for value in node.args[:2]]
        found.append([(value.args[2], value.args[5]) for value in read])
    either, positive = (0, torch.int8), (0, torch.uint8)
    assert found == [[either, either], [positive, either], [either, either]]


def test_without_attention_its_products_stay_in_float() -> None:
    graph = lossless(Block(), torch.randn(1, 6, 32))
    found = audit(run("quantize", graph, images(1, 6, 32), attention=False).graph)
    assert found.macs["float32"] == 2 * 6 * 6 * 32


def test_numbers_are_those_of_integer_arithmetic() -> None:
    """Independent oracle: int32 sums of uint8 and int8 products in numpy."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    graph = graphprune.trace(model, torch.zeros(1, 6))
    done = run("quantize", graph, images(1, 6), observer="minmax").graph
    scales = {n.name: n.args[1:3] for n in done.find(qd.quantize_per_tensor.default)}
    (s0, z0), (s1, z1) = scales.values()
    x = images(1, 6, seed=5, count=1)[0]

    def layer(number: int, q: np.ndarray, scale: float, zero: int) -> np.ndarray:
        w = done.tensors[f"{number}.weight.integers"].numpy().astype(np.int64)
        ws = done.tensors[f"{number}.weight.scale"].numpy().astype(np.float64)
        bias = np.round(model[number].bias.detach().double().numpy() / (scale * ws))
        return ((q.astype(np.int64) - zero) @ w.T + bias) * scale * ws

    q = np.clip(np.round(x.double().numpy() / s0) + z0, 0, 255)
    hidden = layer(0, q, s0, z0)
    q = np.clip(np.round(hidden / s1) + z1, 0, 255)
    np.testing.assert_allclose(done.run(x)[0].numpy(), layer(2, q, s1, z1), rtol=1e-4, atol=1e-5)
    assert z1 == 0  # the ReLU is the quantizer's own saturation …
    assert not list(done.find(torch.ops.aten.relu.default))  # … and gone


def test_weights_have_the_scale_of_their_channel_and_lose_half_a_step() -> None:
    torch.manual_seed(4)
    graph = lossless(Residual(), torch.randn(1, 3, 16, 16))
    done = run("quantize", graph, images(1, 3, 16, 16), rounding="nearest").graph
    checked = 0
    for name, value in graph.tensors.items():
        if f"{name}.integers" not in done.tensors or value.dim() < 2:
            continue
        integers, scale = done.tensors[f"{name}.integers"], done.tensors[f"{name}.scale"]
        assert integers.dtype == torch.int8
        assert int(integers.min()) >= -127
        rows = integers.flatten(1).float() * scale[:, None]
        largest = value.detach().flatten(1).abs().amax(1)
        torch.testing.assert_close(scale * 127, largest)
        assert bool(((rows - value.detach().flatten(1)).abs() <= 0.5001 * scale[:, None]).all())
        checked += 1
    assert checked == 4


def test_max_pool_has_one_scale_on_both_sides() -> None:
    graph = lossless(Residual(), torch.randn(1, 3, 16, 16))
    done = run("quantize", graph, images(1, 3, 16, 16)).graph
    (pool,) = done.find(torch.ops.aten.max_pool2d.default)
    before = pool.args[0].args  # type: ignore[union-attr]
    (after,) = [user.args for user in pool.users]
    assert before[1:3] == after[1:3]


@pytest.mark.parametrize("layer", [nn.Hardswish(), nn.Hardsigmoid(), nn.SiLU()])
def test_what_is_written_out_computes_the_same(layer: nn.Module) -> None:
    graph = graphprune.trace(layer, torch.zeros(1, 50)).copy()
    before = graph.copy()
    (node,) = [n for n in graph.nodes if n.op == "call_function"]
    written_out(graph, node)
    x = torch.linspace(-8, 8, 50).reshape(1, -1)
    torch.testing.assert_close(graph.propagate().run(x)[0], before.run(x)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_written_out_computes_the_same(causal: bool, scale: float | None) -> None:
    class Attention(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)

    torch.manual_seed(6)
    inputs = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    graph = graphprune.trace(Attention(), tuple(inputs)).copy()
    before = graph.copy()
    (node,) = graph.find(torch.ops.aten.scaled_dot_product_attention.default)
    written_out(graph, node)
    torch.testing.assert_close(
        graph.propagate().run(*inputs)[0], before.run(*inputs)[0], rtol=1e-5, atol=1e-6
    )


def test_a_hard_swish_that_feeds_float_stays_what_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Hardswish(), nn.LayerNorm(8), nn.Linear(8, 2))
    done = run("quantize", lossless(model, torch.zeros(1, 4)), images(1, 4)).graph
    assert len(list(done.find(torch.ops.aten.hardswish.default))) == 1


def test_a_tied_vocabulary_is_one_table_of_integers() -> None:
    torch.manual_seed(7)
    ids = torch.randint(0, 50, (1, 6))
    graph = lossless(Words(), ids)
    calibration = [torch.randint(0, 50, (1, 6)) for _ in range(8)]
    done = run("quantize", graph, calibration)
    tables = [t for t in done.graph.tensors.values() if t.shape == (50, 32)]
    assert [t.dtype for t in tables] == [torch.int8]
    assert noise(done.graph, graph, ids) < 0.05
    kept = run("quantize", graph, calibration, embeddings=False).graph
    assert sorted(str(t.dtype) for t in kept.tensors.values() if t.shape == (50, 32)) == [
        "torch.float32",
        "torch.int8",
    ]


def test_an_embedding_alone_is_within_half_a_step_of_its_row() -> None:
    torch.manual_seed(8)
    ids = torch.randint(0, 50, (1, 6))
    graph = lossless(Words(tied=False), ids)
    done = run("quantize", graph, [ids]).graph
    integers, scale = done.tensors["table.weight.integers"], done.tensors["table.weight.scale"]
    table = graph.tensors["table.weight"].detach()
    assert bool(((integers.float() * scale[:, None] - table).abs() <= 0.5001 * scale[:, None]).all())


def test_positions_that_are_added_are_kept_as_integers() -> None:
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.block = nn.Parameter(torch.randn(1, 128, 32)), Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x + self.places)

    torch.manual_seed(12)
    graph = lossless(Placed(), torch.randn(1, 128, 32))
    done = run("quantize", graph, images(1, 128, 32)).graph
    integers, scale = done.tensors["places.integers"], done.tensors["places.scale"]
    assert "places" not in done.tensors
    rows = graph.tensors["places"].detach()
    assert bool(((integers.float() * scale[:, None] - rows).abs() <= 0.5001 * scale[:, None]).all())
    assert noise(done, graph, torch.randn(1, 128, 32)) < 0.05
    assert set(audit(done).macs) == {"int8"}


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_keep_their_weights_as_integers(groups: int) -> None:
    torch.manual_seed(13)
    up = nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1, groups=groups)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), up, nn.ReLU(), nn.Conv2d(16, 2, 1))
    graph = lossless(model, torch.randn(1, 3, 8, 8))
    done = run("quantize", graph, images(1, 3, 8, 8))
    integers, scale = (done.graph.tensors[f"2.weight.{part}"] for part in ("integers", "scale"))
    assert "2.weight" not in done.graph.tensors
    assert scale.shape == (16 // groups,)
    steps = (integers.float() * scale[:, None, None] - up.weight.detach()).abs() / scale[:, None, None]
    assert float(steps.max()) <= 0.5001
    assert any("computed with in float" in note.message for note in done.notes)
    assert noise(done.graph, graph, torch.randn(1, 3, 8, 8)) < 0.05
    assert audit(done.graph).counts["ConvTranspose"] == 1
    kept = run("quantize", graph, images(1, 3, 8, 8), ignored=("2",)).graph
    assert kept.tensors["2.weight"].dtype == torch.float32


def test_weights_too_wide_to_round_together_are_rounded_to_the_nearest_and_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(14)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    graph, data = lossless(model, torch.zeros(1, 16)), images(1, 16)
    for module in ("staged", "weights"):
        monkeypatch.setattr(f"graphprune.passes.quantize.{module}.WIDEST", 16)
    mixed = run("quantize", graph, data, bits=4)
    nearest, gptq = (
        run("quantize", graph, data, bits=4, rounding=r).graph.tensors for r in ("nearest", "gptq")
    )
    assert [n.where for n in mixed.notes if "does not fit in memory" in n.message] == ["linear_1"]
    tensors = mixed.graph.tensors
    assert torch.equal(tensors["2.weight.integers"], nearest["2.weight.integers"])
    assert torch.equal(tensors["0.weight.integers"], gptq["0.weight.integers"])
    assert not torch.equal(tensors["0.weight.integers"], nearest["0.weight.integers"])


def test_only_and_ignored() -> None:
    graph = lossless(Residual(), torch.randn(1, 3, 16, 16))
    data = images(1, 3, 16, 16)
    found = audit(run("quantize", graph, data, ignored=("stem",)).graph)
    assert [row.operator for row in found.rows if row.precision == "float32" and row.macs] == ["nchwc.Conv"]
    found = audit(run("quantize", graph, data, only=("head",)).graph)
    assert found.macs["int8"] == 8 * 4
    with pytest.raises(InputError, match="ignored='stern' matches no operator"):
        run("quantize", graph, data, ignored=("stern",))


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_four_bits_rounded_together_beat_the_nearest(rounding: str) -> None:
    torch.manual_seed(9)
    graph = lossless(
        nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, groups=2)),
        torch.randn(1, 4, 12, 12),
    )
    mixing = torch.randn(4, 4)
    data = [torch.einsum("nchw,cd->ndhw", x, mixing) for x in images(4, 4, 12, 12)]
    data = [x for batch in data for x in batch.split(1)]
    probe = torch.einsum("nchw,cd->ndhw", images(1, 4, 12, 12, seed=77, count=1)[0], mixing)
    nearest = noise(run("quantize", graph, data, bits=4, rounding="nearest").graph, graph, probe)
    better = noise(run("quantize", graph, data, bits=4, rounding=rounding).graph, graph, probe)
    assert better < 0.85 * nearest
    integers = run("quantize", graph, data, bits=4, rounding=rounding).graph.tensors["0.weight.integers"]
    assert -7 <= int(integers.min()) <= int(integers.max()) <= 7


def test_a_depthwise_layer_is_rounded_for_what_it_computes() -> None:
    """Nine large weights that nearly cancel: to the nearest, the error has a mean."""
    torch.manual_seed(11)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        model[2].weight.copy_(torch.randn(8, 1, 3, 3) * 5)
        model[2].weight -= model[2].weight.mean((2, 3), keepdim=True)
    graph = lossless(model, torch.randn(1, 3, 12, 12))
    data = [x.abs() + 1 for x in images(1, 3, 12, 12, count=32)]
    with torch.no_grad():
        seen = model[:2](images(16, 3, 12, 12, seed=5, count=1)[0].abs() + 1)
    errors = []
    for rounding in ("auto", "nearest"):
        tensors = run("quantize", graph, data, rounding=rounding).graph.tensors
        found = tensors["2.weight.integers"] * tensors["2.weight.scale"].reshape(-1, 1, 1, 1)
        errors.append(float(F.conv2d(seen, found - model[2].weight.detach(), groups=8).norm()))
    assert errors[0] < 0.5 * errors[1]


# ---- what is odd about calibration inputs --------------------------------------------------------


def model_and_graph() -> graphprune.Graph:
    torch.manual_seed(10)
    return lossless(Residual(), torch.randn(1, 3, 16, 16))


def finite(graph: graphprune.Graph) -> bool:
    return bool(torch.isfinite(graph.run(*images(1, 3, 16, 16, seed=3, count=1))[0]).all())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_images_are_named_and_leave_a_finite_network(value: float) -> None:
    done = run("quantize", model_and_graph(), [torch.full((1, 3, 16, 16), value)] * 4)
    assert any(note.kind == "warning" and "one value" in note.message for note in done.notes)
    assert finite(done.graph)


def test_one_sample_is_enough_and_is_counted() -> None:
    done = run("quantize", model_and_graph(), images(1, 3, 16, 16, count=1))
    assert any(note.message.startswith("1 samples") for note in done.notes)
    assert finite(done.graph)


def test_outliers_are_named_and_clipped() -> None:
    data = images(1, 3, 16, 16)
    data[0][0, 0, 0, 0] = 1e4
    done = run("quantize", model_and_graph(), data)
    assert any(note.kind == "warning" and "largest value" in note.message for note in done.notes)
    assert finite(done.graph)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    data = images(1, 3, 16, 16)
    data[3][0, 1, 2, 3] = bad
    with pytest.raises(InputError, match=r"calibration input 3.*not finite"):
        run("quantize", model_and_graph(), data)


def test_values_that_overflow_on_the_way_are_named_by_their_place() -> None:
    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.exp(x * 1000))

    with pytest.raises(InputError, match="exp"):
        run("quantize", graphprune.trace(Overflowing(), torch.zeros(1, 4)), [torch.ones(1, 4)])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([torch.zeros(1, 3, 8, 8)], "has shape"),
        ([torch.zeros(1, 3, 16, 16, dtype=torch.float64)], "float64"),
        ([], "holds no inputs"),
        (torch.zeros(1, 3, 16, 16), "put it in a list"),
    ],
)
def test_inputs_of_another_kind_are_refused(data: list[torch.Tensor], words: str) -> None:
    with pytest.raises(InputError, match=words):
        run("quantize", model_and_graph(), data)


def test_larger_batches_are_cut() -> None:
    done = run("quantize", model_and_graph(), [torch.randn(5, 3, 16, 16)])
    assert any("5 samples" in note.message for note in done.notes)


# ---- what is odd about the rest ----------------------------------------------------------------------


def test_no_calibration_and_no_integers_on_the_target() -> None:
    graph = model_and_graph()
    quantize = passes.load("quantize")()
    with pytest.raises(PassError, match="needs calibration inputs"):
        quantize.run(graph, Context())
    with pytest.raises(PassError, match="nothing is known of integers on target 'cuda'"):
        quantize.run(graph, Context(target=get("cuda"), calibration=images(1, 3, 16, 16)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"observer": "mean"}, "observer"),
        ({"rounding": "up"}, "rounding must be"),
        ({"bits": 9}, "2 to 8 bits"),
    ],
)
def test_options_out_of_range(options: dict[str, object], words: str) -> None:
    with pytest.raises((InputError, graphprune.errors.TargetError), match=words):
        run("quantize", model_and_graph(), images(1, 3, 16, 16), **options)


def test_pruning_comes_before() -> None:
    with pytest.raises(PassError, match=r"'prune-channels': needs float .ended by 'quantize'."):
        Pipeline.parse("quantize,prune-channels{macs=0.5}").check()
    with pytest.raises(PassError, match="'quantize': needs float"):
        Pipeline.parse("quantize,quantize").check()


def test_a_network_without_products_says_so() -> None:
    graph = graphprune.trace(nn.ReLU(), torch.zeros(1, 4))
    done = run("quantize", graph, images(1, 4))
    assert not done.changed
    assert "nothing in this network runs in integers" in done.notes[0].message


def test_the_given_graph_is_left_alone() -> None:
    graph = model_and_graph()
    before = graph.fingerprint()
    run("quantize", graph, images(1, 3, 16, 16))
    assert graph.fingerprint() == before


def test_annotation_leaves_out_what_feeds_float() -> None:
    """A sum before a layer norm stays in float, and the sum that feeds only it, too."""

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.norm = nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.a(x), self.b(x)
            return self.norm((a + b) + a)

    graph = graphprune.trace(Sums(), torch.zeros(1, 8))
    assert CPU.integers is not None
    found = annotate(graph, CPU.integers)
    assert [kind(node) for node in found.runs] == ["linear", "linear"]
    assert sorted(found.floats.values()) == [
        "its result is read in float, by add", "its result is read in float, by layer-norm",
    ]  # fmt: skip


def test_weights_count_as_parameters_still() -> None:
    graph = model_and_graph()
    done = run("quantize", graph, images(1, 3, 16, 16)).graph
    weights = sum(t.numel() for t in graph.tensors.values() if t.dim() > 1)
    assert cost(done).parameters == weights
    assert cost(done).bytes < 0.35 * cost(graph).bytes


def test_formats() -> None:
    assert (INT8.range, UINT8.range) == ((-127, 127), (0, 255))
