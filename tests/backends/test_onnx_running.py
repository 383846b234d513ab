"""Opening, running and auditing ONNX files."""

from __future__ import annotations

import dataclasses
import graphlib
import re
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from graphprune.backends import onnx_sides
from graphprune.backends.onnx_assigned import assigned
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from graphprune.backend import Lowered, TensorSpec
from graphprune.errors import BackendError, InputError
from graphprune.registry import backends
from graphprune.target import Target, get, host_arch
from tests.zoo import get as network

BACKEND = backends.load("onnxruntime")()


class Two(nn.Module):
    def forward(self, image, scale):
        return image * scale[:, None, None]


@pytest.fixture
def two(opened):
    return opened(Two(), torch.randn(2, 3, 4), torch.randn(2), dynamic=True)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ((torch.zeros(2, 3, 4),), r"expected 2 inputs \(image, scale\), got 1"),
        ((torch.zeros(2, 3, 4), 3.0), "input 'scale' must be a tensor, got float"),
        ((torch.zeros(2, 3, 4).double(), torch.zeros(2)), "'image' must be float32, got float64"),
        ((torch.zeros(2, 3, 5), torch.zeros(2)), r"'image' must have shape \(batch, 3, 4\), got \(2, 3, 5\)"),
        ((torch.zeros(3, 4), torch.zeros(2)), r"'image' must have shape .* got \(3, 4\)"),
        ((torch.zeros(0, 3, 4), torch.zeros(0)), r"'image' is empty .*batch must be at least 1"),
        ((torch.zeros(2, 3, 4), torch.zeros(3)), "input 'scale' has batch = 3, but input 'image' has 2"),
    ],
)
def test_inputs_that_do_not_fit_are_named(two, inputs, says):
    with pytest.raises(InputError, match=says):
        two.runner(*inputs)


def test_a_fixed_batch_says_how_to_get_another(opened):
    made = opened(nn.Linear(3, 2), torch.randn(1, 3))
    with pytest.raises(InputError, match="dynamic_batch=True"):
        made.runner(torch.randn(4, 3))


def test_any_layout_and_gradient_state_will_do(two):
    image = torch.randn(4, 3, 2).transpose(0, 2).requires_grad_()
    assert not image.is_contiguous()
    (result,) = two.runner(image, torch.tensor([2.0, 3.0]))
    assert torch.equal(result, (image * torch.tensor([2.0, 3.0])[:, None, None]).detach())
    assert not result.requires_grad


def test_scalar_inputs_and_outputs(opened):
    class Scalar(nn.Module):
        def forward(self, x, y):
            return (x * y).sum()

    made = opened(Scalar(), torch.tensor(2.0), torch.randn(3))
    made.matches(torch.tensor(4.0), torch.randn(3))


def test_a_failing_run_is_one_line(opened):
    made = opened(nn.Embedding(5, 2), torch.tensor([1]))
    with pytest.raises(BackendError, match="failed while running") as caught:
        made.runner(torch.tensor([9]))
    assert "\n" not in str(caught.value)


def test_threads(opened):
    made = opened(nn.Linear(3, 2), torch.randn(1, 3), threads=1)
    assert made.runner.threads == 1
    made.matches(torch.randn(1, 3))
    with pytest.raises(InputError, match="at least 1"):
        opened(nn.Linear(3, 2), torch.randn(1, 3), threads=0)


def test_other_architectures_answer_here(opened):
    other = "arm" if host_arch() == "x86_64" else "x86"
    made = opened(nn.Linear(3, 2), torch.randn(1, 3), target=other)
    made.matches(torch.randn(1, 3))
    assert BACKEND.unrunnable(get(other)) is None
    audit = BACKEND.audit(made.lowered, get(other))
    assert get(other).arch in audit.notes[0]
    bound = dataclasses.replace(get(other), portable=False)
    assert get(other).arch in (BACKEND.unrunnable(bound) or "")


def test_absent_providers_are_said(opened, monkeypatch):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = opened(nn.Linear(3, 2), torch.randn(1, 3), target="cuda")
    made.matches(torch.randn(1, 3))
    assert made.runner.providers == ("CPUExecutionProvider",)
    assert ["CUDAExecutionProvider" in note for note in made.runner.notes] == [True]
    rows = BACKEND.audit(made.lowered, get("cuda")).rows
    assert all("has no CUDAExecutionProvider" in row.reason for row in rows)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "onnxruntime-gpu" in BACKEND.unrunnable(get("cuda"))
    only = Target("gpu", "cuda", providers=("CUDAExecutionProvider",))
    assert "onnxruntime-gpu" in BACKEND.unrunnable(only)
    with pytest.raises(BackendError, match="none of the providers"):
        BACKEND.open(made.lowered.files, made.lowered.inputs, made.lowered.outputs, only)


