"""A saved artifact verified alone: in Python and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import graphprune
from graphprune import artifact, proof, versions
from graphprune.cli import main
from graphprune.contents import read
from graphprune.errors import ArtifactError, VerificationError
from tests.emulation.machines import pretended


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.fixture
def built(tmp_path) -> Path:
    return graphprune.optimize(net(), torch.randn(2, 6), target="arm", measure=False).save(tmp_path / "build")


def altered(directory: Path, tmp_path: Path, target: str = "arm") -> Path:
    """The artifact of another network, beside the reference of this one."""
    contents = read(directory)
    other = graphprune.optimize(
        nn.Sequential(net(), nn.Sigmoid()), torch.randn(2, 6), target=target, measure=False
    )
    return artifact.save(
        tmp_path / "altered", other.deployment.lowered, target=other.deployment.target,
        signature=other.graph.signature, reference=contents.others["reference.safetensors"],
    )  # fmt: skip


def test_here(built) -> None:
    found = proof.prove(built)
    assert found.passed
    assert not found.emulated
    assert found.statement == "proven on this host (x86_64)"
    assert any("it was built for arm (aarch64)" in note for note in found.notes)


def test_an_older_runtime_is_a_note(built, monkeypatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda package: "1.0.0")
    notes = proof.prove(built).notes
    assert any(note.startswith("it opens here, although it was built with onnxruntime") for note in notes)


def test_another_network_fails(built, tmp_path) -> None:
    place = altered(built, tmp_path)
    found = proof.prove(place)
    assert not found.passed
    assert found.statement.startswith("not proven: relative error")
    emulated = proof.prove(place, emulator=pretended(tmp_path / "arm"), emulate=True)
    assert not emulated.passed


def test_without_a_reference_a_portable_artifact_is_compared_with_this_host(tmp_path) -> None:
    result = graphprune.optimize(net(), torch.randn(2, 6), target="arm", measure=False)
    place = result.save(tmp_path / "build", reference=False)
    assert "reference.safetensors" not in {path.name for path in place.iterdir()}
    with pytest.raises(VerificationError, match="holds no reference: left out: reference=False, so there is"):
        proof.prove(place)
    found = proof.prove(place, emulator=pretended(tmp_path / "arm"), emulate=True)
    assert found.passed
    assert found.against == proof.ELSEWHERE
    assert "the artifact holds no reference: left out: reference=False" in found.notes


def test_a_reference_that_was_altered_is_not_believed(built) -> None:
    path = built / "reference.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ArtifactError, match=r"reference\.safetensors was altered"):
        proof.prove(built)


def test_the_reference_is_no_part_of_what_is_deployed(built) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    assert list(manifest["files"]) == ["model.onnx"]
    assert "reference.safetensors" in manifest["volatile"]


def test_a_proof_is_recorded_in_the_artifact(built, tmp_path) -> None:
    kept = {name: (built / name).read_bytes() for name in ("manifest.json", "model.onnx")}
    found = proof.prove(built, emulator=pretended(tmp_path / "arm"), emulate=True)
    for _ in range(2):  # the second takes the place of the first
        proof.record(built, found)
    page = (built / "report.html").read_text()
    assert page.count("proven under emulation, latency not measured") == 1
    assert {name: (built / name).read_bytes() for name in kept} == kept
    loaded = graphprune.load(built)
    assert loaded.measurements["verified"]["statement"] == "proven under emulation, latency not measured"
    assert proof.prove(built).passed


def test_what_lies_beside_an_artifact_is_never_lost(built) -> None:
    (built / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"also holds notes\.txt"):
        proof.record(built, proof.prove(built))
    assert (built / "notes.txt").exists()


def test_integers_of_two_instruction_sets_may_differ_by_a_few_roundings() -> None:
    here = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    there = here.clone()
    there[:3] += 0.2  # three numbers that fell to the other side
    found = proof.beside([there], [here], integers=True)
    assert found.passed
    assert found.max_relative > 3e-2
    assert found.precision.startswith("integers: noise between the two 1")
    assert not proof.beside([there], [here], integers=False).passed
    wrong = proof.beside([here * 1.1], [here], integers=True)
    assert not wrong.passed
    assert "at most 3e-02" in wrong.reason


# ---- the command ----------------------------------------------------------------------------------


def test_the_command_says_what_is_proven(built, tmp_path, capsys) -> None:
    folder = pretended(tmp_path / "arm")
    assert main(["verify", str(built), "--emulator", str(folder), "--record"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        f"passed: {built} on an emulated cortex-a53, against the graph's stored answers"
    )
    assert lines[-1] == "proven under emulation, latency not measured"
    assert "proven under emulation" in (built / "report.html").read_text()


def test_a_failure_is_one_line_and_an_exit_code(built, tmp_path, capsys) -> None:
    assert main(["verify", str(altered(built, tmp_path))]) == 6
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "does not answer as its reference: relative error" in errors[0]


@pytest.mark.parametrize("wrong", [False, True])
def test_json_is_all_there_is_on_standard_output(built, tmp_path, capsys, wrong) -> None:
    place = altered(built, tmp_path) if wrong else built
    code = main(["verify", str(place), "--json", "--emulator", str(pretended(tmp_path / "arm"))])
    assert code == (6 if wrong else 0)
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is not wrong
    assert document["emulated"] is True
    assert document["certificate"]["kind"] == "runtime"
    assert document["audit"]["operators"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--emulator", "nowhere"], 7, "error: no emulator in nowhere; set it up with: graphprune emulator"),
        (["--emulate"], 7, "error: no emulator in "),
    ],
)
def test_errors_are_one_line(built, tmp_path, monkeypatch, capsys, arguments, code, said) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAPHPRUNE_EMULATOR", str(tmp_path / "none"))
    assert main(["verify", str(built), *arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == 1


def test_a_target_of_a_processor_on_the_command_line(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "nets_of_proof.py").write_text(
        "import torch\n\ndef model():\n    return torch.nn.Linear(3, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["optimize", "nets_of_proof.py:model", "--input", "1x3", "--no-measure", "--out", "build"]
    assert main([*command, "--target", "arm:cortex-a67"]) == 3
    assert "did you mean 'arm:cortex-a" in capsys.readouterr().err
    assert main([*command, "--target", "arm:cortex-a76"]) == 0
    assert "arm:cortex-a76" in capsys.readouterr().out
    assert read(tmp_path / "build").target.processor == "cortex-a76"
