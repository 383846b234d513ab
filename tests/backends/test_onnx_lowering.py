"""Lowering to ONNX: the original model, run eagerly, is the oracle."""

from __future__ import annotations

import collections
import logging
import subprocess
import sys
import warnings

import numpy as np
import onnx
import pytest
import torch
from graphprune.backends import onnx_export
from torch import nn

import graphprune
from graphprune.backend import TensorSpec
from graphprune.errors import BackendError
from graphprune.registry import backends
from graphprune.target import get
from tests.zoo import get as network

from .conftest import Everything


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, groups=4), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(12, 5),
        )  # fmt: skip
        nn.init.normal_(self.body[1].running_mean)
        nn.init.uniform_(self.body[1].running_var, 0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Tokens(nn.Module):
    """Integer ids and a boolean mask in, logits and positions out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(ids)
        y, _ = self.attention(x, x, x, key_padding_mask=mask)
        logits = self.head(y)
        return logits, logits.argmax(-1)


def histogram(model: bytes) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in onnx.load_from_string(model).graph.node)


@pytest.mark.parametrize("dynamic", [False, True])
def test_outputs_of_every_kind(opened, dynamic):
    made = opened(Everything(), torch.randn(2, 4), torch.tensor([True, False]), dynamic=dynamic)
    made.matches(torch.randn(2, 4), torch.tensor([False, True]))
    if dynamic:
        made.matches(torch.randn(5, 4), torch.ones(5, dtype=torch.bool))
    names = [
        spec.name for spec in (*made.lowered.inputs, *made.lowered.outputs) if isinstance(spec, TensorSpec)
    ]
    assert names[:2] == ["weight", "output"]
    assert "input" in names
    assert len(set(names)) == len(names)


def test_dynamic_batch_stays_symbolic(opened):
    made = opened(Conv(), torch.randn(1, 3, 16, 16), dynamic=True)
    assert made.lowered.inputs == (TensorSpec("x", ("batch", 3, 16, 16), "float32"),)
    assert made.lowered.outputs == (TensorSpec("output", ("batch", 5), "float32"),)
    for size in (1, 2, 7):
        made.matches(torch.randn(size, 3, 16, 16))


def test_integer_and_boolean_inputs(opened):
    mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    made = opened(Tokens(), torch.randint(0, 11, (2, 6)), mask)
    made.matches(torch.randint(0, 11, (2, 6)), mask)
    assert [spec.dtype for spec in made.lowered.inputs] == ["int64", "bool"]


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float64, 1e-12), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)]
)
def test_dtypes_at_the_boundary(opened, dtype, relative):
    model = nn.Sequential(nn.Linear(600, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)
    made = opened(model, torch.randn(2, 600).to(dtype), dynamic=True)
    made.matches(torch.randn(5, 600).to(dtype), relative=relative)
    assert {s.dtype for s in (*made.lowered.inputs, *made.lowered.outputs)} == {str(dtype).split(".")[1]}


def test_bfloat16_computes_in_float32_and_says_so(opened):
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(32, 64, 5)

        def forward(self, x):
            y = self.conv(x)
            return y, x, torch.zeros(2, dtype=x.dtype) + y.mean(), y.to(torch.float32)

    made = opened(Halves().bfloat16(), torch.randn(1, 32, 9, 9).bfloat16())
    made.matches(torch.randn(1, 32, 9, 9).bfloat16(), relative=3e-2)
    assert ["float32 between" in note for note in made.lowered.notes] == [True]
    kinds = {
        t.name: t.data_type for t in onnx.load_from_string(made.lowered.files["model.onnx"]).graph.initializer
    }
    assert kinds["conv.weight"] == onnx.TensorProto.BFLOAT16, "weights must not double in size"


def test_float64_without_kernel_names_the_operator(opened):
    with pytest.raises(BackendError, match=r"no kernel.*Conv.*model\.float\(\)"):
        opened(nn.Conv2d(3, 4, 3).double(), torch.randn(1, 3, 8, 8).double())


def test_unsupported_operator_is_named_with_its_source_line(opened):
    class Bessel(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x + 1) * 2

    with pytest.raises(BackendError) as caught:
        opened(Bessel(), torch.randn(3))
    message = str(caught.value)
    assert "special_bessel_j0" in message
    assert "test_onnx_lowering.py:" in message
    assert "\n" not in message


def test_what_cannot_be_lowered_is_said(opened):
    class Constant(nn.Module):
        def forward(self, x):
            return {"shape": list(x.shape)}

    class Complex(nn.Module):
        def forward(self, x):
            return torch.fft.fft(x).abs()

    with pytest.raises(BackendError, match="no output of the graph is a tensor"):
        opened(Constant(), torch.randn(3))
    with pytest.raises(BackendError, match="complex"):
        opened(Complex(), torch.randn(3))
    with torch.device("meta"):
        graph = graphprune.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(BackendError, match="meta device"):
        backends.load("onnxruntime")().lower(graph, get("cpu"))


def test_nothing_is_printed_and_no_warning_escapes(opened, capfd, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = opened(Everything(), torch.randn(2, 4), torch.tensor([True, False]), dynamic=True)
        made(torch.randn(3, 4), torch.ones(3, dtype=torch.bool))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


BUILD = """
import sys, torch, graphprune
from graphprune.registry import backends
from graphprune.target import get
torch.manual_seed(3)
model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.SiLU(), torch.nn.Flatten(1),
    torch.nn.Linear(144, 9)).eval()