def test_files_that_are_no_model(two):
    with pytest.raises(BackendError, match=r"there is no model\.onnx"):
        BACKEND.open({}, (), (), get("cpu"))
    with pytest.raises(BackendError, match="does not open") as caught:
        BACKEND.open({"model.onnx": b"nonsense"}, (), (), get("cpu"))
    assert "\n" not in str(caught.value)
    with pytest.raises(BackendError, match="not the specification's"):
        BACKEND.open(two.lowered.files, two.lowered.inputs[:1], two.lowered.outputs, get("cpu"))


@pytest.mark.network
def test_audit_of_a_convolutional_network(opened):
    chosen = network("tv_resnet18")
    made = opened(chosen.build(), *chosen.inputs())
    audit = BACKEND.audit(made.lowered, get("cpu"))
    assert sum(row.operator.endswith("Conv") for row in audit.rows) == 20
    assert {row.precision for row in audit.rows} == {"float32"}
    # An independent count: what each layer computes, by forward hooks.
    wanted = 0

    def count(layer, args, output):
        nonlocal wanted
        inner = layer.weight[0].numel()
        wanted += output.numel() * inner

    for layer in made.model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    with torch.no_grad():
        made.model(*chosen.inputs())
    assert audit.macs == {"float32": wanted}
    assert audit.notes == ()


def test_audit_counts_attention_and_recurrence(opened):
    made = opened(nn.LSTM(6, 5, batch_first=True), torch.randn(2, 7, 6))
    assert BACKEND.audit(made.lowered, get("cpu")).macs == {"float32": 2 * 7 * 4 * 5 * (6 + 5)}

    class Product(nn.Module):
        def forward(self, a, b):
            return a @ b

    made = opened(Product(), torch.randn(2, 3, 4), torch.randn(2, 4, 5))
    assert BACKEND.audit(made.lowered, get("cpu")).macs == {"float32": 2 * 3 * 4 * 5}


def quantized(fused: bool) -> Lowered:
    """One convolution between quantize and dequantize nodes; unfused, its result stays float."""
    weight = np.random.default_rng(0).integers(-100, 100, (8, 4, 3, 3)).astype(np.int8)
    constants = [
        numpy_helper.from_array(np.float32(0.02), "scale"),
        numpy_helper.from_array(np.uint8(128), "zero"),
        numpy_helper.from_array(np.full(8, 0.01, np.float32), "weight_scale"),
        numpy_helper.from_array(np.zeros(8, np.int8), "weight_zero"),
        numpy_helper.from_array(weight, "weight"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xf"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["wf"], axis=0),
        helper.make_node("Conv", ["xf", "wf"], ["y" if not fused else "c"], name="conv"),
    ]
    if fused:
        nodes += [
            helper.make_node("QuantizeLinear", ["c", "scale", "zero"], ["cq"]),
            helper.make_node("DequantizeLinear", ["cq", "scale", "zero"], ["y"]),
        ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 4, 4])], constants,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    spec = TensorSpec("x", (1, 4, 6, 6), "float32"), TensorSpec("y", (1, 8, 4, 4), "float32")
    return Lowered("onnxruntime", {"model.onnx": model.SerializeToString()}, spec[:1], spec[1:])


def test_audit_tells_int8_from_what_fell_back():
    fused = BACKEND.audit(quantized(True), get("cpu"))
    assert fused.counts["QLinearConv"] == 1
    assert fused.macs == {"int8": 8 * 4 * 4 * 4 * 9}
    assert not any(row.reason for row in fused.rows)
    loose = BACKEND.audit(quantized(False), get("cpu"))
    (conv,) = [row for row in loose.rows if "Conv" in row.operator]
    assert conv.precision == "float32"
    assert "did not fuse" in conv.reason
    assert conv.macs == fused.macs["int8"], "though its weight is no constant"


DECIDING = """
<ir_version: 10, opset_import: ["": 20]>
deciding (float[1, 4] x, float[2, 2] s) => (float[1, 4] y)
<float[4, 4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}, float[4, 6] v = {VALUES},
 float[6, 4] u = {VALUES}, float zero = {0.0}>
{
    total = ReduceSum <keepdims = 0> (x)
    c = Greater (total, zero)
    y = If (c) <
        then_branch = easy () => (float[1, 4] a) { [product] a = MatMul (x, w) },
        else_branch = hard () => (float[1, 4] b) {
            [first] h = MatMul (x, v)
            d = Less (total, zero)
            b = If (d) <
                then_branch = harder () => (float[1, 4] p) {
                    [second] g = MatMul (h, u) [scaled] p = Mul (g, x)
                },
                else_branch = other () => (float[1, 4] q) {
                    [small] r = MatMul (s, s) [mean] t = ReduceMean <keepdims = 0> (r) [away] q = Add (x, t)
                }
            >
        }
    >
}
""".replace("VALUES", ", ".join(["0.5"] * 24))


