"""``quantize-weights``: what becomes of weights, in the graph and in the file that ONNX Runtime runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphprune.backends.onnx_integers import pack, packed
from graphprune.passes.grams import InputGram, rounded_weight
from graphprune.passes.quantize_weights import QuantizeWeights
from graphprune.passes.repair.rows import form
from torch import nn

import graphprune
from graphprune.backend import Audit
from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.integers import INT8
from graphprune.pipeline import Context, PassResult, Pipeline
from graphprune.quantization.parameters import of_weight, to_integers
from graphprune.registry import backends
from graphprune.target import get
from tests.passes.rewriting import apply

BACKEND = backends.load("onnxruntime")()
TOKENS, WORDS, WIDTH = 12, 300, 128


class Words(nn.Module):
    """Two embeddings, linears, ``x @ W``, ``addmm``, and a head of its own or tied to the table."""

    def __init__(self, tied: bool = False, width: int = WIDTH):
        super().__init__()
        self.tokens, self.places = nn.Embedding(WORDS, width), nn.Embedding(TOKENS, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
        self.mix = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.out, self.shift = (
            nn.Parameter(torch.randn(width, width) / width**0.5),
            nn.Parameter(torch.randn(width)),
        )
        self.head = nn.Linear(width, WORDS, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        x = x + self.down(torch.relu(self.up(x))) @ self.mix
        flat = torch.addmm(self.shift, x.flatten(0, 1), self.out)
        return self.head(x + flat.unflatten(0, (ids.shape[0], -1)))


def words(batch: int, seed: int = 0) -> torch.Tensor:
    """Ids that are not equally frequent, so that inputs are correlated."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, TOKENS, generator=generator) ** 4 * WORDS).long()


def captured(tied: bool = False, width: int = WIDTH) -> Graph:
    torch.manual_seed(0)
    return graphprune.trace(Words(tied, width).eval(), words(2), dynamic_batch=True)


def run(text: str, graph: Graph, calibration: Any = None) -> PassResult:
    (step,) = Pipeline.parse(text).passes
    return step.run(graph, Context(calibration=calibration))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def lowered(graph: Graph, inputs: Sequence[torch.Tensor]) -> tuple[float, onnx.ModelProto, Audit]:
    """How far ONNX Runtime is from the graph, the file, and what the runtime made of it."""
    made = BACKEND.lower(graph, get("cpu"))
    runner = BACKEND.open(made.files, made.inputs, made.outputs, get("cpu"))
    worst = max(relative(a, b) for a, b in zip(runner(*inputs), graph.run(*inputs), strict=True))
    assert not made.notes
    return worst, onnx.load_from_string(made.files["model.onnx"]), BACKEND.audit(made, get("cpu"))


VARIANTS = [
    "quantize-weights",
    "quantize-weights{symmetric=false inputs=float}",
    "quantize-weights{bits=4 inputs=int8}",
    "quantize-weights{bits=4}",
    "quantize-weights{bits=4 block-size=16 symmetric=false}",
    "quantize-weights{bits=4 block-size=128 embedding-bits=4}",
    "quantize-weights{bits=3 symmetric=false embedding-bits=4}",
]


CASES = [(text, tied, WIDTH) for text in VARIANTS[::3] for tied in (False, True)]
CASES += [(text, True, WIDTH if number % 2 else 72) for number, text in enumerate(VARIANTS) if number % 3]
CASES += [(VARIANTS[3], True, 72)]  # 72 columns leave the last block open


@pytest.mark.parametrize(("text", "tied", "width"), CASES)
def test_the_runtime_computes_what_the_graph_does(text: str, tied: bool, width: int) -> None:
    graph = captured(tied, width)
    small = apply(text, graph).graph
    bits = int(text.partition("{bits=")[2][:1] or 8)
    off = relative(small.run(words(2))[0], graph.run(words(2))[0])
    assert 0 < off < {8: 0.02, 4: 0.2, 3: 0.4}[bits]
    worst, _, audit = lowered(small, [words(5, seed=1)])
    assert worst < (off / 5 if "inputs=float" not in text and (bits == 8 or "int8" in text) else 1e-5)
    kinds = Counter(row.precision for row in audit.rows if row.operator == "MatMulNBits")
    head = 8 if tied and "embedding-bits=4" not in text else max(bits, 4)
    assert sum(kinds.values()) == 5
    assert kinds == Counter([f"int{max(bits, 4)} weights"] * 4 + [f"int{head} weights"])
    assert not [row for row in audit.rows if row.operator in ("MatMul", "Gemm", "DequantizeLinear")]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("bits", "limit"), [(8, 0.27), (4, 0.18)])
