"""What is missing, foreign or too new: one clear line each, and the other backends go on."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import graphprune
from graphprune import manifest, versions
from graphprune.cli import main
from graphprune.errors import BackendError
from graphprune.gates import check
from graphprune.registry import backends
from graphprune.target import Target, get, host_arch

MODULES = {"executorch": "executorch", "onnxruntime": "onnxruntime", "openvino": "openvino", "tvm": "tvm"}
PACKAGES = {**MODULES, "inductor": "torch"}
OTHER = "aarch64" if host_arch() == "x86_64" else "x86_64"

# What each runtime that is not installed here would be asked, is not run.
HERE = [
    pytest.param(name, marks=pytest.mark.skipif(
        not versions.installed(name), reason=f"not run: pip install 'graphprune[{name}]'"
    ))
    for name in ("executorch", "onnxruntime", "openvino")
]  # fmt: skip


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).eval()


def hide(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """From here on ``module`` does not import."""
    honest = builtins.__import__

    def missing(name: str, *rest: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return honest(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)


def build(place: Path, model: nn.Module, backend: str, target: Target | str = "cpu") -> Path:
    result = graphprune.optimize(model, torch.ones(1, 4), backend=backend, target=target, measure=False)
    return result.save(place)


def alter(place: Path, change: Any, files: dict[str, bytes] | None = None) -> None:
    """The artifact's manifest as another machine would have written it."""
    path = place / "manifest.json"
    document = manifest.unseal(path.read_bytes(), "manifest.json")
    change(document)
    for name, content in (files or {}).items():
        (place / name).write_bytes(content)
        document["files"][name] = {"sha256": manifest.digest(content), "bytes": len(content)}
    path.write_bytes(manifest.seal(document))


def says(call: Any, *words: str) -> None:
    """The call is a BackendError of one line with these words in it."""
    with pytest.raises(BackendError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*HERE, "tvm"])
def test_a_runtime_that_is_not_installed(name, model, tmp_path, monkeypatch):
    advice = "pip install onnxruntime" if name == "onnxruntime" else f"pip install 'graphprune[{name}]'"
    place = build(tmp_path / "build", model, name) if name != "tvm" else None
    hide(monkeypatch, MODULES[name])
    reason = backends.load(name)().unrunnable(get("cpu"))
    if place is not None:
        assert advice in reason
        assert "\n" not in reason
        says(lambda: graphprune.load(place), "cannot run here", advice)
    other = "openvino" if name == "onnxruntime" else "onnxruntime"
    result = graphprune.optimize(model, torch.ones(1, 4), backend=f"{name},{other}", measure=False)
    assert result.report.backend == other
    assert any(name in note and advice in note for note in result.report.notes)


