"""Execution providers of ONNX Runtime: named when missing, set up, and every operator with who runs it.

The tests of OpenVINO's provider need ``onnxruntime-openvino`` in place of ``onnxruntime``, those of CUDA's
``onnxruntime-gpu`` and a GPU; without they are not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from graphprune.backends import onnx_providers, onnx_session
from onnx import TensorProto, helper
from torch import nn

import graphprune
from graphprune.backend import Lowered, TensorSpec
from graphprune.errors import BackendError, TargetError
from graphprune.registry import backends
from graphprune.target import Target, get, host_arch

from .conftest import convolutional, same

BACKEND = backends.load("onnxruntime")()
CPU, OPENVINO = "CPUExecutionProvider", "OpenVINOExecutionProvider"
HERE = ort.get_available_providers()
# By hand: outputs times what each sums over, for one image of 16 by 16.
MACS = 8 * 16 * 16 * 27 + 12 * 6 * 6 * 2 * 9 + 12 * 5

needs_openvino = pytest.mark.skipif(OPENVINO not in HERE, reason="not run: no onnxruntime-openvino here")
needs_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" not in HERE or not torch.cuda.is_available(), reason="not run: no GPU here"
)


def target(*providers: str, arch: str = "") -> Target:
    return Target("mine", arch or host_arch(), providers=providers)


def test_a_name_that_there_is_not_is_an_error_with_the_nearest():
    graph = graphprune.trace(nn.Linear(3, 2), torch.zeros(1, 3))
    says = r"no execution provider 'OpenVinoExecutionProvider' \(did you mean 'OpenVINOExecutionProvider'\?\)"
    with pytest.raises(TargetError, match=says):
        BACKEND.lower(graph, target("OpenVinoExecutionProvider", CPU))
    with pytest.raises(TargetError, match=says):
        BACKEND.unrunnable(target("OpenVinoExecutionProvider", CPU))
    with pytest.raises(TargetError, match=r"XNNPACKExecutionProvider.*XnnpackExecutionProvider"):
        BACKEND.unrunnable(target("XNNPACKExecutionProvider"))


@pytest.mark.parametrize(
    ("provider", "package"),
    [(OPENVINO, "onnxruntime-openvino"), ("CUDAExecutionProvider", "onnxruntime-gpu"),
     ("XnnpackExecutionProvider", "build onnxruntime with --use_xnnpack"),
     ("CoreMLExecutionProvider", "built with it")],
)  # fmt: skip
def test_what_brings_a_missing_provider_is_named(monkeypatch, provider, package):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    reason = BACKEND.unrunnable(target(provider, CPU))
    assert f"{provider} is not in this onnxruntime, so it would run on {CPU} instead" in reason
    assert package in reason
    assert "\n" not in reason
    assert package in BACKEND.unrunnable(target(provider))
    result = graphprune.optimize(
        nn.Linear(3, 2), torch.zeros(1, 3), target=target(provider, CPU), backend="onnxruntime"
    )
    assert any("not run here" in note and package in note for note in result.report.notes)
    assert result.report.latency.artifact is None


def test_no_provider_at_all():
    assert "names no execution provider" in BACKEND.unrunnable(target())


def test_for_another_architecture_what_is_here_gives_the_answers_and_says_so():
    other = "aarch64" if host_arch() == "x86_64" else "x86_64"
    result = graphprune.optimize(
        convolutional(), torch.zeros(1, 3, 16, 16), backend="onnxruntime", measure=False,
        target=target("XnnpackExecutionProvider", CPU, arch=other),
    )  # fmt: skip
    assert result.report.certificates["artifact against original"].passed
    assert any("XnnpackExecutionProvider is not available here" in note for note in result.report.notes)
    rows = [row for row in result.deployment.audit().rows if row.macs]
    assert all("this onnxruntime has no XnnpackExecutionProvider" in row.reason for row in rows)


@pytest.mark.parametrize(
    ("provider", "expected"),
    [(OPENVINO, {"device_type": "CPU", "precision": "FP32", "num_of_threads": "2"}),
     ("XnnpackExecutionProvider", {"intra_op_num_threads": "2"}),
     ("CUDAExecutionProvider", {"use_tf32": "0"}), (CPU, {})],
)  # fmt: skip
def test_settings(provider, expected):
    assert onnx_providers.settings(provider, 2) == expected


class _Session:
    """A session as ONNX Runtime gives it where a provider's libraries are missing: on the next one."""

    def __init__(self, model: bytes, options: Any, **given: Any) -> None:
        self.given = given

    def get_providers(self) -> Sequence[str]:
        return [CPU]


def test_a_provider_that_does_not_start_is_an_error(monkeypatch):
    lowered = BACKEND.lower(graphprune.trace(nn.Linear(3, 2), torch.zeros(1, 3)), get("cpu"))
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    monkeypatch.setattr(onnx_session.ort, "InferenceSession", _Session)
    with pytest.raises(BackendError, match="CUDAExecutionProvider is in this onnxruntime and does not start"):
        BACKEND.open(lowered.files, lowered.inputs, lowered.outputs, target("CUDAExecutionProvider", CPU))