def test_the_file_is_as_small_as_it_should_be(tied: bool, bits: int, limit: float) -> None:
    graph = captured(tied)
    sizes = []
    for one in (graph, apply(f"quantize-weights{{bits={bits} embedding-bits={bits}}}", graph).graph):
        sizes.append(sum(len(data) for data in BACKEND.lower(one, get("cpu")).files.values()))
    nodes = 5000  # what is no tensor
    assert sizes[1] <= limit * sizes[0] + nodes


def test_a_tied_table_is_one_constant_in_graph_and_file() -> None:
    small = apply("quantize-weights", captured(tied=True)).graph
    assert "tokens.weight_integers" in small.tensors
    assert not [name for name in small.tensors if name.startswith("head.")]
    _, model, _ = lowered(small, [words(2)])
    tables = [t for t in model.graph.initializer if int(np.prod(t.dims)) == WORDS * WIDTH]
    assert len(tables) == 1
    assert {"GatherBlockQuantized", "MatMulNBits"} <= {node.op_type for node in model.graph.node}


def test_an_embedding_is_looked_up_before_it_is_unpacked() -> None:
    small = apply("quantize-weights{only=[tokens]}", captured()).graph
    table, scale = small.tensors["tokens.weight_integers"], small.tensors["tokens.weight_scale"]
    assert (table.dtype, scale.shape) == (torch.int8, (WORDS, 1))
    for node in small.fx.find_nodes(op="get_attr", target="tokens.weight_integers"):
        assert [user.target for user in node.users] == [torch.ops.aten.embedding.default]
    _, model, audit = lowered(small, [words(2)])
    integers = next(
        t.name for t in model.graph.initializer if list(t.dims) == [WORDS, WIDTH] and t.data_type == 3
    )
    readers = [node.op_type for node in model.graph.node if integers in node.input]
    assert readers == ["Gather"]
    assert any(row.operator == "Gather" and row.precision == "int8" for row in audit.rows)