@pytest.mark.parametrize(
    "error", [OSError("libruntime.so: cannot open"), RuntimeError("numpy 1.x"), AttributeError("x")]
)
@pytest.mark.parametrize("name", ["openvino", "tvm"])
def test_a_runtime_that_does_not_import(name, error, model, monkeypatch):
    """Whatever it raises is one line, and the other backends go on."""
    honest = builtins.__import__

    def broken(module: str, *rest: Any, **kwargs: Any) -> Any:
        if module.partition(".")[0] == MODULES[name]:
            raise error
        return honest(module, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    says(
        lambda: graphprune.optimize(model, torch.ones(1, 4), backend=name),
        f"{name} does not import",
        str(error),
    )
    result = graphprune.optimize(model, torch.ones(1, 4), backend=f"{name},onnxruntime", measure=False)
    assert result.report.backend == "onnxruntime"
    assert any(str(error) in note for note in result.report.notes)


WITHOUT_A_COMPILER = """
import torch, graphprune
model, x = torch.nn.Linear(4, 2).eval(), torch.ones(1, 4)
try:
    graphprune.optimize(model, x, backend="inductor", measure=False, threads=1)
except graphprune.GraphpruneError as error:
    print(type(error).__name__, error)
result = graphprune.optimize(model, x, backend="inductor,onnxruntime", measure=False, threads=1)
print(result.report.backend)
print(*result.report.notes)
"""


def test_a_compiler_that_is_not_installed(tmp_path):
    nowhere = {"PATH": str(tmp_path), "CXX": str(tmp_path / "g++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, **nowhere},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    refused, chosen, notes = done.stdout.splitlines()
    assert refused.startswith("BackendError inductor needs a C++ compiler and found none that works")
    assert "install g++, or name one with the variable CXX" in refused
    assert chosen == "onnxruntime"
    assert "'inductor' was not taken" in notes
    assert "install g++" in notes


@pytest.mark.parametrize("name", HERE)
def test_an_artifact_that_is_bound_to_another_machine(name, model, tmp_path):
    bound = Target("board", OTHER, portable=False)
    place = build(tmp_path / "build", model, name, bound)
    says(lambda: graphprune.load(place), "cannot run here", OTHER, host_arch())


def test_machine_code_of_another_machine(model, tmp_path):
    place = build(tmp_path / "build", model, "inductor")
    alter(place, lambda document: document["target"].update(arch=OTHER))
    says(lambda: graphprune.load(place), "machine code", OTHER, host_arch())


@pytest.mark.parametrize("name", HERE)
def test_a_newer_runtime_whose_file_opens_is_noted(name, model, tmp_path):
    place = build(tmp_path / "build", model, name)
    assert not [note for note in graphprune.load(place).notes if "built with" in note]
    alter(place, lambda document: document["versions"].update({PACKAGES[name]: "9999.1"}))
    artifact = graphprune.load(place)
    (note,) = [note for note in artifact.notes if "built with" in note]
    assert f"built with {PACKAGES[name]} 9999.1" in note
    assert f"upgrade {PACKAGES[name]}" in note
    with torch.no_grad():
        assert torch.allclose(artifact(torch.ones(1, 4)), model(torch.ones(1, 4)), atol=1e-5)


def test_the_commands_say_so_too(model, tmp_path, capsys):
    place = build(tmp_path / "build", model, "onnxruntime")
    alter(place, lambda document: document["versions"].update({PACKAGES["onnxruntime"]: "9999.1"}))
    assert main(["inspect", str(place)]) == 0
    assert "built with onnxruntime 9999.1" in " ".join(capsys.readouterr().out.split())
    assert any("9999.1" in note for note in check(place).notes)


def _of_newer_onnx(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    model.ir_version = 99
    return model.SerializeToString()


NEWER = {
    "onnxruntime": ("model.onnx", _of_newer_onnx, "IR version: 99"),
    "openvino": ("model.xml", lambda content: content.replace(b'version="11"', b'version="99"'), "OpenVINO"),
    "executorch": ("model.pte", lambda content: content[:4] + b"ET13" + content[8:], "format ET13"),
}


@pytest.mark.parametrize("name", HERE)
def test_a_newer_runtime_whose_file_does_not_open(name, model, tmp_path):
    place = build(tmp_path / "build", model, name)
    file, change, word = NEWER[name]
    before = (place / file).read_bytes()
    after = change(before)
    assert after != before
    package = PACKAGES[name]
    alter(place, lambda document: document["versions"].update({package: "9999.1"}), {file: after})
    says(lambda: graphprune.load(place), word, f"built with {package} 9999.1", f"upgrade {package}")


@pytest.mark.parametrize("opset", [False, True])
def test_a_newer_onnx_is_named_without_a_manifest(opset, model):
    backend = backends.load("onnxruntime")()
    made = backend.lower(graphprune.trace(model, torch.ones(1, 4)), get("cpu"))
    read = onnx.load_from_string(made.files["model.onnx"])
    if opset:
        read.opset_import[0].version = 99
    else:
        read.ir_version = 99
    files = {"model.onnx": read.SerializeToString()}
    words = "newer ONNX", "99", "upgrade onnxruntime"
    says(lambda: backend.open(files, made.inputs, made.outputs, get("cpu")), *words)


def test_machine_code_that_is_linked_against_a_newer_torch_is_not_opened(model, tmp_path, monkeypatch):
    place = build(tmp_path / "build", model, "inductor")
    alter(place, lambda document: document["versions"].update(torch="9999.1"))
    monkeypatch.setattr(backends.load("inductor"), "open", lambda *args: pytest.fail("it was opened"))
    says(lambda: graphprune.load(place), "built with torch 9999.1", "upgrade torch")


def test_older_and_foreign_versions_are_nothing_to_say(tmp_path, model):
    place = build(tmp_path / "build", model, "onnxruntime")
    alter(place, lambda document: document["versions"].update(onnxruntime="1.0.0", unheard_of="99"))
    assert graphprune.load(place).notes == ()
    assert json.loads((place / "manifest.json").read_text())["versions"]["onnxruntime"] == "1.0.0"
    assert versions.newer("a-plugin", {"a-plugin": "99"}) == ""