def test_onnxruntime_does_not_take_another_provider_by_itself(monkeypatch, capsys):
    lowered = BACKEND.lower(graphprune.trace(nn.Linear(3, 2), torch.zeros(1, 3)), get("cpu"))
    monkeypatch.setattr(onnx_session, "settings", lambda provider, threads: {"nonsense": "1"})
    preferred = next((p for p in HERE if p != CPU and p != "AzureExecutionProvider"), "")
    if not preferred:
        pytest.skip("not run: this onnxruntime has the CPU provider alone, which takes any option")
    with pytest.raises(BackendError, match="nonsense"):
        BACKEND.open(lowered.files, lowered.inputs, lowered.outputs, target(preferred, CPU))
    assert "Falling back" not in capsys.readouterr().out


@needs_openvino
@pytest.mark.parametrize("dynamic", [False, True])
def test_openvino_runs_a_network_whole(dynamic):
    model = convolutional()
    result = graphprune.optimize(
        model, torch.randn(1, 3, 16, 16), target=target(OPENVINO, CPU), threads=1, dynamic_batch=dynamic,
        measure=False, backend="onnxruntime",
    )  # fmt: skip
    assert all(certificate.passed for certificate in result.report.certificates.values())
    runner: Any = result.deployment.runner
    assert runner.providers[0] == OPENVINO
    assert runner.notes == ()
    audit = result.deployment.audit()
    assert audit.macs == {"float32": MACS}
    assert not any(row.reason for row in audit.rows)
    assert f"operators: {len(audit.rows)} on {OPENVINO}" in audit.notes
    x = torch.randn(3 if dynamic else 1, 3, 16, 16)
    with torch.no_grad():
        same(result(x), model(x), 1e-5)


def partly() -> Lowered:
    """A product and an activation, and a determinant, which OpenVINO does not have."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="product"),
        helper.make_node("Det", ["a"], ["d"], name="determinant"),
        helper.make_node("Relu", ["a"], ["r"], name="activation"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "partly", [value("x", TensorProto.FLOAT, [4, 4])],
        [value("d", TensorProto.FLOAT, []), value("r", TensorProto.FLOAT, [4, 4])],
        [helper.make_tensor("w", TensorProto.FLOAT, [4, 4], np.eye(4, dtype=np.float32).ravel())],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    specs = (
        TensorSpec("x", (4, 4), "float32"),
        TensorSpec("d", (), "float32"),
        TensorSpec("r", (4, 4), "float32"),
    )
    return Lowered("onnxruntime", {"model.onnx": model.SerializeToString()}, specs[:1], specs[1:])


@needs_openvino
def test_what_falls_to_the_cpu_is_named():
    made = partly()
    wanted = target(OPENVINO, CPU)
    runner = BACKEND.open(made.files, made.inputs, made.outputs, wanted, 1)
    x = torch.rand(4, 4)
    found, positive = runner(x)
    assert abs(float(found) - float(torch.linalg.det(x))) < 1e-5
    assert torch.equal(positive, x)
    audit = BACKEND.audit(made, wanted)
    (fallen,) = [row for row in audit.rows if row.reason]
    assert (fallen.name, fallen.operator) == ("determinant", "Det")
    assert fallen.reason == f"on {CPU}: {OPENVINO} has no kernel for it"
    assert audit.macs == {"float32": 4 * 4 * 4}
    assert f"operators: 2 on {OPENVINO}, 1 on {CPU}" in audit.notes


@needs_openvino
def test_openvino_does_not_say_what_it_computes_in_integers():
    batches = [torch.randn(8, 3, 16, 16) for _ in range(2)]
    result = graphprune.optimize(
        convolutional(), (batches[0][:1],), precision="int8", calibration=batches,
        target=target(OPENVINO, CPU), backend="onnxruntime", measure=False, threads=1,
    )  # fmt: skip
    audit = result.deployment.audit()
    assert audit.macs == {"unknown": MACS}
    assert all("does not say" in row.reason for row in audit.rows if row.macs)
    assert result.report.certificates["artifact against graph"].passed


@needs_openvino
def test_an_artifact_for_openvino_opens_again(tmp_path):
    model, x = convolutional(), torch.randn(1, 3, 16, 16)
    result = graphprune.optimize(
        model, x, target=target(OPENVINO, CPU), backend="onnxruntime", measure=False, threads=1
    )
    result.save(tmp_path / "build")
    artifact = graphprune.load(tmp_path / "build", threads=1)
    with torch.no_grad():
        same(artifact(x), model(x), 1e-5)


@needs_cuda
def test_cuda_runs_a_network():
    model, x = convolutional(), torch.randn(2, 3, 16, 16)
    result = graphprune.optimize(model, x, target="cuda", measure=False)
    runner: Any = result.deployment.runner
    assert runner.providers[0] == "CUDAExecutionProvider"
    assert all(certificate.passed for certificate in result.report.certificates.values())
