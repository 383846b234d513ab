"""OpenVINO: the original model, run eagerly, is the oracle."""

from __future__ import annotations

import builtins
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import BackendError, InputError, MissingExtraError
from graphprune.registry import backends
from graphprune.target import Target, get, host_arch
from tests.zoo import get as network

from .conftest import Everything, convolutional, same

openvino = pytest.importorskip("openvino")

BACKEND = backends.load("openvino")()


@pytest.fixture
def runtime() -> str:
    return "openvino"


def test_a_symbolic_batch_stays_symbolic(opened):
    made = opened(convolutional(), torch.randn(1, 3, 16, 16), dynamic=True)
    assert sorted(made.lowered.files) == ["model.bin", "model.xml"]
    assert made.lowered.inputs[0].shape == ("batch", 3, 16, 16)
    for size in (1, 7, 2):
        made.matches(torch.randn(size, 3, 16, 16))


@pytest.mark.parametrize("name", ["transformer_layer", "multihead_attention", "lstm", "conv3d", "unet"])
def test_blocks_answer_as_the_original(opened, name):
    chosen = network(name)
    made = opened(chosen.build(), *chosen.inputs(), **chosen.kwargs())
    made.matches(*chosen.inputs(), **chosen.kwargs(), relative=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_outputs_of_every_kind(opened, dynamic):
    made = opened(Everything(), torch.randn(2, 4), torch.tensor([True, False]), dynamic=dynamic)
    made.matches(torch.randn(2, 4), torch.tensor([False, True]))
    if dynamic:
        made.matches(torch.randn(5, 4), torch.ones(5, dtype=torch.bool))


def test_an_output_that_is_an_input_is_a_copy(opened):
    class Through(nn.Module):
        def forward(self, x):
            return x, x + 1

    made = opened(Through(), torch.zeros(2))
    x = torch.ones(2)
    copy, more = made(x)
    x.fill_(7)
    made(x)
    assert copy.tolist() == [1, 1]
    assert more.tolist() == [2, 2]


def test_integer_inputs_and_scalars(opened):
    class Pick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 4)

        def forward(self, ids, scale, small):
            y = self.embed(ids) * scale
            return y, y.argmax(-1), ids * 3, small + 1

    args = torch.randint(0, 11, (2, 6)), torch.tensor(2.0), torch.randint(0, 9, (3,), dtype=torch.int32)
    made = opened(Pick(), *args)
    made.matches(*args)
    assert any("int64 in int32" in note for note in made.lowered.notes)
    with pytest.raises(InputError, match="'ids' has values beyond int32"):
        made.runner(args[0] + 2**40, *args[1:])


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_at_the_edges(opened, dtype, relative):
    model = nn.Sequential(nn.Linear(60, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)
    made = opened(model, torch.randn(2, 60).to(dtype), dynamic=True)
    made.matches(torch.randn(5, 60).to(dtype), relative=relative)
    notes = " ".join((*made.lowered.notes, *made.runner.notes))
    native = dtype is torch.bfloat16 and torch.cpu.get_capabilities().get("avx512_bf16", False)
    assert ("float32" in notes) == (not native)


def test_float64_is_refused(opened):
    with pytest.raises(BackendError, match=r"is float64, which OpenVINO computes in float32.*onnxruntime"):
        opened(nn.Linear(3, 2).double(), torch.randn(1, 3).double())


def test_any_layout_and_gradient_state_will_do(opened):
    made = opened(nn.Linear(3, 2), torch.randn(4, 3))
    x = torch.randn(3, 4).t().requires_grad_()
    same(made(x).detach(), made.model(x).detach(), 1e-5)
    assert not made(x).requires_grad
    with pytest.raises(InputError, match="'input' must have shape"):
        made.runner(torch.randn(4, 5))
    with pytest.raises(InputError, match="'input' must be float32, got float64"):
        made.runner(x.double())


def test_threads(opened):
    import openvino.properties as properties

    for count in (1, 2):
        made = opened(nn.Linear(3, 2), torch.randn(1, 3), threads=count)
        assert made.runner.threads == count
        assert made.runner.compiled.get_property(properties.inference_num_threads()) == count
    with pytest.raises(InputError, match="at least 1"):
        opened(nn.Linear(3, 2), torch.randn(1, 3), threads=0)


def test_floats_are_computed_in_float32(opened):
    import openvino.properties.hint as hint

    compiled = opened(nn.Linear(3, 2), torch.randn(1, 3)).runner.compiled
    assert compiled.get_property(hint.inference_precision()) == openvino.Type.f32
    assert compiled.get_property(hint.dynamic_quantization_group_size()) == 0


def test_calls_from_several_threads_do_not_mix(opened):
    made = opened(convolutional(), torch.randn(1, 3, 16, 16))
    given = [torch.randn(1, 3, 16, 16) for _ in range(8)]
    found: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        for _ in range(5):
            found[index] = made(given[index])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    with torch.no_grad():
        for index, x in enumerate(given):
            same(found[index], made.model(x), 1e-5)


def test_equal_graphs_give_equal_bytes(opened):
    model = convolutional()
    first, second = (opened(model, torch.zeros(1, 3, 16, 16), dynamic=True).lowered.files for _ in range(2))
    assert first == second
    assert b"site-packages" not in first["model.xml"]


SCRIPT = """
import sys, torch, graphprune
artifact = graphprune.load(sys.argv[1], threads=1)
x, wanted = torch.load(sys.argv[2])
assert torch.allclose(artifact(x), wanted, atol=1e-5), (artifact(x) - wanted).abs().max()
print(artifact.manifest["backend"], "onnxruntime" in sys.modules, "onnx" in sys.modules)
"""


def test_an_artifact_opens_in_a_fresh_process(tmp_path):
    model, x = convolutional(), torch.randn(3, 3, 16, 16)
    result = graphprune.optimize(
        model, (x,), backend="openvino", dynamic_batch=True, measure=False, threads=1
    )
    result.save(tmp_path / "build")
    assert {"model.xml", "model.bin", "manifest.json"} <= {p.name for p in (tmp_path / "build").iterdir()}
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "call.pt")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "build"), str(tmp_path / "call.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.split() == ["openvino", "False", "False"], done.stderr
    assert "openvino" in result.deployment.lowered.versions
    assert "onnxruntime" not in result.deployment.lowered.versions


def test_without_the_package_the_extra_is_named(opened, tmp_path, monkeypatch):
    made = opened(nn.Linear(3, 2), torch.randn(1, 3))
    result = graphprune.optimize(nn.Linear(3, 2), torch.randn(1, 3), backend="openvino", measure=False)
    result.save(tmp_path / "build")
    honest = builtins.__import__

    def missing(name: str, *rest: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "openvino":
            raise ModuleNotFoundError("No module named 'openvino'", name="openvino")
        return honest(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    says = r"'openvino', which is not installed: pip install 'graphprune\[openvino\]'"
    with pytest.raises(MissingExtraError, match=says):
        BACKEND.lower(made.graph, get("cpu"))
    with pytest.raises(MissingExtraError, match=says):
        BACKEND.open(made.lowered.files, made.lowered.inputs, made.lowered.outputs, get("cpu"))
    with pytest.raises(MissingExtraError, match=says):
        graphprune.optimize(nn.Linear(3, 2), torch.randn(1, 3), backend="openvino", measure=False)
    with pytest.raises(BackendError, match=says):
        graphprune.load(tmp_path / "build")


def test_operators_without_translation_are_named():
    from graphprune.backends.openvino_model import convert
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xyz"]
    nodes = [
        helper.make_node("Spin", ["x"], ["y"], domain="com.example"),
        helper.make_node("StringNormalizer", ["y"], ["z"]),
    ]
    graph = helper.make_graph(nodes, "g", value[:1], value[2:])
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.example", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    with pytest.raises(BackendError, match="use backend='onnxruntime'") as caught:
        convert({"model.onnx": model.SerializeToString()})
    message = str(caught.value)
    assert "com.example.Spin" in message
    assert "StringNormalizer" in message
    assert "\n" not in message
    with pytest.raises(BackendError, match="does not read"):
        convert({"model.onnx": b"nonsense"})


def test_files_that_are_no_model(opened):
    made = opened(nn.Linear(3, 2), torch.randn(1, 3))
    with pytest.raises(BackendError, match=r"there is no model\.xml"):
        BACKEND.open({}, (), (), get("cpu"))
    with pytest.raises(BackendError, match="does not open") as caught:
        BACKEND.open({"model.xml": b"nonsense", "model.bin": b""}, (), (), get("cpu"))
    assert "\n" not in str(caught.value)
    with pytest.raises(BackendError, match="not the specification's"):
        BACKEND.open(made.lowered.files, (), made.lowered.outputs, get("cpu"))


def test_other_targets(opened):
    with pytest.raises(BackendError, match="no CUDA device"):
        BACKEND.lower(graphprune.trace(nn.Linear(3, 2), torch.randn(1, 3)), get("cuda"))
    assert "no CUDA device" in BACKEND.unrunnable(get("cuda"))
    other = get("arm" if host_arch() == "x86_64" else "x86")
    assert BACKEND.unrunnable(other) is None
    made = opened(nn.Linear(3, 2), torch.randn(1, 3))
    assert other.arch in BACKEND.audit(made.lowered, other).notes[0]
    assert other.arch in BACKEND.unrunnable(Target("bound", other.arch, portable=False))


def test_inputs_of_any_layout_and_results_that_stay() -> None:
    """Tensors are handed over where they lie: what does not lie in rows is copied, and so is every result."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU()).eval()
    x = torch.randn(3, 4)
    result = graphprune.optimize(net, x, backend="openvino", measure=False)
    layouts = (x, torch.randn(4, 3).t(), torch.randn(1, 4).expand(3, 4), torch.randn(3, 8)[:, ::2])
    answers = [result(value) for value in layouts]
    for value, answer in zip(layouts, answers, strict=True):
        torch.testing.assert_close(answer, net(value).detach(), rtol=1e-4, atol=1e-5)
    assert result(x.clone().requires_grad_()).equal(answers[0])
