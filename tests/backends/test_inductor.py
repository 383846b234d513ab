"""AOTInductor: packages that compute what the graph does, in integers where asked; what is refused."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graphprune.backends import inductor
from graphprune.backends.inductor import Inductor
from graphprune.backends.inductor_device import moved
from torch import nn

import graphprune
from graphprune.errors import BackendError, InputError, VerificationError
from graphprune.integers import ONNX_RUNTIME
from graphprune.target import get
from tests.passes.quantizing import Block, Residual, images

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
CPU = get("cpu")


class Two(nn.Module):
    """Two inputs, one of integers; a tensor, a number and a nested tensor out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(11, 8), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> dict[str, Any]:
        mixed = self.table(ids) + x
        return {"scores": self.layer(mixed), "kind": 7, "inside": (mixed.mean(1),)}


def lowered(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> tuple[graphprune.Graph, Any, Any]:
    graph = graphprune.trace(model.eval(), inputs, **options)
    made = Inductor().lower(graph, CPU)
    return graph, made, Inductor().open(made.files, made.inputs, made.outputs, CPU)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.fixture(scope="module")
def open_batch() -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = Residual(16).eval()
    return model, *lowered(model, torch.randn(2, 3, 16, 16), dynamic_batch=True)[1:]


def test_any_batch_and_any_layout(open_batch: tuple[nn.Module, Any, Any]) -> None:
    model, made, runner = open_batch
    assert made.inputs[0].shape == ("batch", 3, 16, 16)
    assert made.outputs[0].shape == ("batch", 4)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            assert close(runner(x)[0], model(x))
            assert close(runner(x.to(memory_format=torch.channels_last))[0], model(x))


def test_inputs_that_do_not_fit(open_batch: tuple[nn.Module, Any, Any]) -> None:
    _, _, runner = open_batch
    with pytest.raises(InputError, match="must have shape"):
        runner(torch.zeros(1, 3, 16, 8))
    with pytest.raises(InputError, match="must be float32"):
        runner(torch.zeros(1, 3, 16, 16, dtype=torch.float64))


def test_threads_hold_during_a_call_alone(open_batch: tuple[nn.Module, Any, Any]) -> None:
    _, made, _ = open_batch
    runner = Inductor().open(made.files, made.inputs, made.outputs, CPU, threads=1)
    before = torch.get_num_threads()
    runner(torch.zeros(1, 3, 16, 16))
    assert torch.get_num_threads() == before
    with pytest.raises(InputError, match="at least 1"):
        Inductor().open(made.files, made.inputs, made.outputs, CPU, threads=0)


def test_several_inputs_and_outputs() -> None:
    torch.manual_seed(1)
    model = Two().eval()
    ids, x = torch.randint(0, 11, (2, 5)), torch.randn(2, 5, 8)
    graph, made, runner = lowered(model, ids, x)
    found = graph.signature.unflatten(runner(ids, x))
    with torch.no_grad():
        wanted = model(ids, x)
    assert found["kind"] == 7
    assert close(found["scores"], wanted["scores"])
    assert close(found["inside"][0], wanted["inside"][0])
    assert [spec.dtype for spec in made.inputs] == ["int64", "float32"]


def test_integers_are_computed_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(2)
    data = images(4, 3, 16, 16)
    result = graphprune.optimize(
        Residual(16).eval(), data[0], calibration=data, dynamic_batch=True, precision="int8",
        backend="inductor", measure=False,
    )  # fmt: skip
    audit = result.report.audit
    assert audit is not None
    assert audit.integers == 1.0
    assert all(certificate.passed for certificate in result.report.certificates.values())
    result.save(tmp_path / "built")
    program = (
        "import sys, torch, graphprune\n"
        "runner = graphprune.load(sys.argv[1])\n"
        "torch.save(runner(torch.ones(3, 3, 16, 16)), sys.argv[2])\n"
    )
    # A fresh process without a compiler: opening compiles nothing.
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "built"), str(tmp_path / "out.pt")], check=True,
        env={"PATH": "/nonexistent", "CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")},
    )  # fmt: skip
    assert torch.equal(torch.load(tmp_path / "out.pt"), result(torch.ones(3, 3, 16, 16)))
    assert not [path for path in (tmp_path / "empty").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_products_of_activations_stay_in_float_by_the_backends_own_scheme() -> None:
    """There is no integer product of two activations here; a scheme that wants one is refused."""
    torch.manual_seed(3)
    data = images(2, 12, 32)
    options: dict[str, Any] = {
        "calibration": data, "precision": "int8", "backend": "inductor", "measure": False,
    }  # fmt: skip
    result = graphprune.optimize(Block().eval(), data[0], **options)
    assert result.report.audit is not None
    assert not result.report.audit.fallbacks
    assert 0.5 < result.report.audit.integers < 1.0
    every = replace(CPU, integers=replace(ONNX_RUNTIME, joined=frozenset()))  # a caller's own
    with pytest.raises(BackendError, match="computes in float"):
        graphprune.optimize(Block().eval(), data[0], target=every, **options)


def test_compiled_in_this_process() -> None:
    torch.manual_seed(1)
    model = Two().eval()
    ids, x = torch.randint(0, 11, (2, 5)), torch.randn(2, 5, 8)
    result = graphprune.optimize(model, (ids, x), measure=False, backend="onnxruntime", dynamic_batch=True)
    run = result.compiled(threads=1)
    assert run.certificate.passed
    before = torch.get_num_threads()
    for batch in (2, 1, 6):
        ids, x = torch.randint(0, 11, (batch, 5)), torch.randn(batch, 5, 8, requires_grad=True)
        found = run(ids, x=x)
        with torch.no_grad():
            wanted = model(ids, x)
        assert found["kind"] == 7
        assert close(found["scores"], wanted["scores"])
        assert close(found["inside"][0], wanted["inside"][0])
    assert torch.get_num_threads() == before
    with pytest.raises(InputError, match="at least 1"):
        result.compiled(threads=0)


def test_compiled_in_integers() -> None:
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(2)
    data = images(4, 3, 16, 16)
    result = graphprune.optimize(
        Residual(16).eval(), data[0], calibration=data, precision="int8", backend="onnxruntime", measure=False
    )
    run, (code,) = run_and_get_code(lambda: result.compiled())
    assert run.certificate.passed
    assert code.count("qconv") >= 3
    assert "_convolution_pointwise" not in code
    assert "aten.convolution" not in code


def test_a_compiled_graph_that_is_off_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphprune.backends import inductor_compiled

    result = graphprune.optimize(nn.Linear(4, 3).eval(), torch.randn(2, 4), measure=False)
    monkeypatch.setattr(
        inductor_compiled.torch, "compile", lambda module, **_: lambda x: tuple(1.01 * y for y in module(x))
    )
    with pytest.raises(VerificationError, match="the compiled graph does not reproduce"):
        result.compiled()


def test_a_target_elsewhere_is_refused() -> None:
    graph = graphprune.trace(nn.Linear(3, 2), torch.zeros(1, 3))
    other = replace(CPU, name="board", arch="aarch64" if CPU.arch != "aarch64" else "x86_64")
    with pytest.raises(BackendError, match=r"machine code for .* build on such a host"):
        Inductor().lower(graph, other)


def test_a_package_of_another_processor_is_refused(
    open_batch: tuple[nn.Module, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, made, _ = open_batch
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": False, "avx2": True})
    for key, value, words in (("AOTI_MACHINE", "riscv64", "machine code for riscv64"),
                              ("AOTI_CPU_ISA", "AVX2 AVX512", "needs AVX512, which")):  # fmt: skip
        files = {**made.files, "model.pt2": _with(made.files["model.pt2"], key, value)}
        with pytest.raises(BackendError, match=words):
            Inductor().open(files, made.inputs, made.outputs, CPU)


@pytest.mark.parametrize(
    ("content", "words"), [(b"nothing", "not a package"), (None, "there is no model.pt2")]
)
def test_files_that_are_no_package(
    content: bytes | None, words: str, open_batch: tuple[nn.Module, Any, Any]
) -> None:
    _, made, _ = open_batch
    files = {} if content is None else {"model.pt2": content}
    with pytest.raises(BackendError, match=words):
        Inductor().open(files, made.inputs, made.outputs, CPU)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    class InvalidCxxCompiler(RuntimeError):
        pass

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("inductor") from InvalidCxxCompiler("No working C++ compiler found")

    monkeypatch.setattr(inductor.torch._inductor, "aoti_compile_and_package", fails)
    with pytest.raises(BackendError, match=r"needs a C\+\+ compiler.*install g\+\+"):
        Inductor().lower(graphprune.trace(nn.Linear(3, 2), torch.zeros(1, 3)), CPU)


def test_what_only_onnx_runtime_has_is_refused() -> None:
    data = [torch.randn(1, 64) for _ in range(4)]
    with pytest.raises(BackendError, match="use backend='onnxruntime'"):
        graphprune.optimize(
            nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval(), data[0], calibration=data,
            precision="int4-weights", backend="inductor", measure=False,
        )  # fmt: skip


def test_a_package_for_a_gpu_is_refused_without_one(
    open_batch: tuple[nn.Module, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, made, _ = open_batch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    files = {**made.files, "model.pt2": _with(made.files["model.pt2"], "AOTI_DEVICE_KEY", "cuda")}
    with pytest.raises(BackendError, match="torch finds none here"):
        Inductor().open(files, made.inputs, made.outputs, CPU)
    with pytest.raises(BackendError, match="torch finds none here"):
        Inductor().lower(graphprune.trace(nn.Linear(3, 2), torch.zeros(1, 3)), get("cuda"))


def test_devices_in_a_graph_follow_its_tensors() -> None:
    class Makes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + torch.arange(3, device="cpu") + torch.zeros(3, device=x.device)

    graph = graphprune.trace(Makes().eval(), torch.ones(2, 3))
    elsewhere = moved(graph, "meta")
    (found,) = elsewhere.callable()(*elsewhere.examples)
    assert (found.device.type, found.shape) == ("meta", (2, 3))
    assert all(value.device.type == "cpu" for value in graph.tensors.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no NVIDIA GPU here")
@pytest.mark.parametrize("precision", [None, "float16", "bfloat16"])
def test_on_a_gpu(precision: str | None) -> None:
    torch.manual_seed(0)
    model, x = Residual(16).eval(), torch.randn(2, 3, 16, 16)
    result = graphprune.optimize(
        model, x, target="cuda", backend="inductor", precision=precision, measure=False
    )
    with torch.no_grad():
        wanted = model(x)
    assert float((result(x) - wanted).norm() / wanted.norm()) < (0.03 if precision else 1e-4)


def _with(package: bytes, key: str, value: str) -> bytes:
    """The package with another value in its metadata."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(package)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("_metadata.json"):
                facts = json.loads(content)
                content = json.dumps(facts | ({key: value} if key in facts else {})).encode()
            new.writestr(name, content)
    return made.getvalue()


def test_a_group_norm_is_not_taken_for_weights_in_groups() -> None:
    model, x = nn.GroupNorm(2, 4).eval(), torch.randn(1, 4, 6)
    graph = graphprune.trace(model, x)
    made = Inductor().lower(graph, CPU)
    runner = Inductor().open(made.files, made.inputs, made.outputs, CPU, 1)
    assert torch.allclose(runner(x)[0], model(x), atol=1e-5)
