"""Artifacts run through the emulator's protocol, with a script in the place of qemu."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import graphprune
from graphprune import proof
from graphprune.contents import read
from graphprune.emulation.emulator import Emulator, find, places
from graphprune.emulation.machine import call, emulable, suits
from graphprune.errors import BackendError
from tests.emulation.machines import pretended


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )


def image(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("artifact") / "build"
    return graphprune.optimize(net(), image(), target="arm:cortex-a76", measure=False).save(place)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("artifact") / "build"
    options = {"precision": "int8", "calibration": [image(seed) for seed in range(4)]}
    return graphprune.optimize(net(), image(), target="arm", measure=False, **options).save(place)


def test_an_artifact_runs_on_the_processor_of_its_target(built, tmp_path) -> None:
    folder = pretended(tmp_path / "arm")
    found = proof.prove(built, emulator=folder, emulate=True)
    assert found.passed
    assert found.certificate.max_relative < 1e-5
    assert found.against == proof.STORED
    assert found.statement == "proven under emulation, latency not measured"
    assert (folder / "calls").read_text().startswith("-cpu cortex-a76 -L ")
    cpuinfo = (folder / "cpuinfo").read_text()
    assert "CPU part\t: 0xd0b" in cpuinfo
    assert "asimddp" in cpuinfo


def test_an_artifact_in_integers_tells_what_ran_in_them(rounded, tmp_path) -> None:
    found = proof.prove(rounded, emulator=pretended(tmp_path / "arm"), emulate=True)
    assert found.passed
    assert found.audit is not None
    assert found.audit.integers == 1.0
    assert any("ran in integers: " in line and "1 QLinearConv" in line for line in found.lines)
    cpuinfo = (tmp_path / "arm/cpuinfo").read_text()
    assert "0xd03" in cpuinfo  # the least of all aarch64
    assert "asimddp" not in cpuinfo


def test_answers_are_those_of_this_host_when_it_stands_in(rounded, tmp_path) -> None:
    found = proof.prove(rounded, emulator=pretended(tmp_path / "arm"), emulate=True)
    assert found.host is not None
    assert found.host.max_relative == 0.0


class Shapes(nn.Module):
    """Every kind of output: a tensor, a constant, integers, bfloat16, an empty one."""

    def forward(self, x: torch.Tensor, n: torch.Tensor, half: torch.Tensor):
        return {"sum": x + n, "one": 1, "n": n * 2, "half": half.float().to(torch.bfloat16), "none": x[:0]}


def test_inputs_and_outputs_of_every_kind_cross_over(tmp_path) -> None:
    args = (torch.randn(2, 3), torch.tensor([1, 2, 3]), torch.randn(4, dtype=torch.bfloat16))
    result = graphprune.optimize(Shapes(), args, target="arm", measure=False)
    found = proof.prove(result.save(tmp_path / "a"), emulator=pretended(tmp_path / "arm"), emulate=True)
    assert found.passed, found.lines
    answer = call(read(tmp_path / "a"), result.graph.examples, find(tmp_path / "arm"))
    want = result.graph.run()
    for one, other in zip(answer.outputs, want, strict=True):
        if isinstance(other, torch.Tensor):
            assert one.dtype is other.dtype
            assert one.shape == other.shape
        else:
            assert one == other


# ---- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("kill -SEGV $$", "crashed with SIGSEGV"),
        ("echo something >&2; echo 'bad opcode' >&2; kill -ILL $$",
         "crashed with SIGILL: bad opcode; it uses an instruction that a cortex-a76 has not"),
        ("echo 'qemu: uncaught target signal 11 (Segmentation fault) - core dumped' >&2; exit 139",
         "crashed with SIGSEGV"),
        ("echo 'Traceback:' >&2; echo 'Fail: no kernel' >&2; exit 1", r"\(exit code 1\): Fail: no kernel"),
    ],
)  # fmt: skip
def test_a_process_that_ends_badly_is_one_line(built, tmp_path, ending, said) -> None:
    folder = pretended(tmp_path / "arm", ending=ending)
    with pytest.raises(BackendError, match=said) as caught:
        proof.prove(built, emulator=folder, emulate=True)
    assert "\n" not in str(caught.value)


def test_a_process_that_takes_too_long_is_stopped(built, tmp_path) -> None:
    folder = pretended(tmp_path / "arm", ending="exec sleep 60")
    with pytest.raises(BackendError, match="longer than 1 s and was stopped"):
        proof.prove(built, emulator=folder, emulate=True, timeout=1)


def test_an_artifact_of_a_newer_runtime(built, tmp_path) -> None:
    folder = pretended(tmp_path / "arm", onnxruntime="1.2.3")
    with pytest.raises(BackendError, match=r"was made with onnxruntime .* has 1\.2\.3; set it up with"):
        proof.prove(built, emulator=folder, emulate=True)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({}, "needs apache-tvm, which the emulator in .* lacks; set it up with"),
        ({"apache-tvm": "0.27.0.post1"}, r"was made with apache-tvm 0\.28\.0, the emulator in .* has 0\.27"),
        ({"apache-tvm": "0.28.0"}, None),
    ],
)
def test_a_library_of_a_newer_tvm(built, tmp_path, there, said) -> None:
    contents = read(built)
    manifest = {**contents.manifest, "backend": "tvm", "versions": {"apache-tvm": "0.28.0"}}
    library = replace(contents, manifest=manifest)
    machine = find(pretended(tmp_path / "arm", **there))
    with contextlib.nullcontext() if said is None else pytest.raises(BackendError, match=said):
        suits(library, machine)


def test_an_artifact_for_another_architecture(tmp_path) -> None:
    result = graphprune.optimize(net(), image(), target="x86", measure=False)
    with pytest.raises(BackendError, match=r"is for x86 \(x86_64\), the emulator is aarch64"):
        proof.prove(result.save(tmp_path / "a"), emulator=tmp_path / "none", emulate=True)


def test_machine_code_for_another_architecture_asks_for_no_emulator(built, tmp_path) -> None:
    def of_tvm(manifest):
        return {**manifest, "backend": "tvm", "target": {**manifest["target"], "arch": "x86_64"}}

    contents = read(built)
    with pytest.raises(BackendError, match=r"\(x86_64\), the emulator is aarch64"):
        emulable(replace(contents, manifest=of_tvm(contents.manifest)))


def test_an_artifact_of_a_backend_that_is_not_emulated(tmp_path) -> None:
    pytest.importorskip("openvino", reason="the artifact is one of OpenVINO's")
    result = graphprune.optimize(net(), image(), target="arm", backend="openvino", measure=False)
    with pytest.raises(BackendError, match="'openvino', which is not emulated"):
        proof.prove(result.save(tmp_path / "a"), emulator=tmp_path / "none", emulate=True)


def test_the_emulator_lies_where_everything_else_is_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("GRAPHPRUNE_EMULATOR", raising=False)
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path))
    assert places()[-1] == tmp_path / "arm"


def test_no_emulator(built, tmp_path, monkeypatch) -> None:
    with pytest.raises(BackendError, match=r"no emulator in .*nowhere; set it up with: graphprune emulator"):
        proof.prove(built, emulator=tmp_path / "nowhere", emulate=True)
    monkeypatch.setenv("GRAPHPRUNE_EMULATOR", str(tmp_path / "elsewhere"))
    with pytest.raises(BackendError, match=r"no emulator in .*elsewhere;"):
        find()


def test_an_emulator_that_was_not_finished(tmp_path) -> None:
    folder = pretended(tmp_path / "arm")
    record = json.loads((folder / "emulator.json").read_text())
    (folder / "emulator.json").write_text(json.dumps(record | {"ready": False}))
    with pytest.raises(BackendError, match="is not complete"):
        find(folder)
    (folder / "emulator.json").write_text(json.dumps(record | {"qemu": "/no/such/qemu"}))
    with pytest.raises(BackendError, match="has no /no/such/qemu any more"):
        find(folder)
    (folder / "emulator.json").write_text("{")
    with pytest.raises(BackendError, match="is not complete"):
        find(folder)


# ---- processors -----------------------------------------------------------------------------------


def machine(tmp_path: Path, models: str) -> Emulator:
    return find(pretended(tmp_path / "arm", models=models))


@pytest.mark.parametrize(
    ("models", "name", "stands_in"),
    [
        ("cortex-a53 cortex-a76 max", "cortex-a76", "cortex-a76"),
        ("cortex-a53 cortex-a76 max", "cortex-a55", "cortex-a76"),
        ("cortex-a53 neoverse-n1 max", "cortex-x1", "neoverse-n1"),
        ("cortex-a53 cortex-a55 max", "cortex-a55", "cortex-a55"),
        ("cortex-a53 max", "neoverse-v1", "max"),
        ("cortex-a53 max", "", "cortex-a53"),
        ("cortex-a35 max", "cortex-a35", "cortex-a35"),
        ("cortex-a53 max", "cortex-a35", "max"),
        ("cortex-a53 max", "cortex-a72", "max"),
    ],
)
def test_what_stands_for_a_processor(tmp_path, models, name, stands_in) -> None:
    assert machine(tmp_path, models).processor(name).model == stands_in


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("arm:cortex-a55", "a cortex-a76 stood in, which has the same features"),
        ("arm:neoverse-n2", "no instruction that the processor lacks is not proven"),
    ],
)
def test_a_stand_in_is_told(tmp_path, target, said) -> None:
    result = graphprune.optimize(nn.Linear(3, 2), torch.ones(1, 3), target=target, measure=False)
    found = proof.prove(result.save(tmp_path / "a"), emulator=pretended(tmp_path / "arm"), emulate=True)
    assert any(said in note for note in found.notes)