def deciding() -> Lowered:
    """A decision in a side of a decision; zeros take the innermost side with the smallest product."""
    model = onnx.parser.parse_model(DECIDING)
    onnx.checker.check_model(model)
    inputs = TensorSpec("x", (1, 4), "float32"), TensorSpec("s", (2, 2), "float32")
    files = {"model.onnx": model.SerializeToString()}
    return Lowered("onnxruntime", files, inputs, (TensorSpec("y", (1, 4), "float32"),))


@pytest.mark.parametrize("way", ["optimised", "assigned"])
def test_of_decisions_both_sides_are_listed_and_the_dearer_one_counts(way):
    made, target = deciding(), get("cpu")
    audit = BACKEND.audit(made, target) if way == "optimised" else assigned(made, target)
    products = {row.name: row for row in audit.rows if "MatMul" in row.operator}
    assert {name: row.macs for name, row in products.items()} == {
        "product": 0,  # 16, and the other side has 48
        "first": 4 * 6,
        "second": 6 * 4,
        "small": 0,  # 8
    }
    assert {row.precision for row in products.values()} == {"float32"}
    assert audit.counts["If"] == 2
    assert "And" not in audit.counts
    assert any("two sides of an If" in note for note in audit.notes)


def test_every_side_of_every_decision_runs():
    content, runs = onnx_sides.steered(deciding().files["model.onnx"])
    onnx.checker.check_model(onnx.load_from_string(content))
    assert runs == [
        {"graphprune_side_0": True},
        {"graphprune_side_0": False, "graphprune_side_1": True},
        {"graphprune_side_0": False, "graphprune_side_1": False},
    ]
    opened = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    x, s = np.ones((1, 4), np.float32), np.full((2, 2), 3.0, np.float32)
    given = {"x": x, "s": s, "graphprune_side_1": np.array(True)}
    found = [
        opened.run(None, given | {name: np.array(value) for name, value in run.items()})[0].tolist()
        for run in runs
    ]
    assert found == [[[1.0] * 4], [[2 * 6 * 0.5] * 4], [[19.0] * 4]]


def test_an_operator_in_a_side_that_reads_numbers_from_outside_fell_back():
    """Integers that are made numbers outside: ONNX Runtime does not fuse what stands in two graphs."""
    inner = quantized(True)
    model = onnx.load_from_string(inner.files["model.onnx"])
    nodes = list(model.graph.node)
    value = helper.make_tensor_value_info
    nodes[-1].output[0] = "inside"
    taken = helper.make_graph(nodes[2:], "taken", [], [value("inside", TensorProto.FLOAT, [1, 8, 4, 4])])
    other = helper.make_graph(
        [helper.make_node("Conv", ["xf", "float_weight"], ["other"], name="other")],
        "other", [], [value("other", TensorProto.FLOAT, [1, 8, 4, 4])],
    )  # fmt: skip
    weight = numpy_helper.from_array(np.ones((8, 4, 3, 3), np.float32), "float_weight")
    model.graph.initializer.append(weight)
    del model.graph.node[2:]
    model.graph.input.append(value("flag", TensorProto.BOOL, []))
    model.graph.node.append(
        helper.make_node("If", ["flag"], ["y"], then_branch=taken, else_branch=other, name="decision")
    )
    onnx.checker.check_model(model)
    inputs = (*inner.inputs, TensorSpec("flag", (), "bool"))
    made = dataclasses.replace(inner, files={"model.onnx": model.SerializeToString()}, inputs=inputs)
    (fallen,) = [row for row in BACKEND.audit(made, get("cpu")).rows if row.fell_back]
    assert fallen.name == "conv"
    assert "did not fuse" in fallen.reason
    assert fallen.macs == 8 * 4 * 4 * 4 * 9


def test_its_modules_read_one_another_in_one_direction():
    found = re.compile(r"^ *from (?:\.|graphprune\.backends\.)(onnx\w+) import", re.MULTILINE)
    folder = Path(onnx_sides.__file__).parent
    imports = {path.stem: found.findall(path.read_text()) for path in folder.glob("onnx*.py")}
    assert "onnx_assigned" in imports["onnx_audit"]
    assert [*graphlib.TopologicalSorter(imports).static_order()][-1] == "onnxruntime"