graph = graphprune.trace(model, torch.randn(2, 3, 8, 8), dynamic_batch=True)
sys.stdout.buffer.write(backends.load("onnxruntime")().lower(graph, get("cpu")).files["model.onnx"])
"""


def test_same_graph_same_bytes_in_another_process(tmp_path):
    running = []
    for seed in ("1", "2"):
        script = tmp_path / f"build_{seed}.py"
        script.write_text(BUILD)
        environment = {"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script)]
        running.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE))
    made = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert made[0] == made[1]
    model = onnx.load_from_string(made[0])
    assert str(tmp_path).encode() not in made[0]
    assert b"site-packages" not in made[0]
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    onnx.checker.check_model(model)


def test_lowering_leaves_the_graph_alone(opened):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    graph = graphprune.trace(model, torch.randn(2, 4), dynamic_batch=True)
    before = graph.fingerprint()
    backends.load("onnxruntime")().lower(graph, get("cpu"))
    assert graph.fingerprint() == before


def test_large_models_keep_their_tensors_in_a_second_file(opened, monkeypatch):
    monkeypatch.setattr(onnx_export, "LARGEST_MESSAGE", 4096)
    made = opened(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 7)), torch.randn(2, 64))
    assert set(made.lowered.files) == {"model.onnx", "model.onnx.data"}
    assert len(made.lowered.files["model.onnx"]) < 4096
    made.matches(torch.randn(2, 64))
    with pytest.raises(BackendError, match="does not open"):
        backends.load("onnxruntime")().open(
            {"model.onnx": made.lowered.files["model.onnx"]},
            made.lowered.inputs,
            made.lowered.outputs,
            get("cpu"),
        )


@pytest.mark.parametrize("name", ["tv_resnet18", "multihead_attention", "hf_gpt2"])
@pytest.mark.network
def test_no_operator_more_than_a_plain_export(name):
    chosen = network(name)
    model, args, kwargs = chosen.build(), chosen.inputs(), chosen.kwargs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = graphprune.trace(model, args, kwargs)
        plain = torch.onnx.export(model, args, kwargs=kwargs, dynamo=True, verbose=False)
    assert plain is not None
    lowered = backends.load("onnxruntime")().lower(graph, get("cpu"))
    ours, theirs = histogram(lowered.files["model.onnx"]), histogram(plain.model_proto.SerializeToString())
    for counts in (ours, theirs):  # a mean over all places is a pool with us
        counts["ReduceMean"] += counts.pop("GlobalAveragePool", 0)
    assert ours - theirs == collections.Counter()


@pytest.mark.parametrize("name", ["hf_bert_masked", "hf_t5"])
@pytest.mark.network
def test_networks_answer_as_the_original(opened, name):
    chosen = network(name)
    made = opened(chosen.build(), *chosen.inputs(), **chosen.kwargs())
    made.matches(*chosen.inputs(), **chosen.kwargs(), relative=1e-4)


def test_symbols_of_unrelated_inputs_have_their_own_names(opened):
    class Pair(nn.Module):
        def forward(self, x, y):
            return x.sum(0) + y.sum(0), torch.cat([x, y])

    made = opened(Pair(), torch.randn(2, 3), torch.randn(2, 3), dynamic=True)
    assert [spec.shape for spec in made.lowered.inputs] == [("batch", 3), ("y_dim0", 3)]
    made.matches(torch.randn(4, 3), torch.randn(2, 3))


def test_an_output_that_is_an_input_is_a_copy(opened):
    class Through(nn.Module):
        def forward(self, x):
            return x, x + 1

    made = opened(Through(), torch.zeros(2))
    x = torch.ones(2)
    same, _ = made(x)
    x.fill_(7)
    assert np.array_equal(same.numpy(), [1, 1])


@pytest.mark.parametrize("outer", [(), (2,), (2, 3), (2, 3, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_any_rank(opened, outer, masked):
    class Attend(nn.Module):
        def forward(self, q, k, v, mask=None):
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    operands = [torch.randn(*outer, 2, length, 4) for length in (5, 7, 7)]
    mask = torch.rand(5, 7) > 0.3 if len(outer) != 0 else torch.rand(2, 5, 7) > 0.3
    made = opened(Attend(), *operands, *([mask] if masked else []))
    made.matches(*operands, *([mask] if masked else []))


def test_attention_of_rank_five_keeps_a_symbolic_batch(opened):
    class Attend(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x + 1, x * 2)

    made = opened(Attend(), torch.randn(2, 3, 2, 5, 4), dynamic=True)
    made.matches(torch.randn(4, 3, 2, 5, 4))