def test_the_integers_are_the_rows_of_the_weight() -> None:
    """One product by hand, from integers and scales alone; the padding of the last block is cut off."""
    torch.manual_seed(0)
    model = nn.Linear(40, 6).eval()
    x = torch.randn(3, 40)
    small = apply("quantize-weights{bits=4 block-size=32}", graphprune.trace(model, x)).graph
    integers, scale = (small.tensors[f"weight_{what}"].double().numpy() for what in ("integers", "scale"))
    assert integers.shape == (6, 64)
    assert scale.shape == (6, 2)
    assert np.abs(integers).max() <= 8
    assert not integers[:, 40:].any()
    weight = (integers * np.repeat(scale, 32, axis=1))[:, :40]
    wanted = x.double().numpy() @ weight.T + model.bias.detach().double().numpy()
    np.testing.assert_allclose(small.run(x)[0].numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_calibration_lowers_the_error_of_the_network(method: str) -> None:
    graph = captured()
    data = [words(16, seed) for seed in range(1, 5)]
    wanted = graph.run(words(32, seed=9))[0]
    errors, notes = {}, {}
    for name in ("nearest", method):
        result = run(f"quantize-weights{{bits=3 method={name} ignored=[tokens places]}}", graph, data)
        errors[name], notes[name] = relative(result.graph.run(words(32, seed=9))[0], wanted), result.notes
    assert errors[method] < 0.8 * errors["nearest"]
    assert "rounded by " + method in notes[method][0].message
    assert all("(nearest" in note.message for note in notes[method] if note.kind == "changed")


def test_later_weights_make_up_for_earlier_ones() -> None:
    """The Gram matrix of the second layer is that of the rounded first layer's results."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    x = torch.randn(200, 32)
    graph = graphprune.trace(model, x[:1], dynamic_batch=True)
    result = run("quantize-weights{bits=3 method=gptq limit=128}", graph, [x[:120], x[120:]])
    assert "off by" in next(n.message for n in result.notes if n.where == "2.weight")
    first = result.graph.tensors["0.weight_integers"] * result.graph.tensors["0.weight_scale"]
    hidden = torch.relu(x[:128] @ first.T + model[0].bias)
    gram = (hidden.T @ hidden).double()
    second = result.graph.tensors["2.weight_integers"] * result.graph.tensors["2.weight_scale"]
    off = second.double() - model[2].weight.double()
    whole = model[2].weight.double()
    wanted = float(((off @ gram * off).sum() / (whole @ gram * whole).sum()).detach()) ** 0.5
    message = next(n.message for n in result.notes if n.where == "2.weight")
    assert f"off by {wanted:.2%}" in message


def test_without_inputs_auto_is_the_nearest_and_says_so() -> None:
    result = run("quantize-weights{bits=4}", captured())
    assert "rounded by nearest, for there are no calibration inputs" in result.notes[0].message
    assert "rounded by gptq" in run("quantize-weights{bits=4}", captured(), [words(4)]).notes[0].message
    assert "rounded by nearest" in run("quantize-weights", captured(), [words(4)]).notes[0].message


def test_what_stays_in_float_is_said() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lstm = nn.Conv1d(64, 64, 3, padding=1), nn.LSTM(64, 64, batch_first=True)
            self.read, self.tiny, self.free = nn.Linear(64, 64), nn.Linear(64, 1), nn.Linear(64, 64)
            self.low = nn.Linear(64, 64).half()
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y, _ = self.lstm(self.conv(x.mT).mT)
            y = self.low(self.read(y).half()).float() + self.read.weight.sum()
            return self.free(y), self.tiny(self.normed(y))

    graph = graphprune.trace(Mixed().eval(), torch.randn(2, 5, 64))
    result = run("quantize-weights{only=[free tiny]}", graph)
    said = {note.where: note.message for note in result.notes if note.kind != "info"}
    assert "sum (" in said["read.weight"]
    assert "needs it in float" in said["read.weight"]
    assert "float16" in said["low.weight"]
    assert any("fold-parameters" in message for message in said.values())
    said_at_all = " ".join(note.message for note in result.notes)
    assert "1 convolution and 1 recurrent layer kept in float" in said_at_all
    assert set(result.graph.tensors) >= {"free.weight_integers", "tiny.weight_integers", "read.weight"}


def test_inputs_are_rounded_block_by_block() -> None:
    """By hand, and by the runtime, which rounds the same numbers: both agree far below the step."""
    torch.manual_seed(0)
    model, x = nn.Linear(40, 6, bias=False).eval(), torch.randn(3, 40)
    small = apply("quantize-weights{block-size=32}", graphprune.trace(model, x)).graph
    integers, scale = (small.tensors[f"weight_{what}"].double().numpy() for what in ("integers", "scale"))
    weight = (integers * np.repeat(scale, 32, axis=1))[:, :40]
    parts = []
    for part in (x[:, :32].double().numpy(), x[:, 32:].double().numpy()):
        step = np.abs(part).max(1, keepdims=True) / 127
        parts.append(np.rint(part / step) * step)
    wanted = np.concatenate(parts, 1) @ weight.T
    np.testing.assert_allclose(small.run(x)[0].numpy(), wanted, rtol=1e-4, atol=1e-5)
    worst, model_file, _ = lowered(small, [x])
    assert worst < 1e-5
    levels = [a.i for node in model_file.graph.node for a in node.attribute if a.name == "accuracy_level"]
    assert levels == [4]
    plain = apply("quantize-weights{inputs=float}", graphprune.trace(model, x)).graph
    assert not [node for node in plain.nodes if "round_blocks" in str(node.target)]


def test_a_weight_that_would_grow_stays() -> None:
    graph = graphprune.trace(nn.Linear(2, 8).eval(), torch.zeros(1, 2))
    result = apply("quantize-weights", graph)
    assert not result.changed
    assert "smaller so" in result.notes[1].message


def test_nothing_to_do_gives_the_graph_back() -> None:
    result = apply("quantize-weights", graphprune.trace(nn.Conv2d(1, 2, 3).eval(), torch.zeros(1, 1, 8, 8)))
    assert not result.changed
    assert "no weight to quantize" in result.notes[0].message


def test_ignored_and_only_take_names_and_globs() -> None:
    graph = captured()
    for text, kept in [
        ("only=[up down.weight]", {"up.weight", "down.weight"}),
        ('only=["*.weight"] ignored=[tokens "p*" head]', {"up.weight", "down.weight"}),
        ("ignored=[tokens.weight places up down head]", {"mix", "out"}),
    ]:
        names = {
            n for n in run(f"quantize-weights{{{text}}}", graph).graph.tensors if n.endswith("_integers")
        }
        assert names == {f"{name}_integers" for name in kept}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bits=5", "bits must be 3, 4 or 8, got 5"),
        ("embedding-bits=3", "embedding-bits must be 4 or 8, got 3"),
        ("block-size=48", "block-size must be one of 16, 32, 64, 128, got 48"),
        ("inputs=int4", "inputs must be auto, float or int8, got 'int4'"),
        ("method=gtpq", "auto or one of nearest, gptq, adaround, got 'gtpq'"),
        ("positions=0", "positions must be at least 1"),
        ("only=[nowhere]", "only name 'nowhere' matches no weight"),
        ('ignored=["q*"]', r"ignored name 'q\*' matches no weight .* tokens.weight, "),
    ],
)
def test_bad_options_are_named(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        run(f"quantize-weights{{{text}}}", captured())


def test_gptq_without_inputs_and_on_bad_ones() -> None:
    with pytest.raises(PassError, match="gptq needs calibration inputs"):
        run("quantize-weights{method=gptq}", captured())
    with pytest.raises(InputError, match="calibration holds no inputs"):
        run("quantize-weights{method=gptq}", captured(), [])
    shapes = graphprune.trace(nn.Linear(4, 4, device="meta"), torch.zeros(1, 4, device="meta"))
    with pytest.raises(InputError, match="meta device"):
        QuantizeWeights().run(shapes, Context())


def test_an_input_that_overflows_is_rounded_to_the_nearest_and_said() -> None:
    class Burst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x * 1e30 * 1e30)

    graph = graphprune.trace(Burst().eval(), torch.randn(2, 32))
    result = run("quantize-weights{bits=4 method=gptq}", graph, [torch.randn(2, 32)])
    assert "to the nearest" in result.notes[1].message
    assert "not finite on calibration inputs" in result.notes[1].message


def test_a_quantized_network_is_not_pruned_or_trained_after() -> None:
    with pytest.raises(PassError, match=r"needs float \(ended by 'quantize-weights'\)"):
        Pipeline.parse("quantize-weights,prune-channels{macs=0.5}").check()
    assert "trainable" in QuantizeWeights.destroys


def test_what_reads_blocks_otherwise_is_unpacked_with_a_note() -> None:
    graph = apply(
        "quantize-weights", graphprune.trace(nn.Linear(32, 8).eval(), torch.zeros(2, 32))
    ).graph.copy()
    weight = next(n for n in graph.nodes if "dequantize" in str(n.target))
    with graph.fx.inserting_before(graph.output):
        total = graph.fx.call_function(torch.ops.aten.sum.default, (weight,))
    graph.output.args = ((*graph.output.args[0], total),)
    graph.propagate()
    notes = packed(graph)
    assert "sum" in notes[0]
    assert "unpacked" in notes[0]
    assert not [n for n in graph.nodes if "dequantize" in str(n.target)]


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_keeps_every_integer(bits: int) -> None:
    integers = torch.randint(0, 2**bits, (3, 5, 7), dtype=torch.uint8)
    stored = pack(integers, bits)
    found = stored if bits == 8 else torch.stack([stored & 15, stored >> 4], -1).flatten(-2)[..., :7]
    assert torch.equal(found, integers)


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Linear(12, 6), (4, 12), 0),
        (nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1), (3, 4, 7, 7), 0),
        (nn.Conv1d(4, 4, 3, groups=4, dilation=2), (3, 4, 12), 0),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (3, 4, 5, 5), 1),
        (nn.ConvTranspose1d(4, 6, 2), (3, 4, 5), 1),
    ],
)
def test_gram_matrices_of_every_layout(layer: nn.Module, shape: tuple[int, ...], axis: int) -> None:
    """The squared error that the Gram matrix tells is that of the layer's own results."""
    torch.manual_seed(0)
    x = torch.randn(*shape) + 0.3
    node = graphprune.trace(layer.eval(), x).nodes[-2]
    gram = InputGram(node)
    gram.add(x[:1])
    gram.add(x[1:])
    weight = dict(layer.named_parameters())["weight"].detach()
    how = of_weight(weight, INT8, axis)
    coarse = type(how)(how.scale * 20, how.zero_point, how.format, axis)
    nearest = rounded_weight(node, weight, coarse, None, "nearest")
    assert torch.equal(nearest, to_integers(weight, coarse))
    better = rounded_weight(node, weight, coarse, gram.matrix, "gptq")
    assert better.shape == weight.shape
    errors = []
    spread = [1] * weight.dim()
    spread[axis] = -1
    for integers in (nearest, better):
        other = integers.double() * coarse.scale.reshape(spread).double()
        wanted, found = layer(x), torch.func.functional_call(layer, {"weight": other.float()}, (x,))
        errors.append(float((found - wanted).detach().double().square().sum()))
    assert errors[1] <= errors[0]
    moved = form(node).matrix(better.double() * coarse.scale.reshape(spread).double() - weight.double()).mT
    told = float(sum((e @ h * e).sum() for e, h in zip(moved, gram.matrix, strict=True)))
    assert told == pytest.approx(errors[1], rel=1e-3)
