"""Real artifacts on a real emulator: what `make arm` sets up. Without it these are skipped, never passed."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import graphprune
from benchmarks.backends.arm import FORMS, Form, build
from graphprune import proof
from graphprune.contents import read
from graphprune.emulation.emulator import VARIABLE, Emulator, find
from graphprune.emulation.install import install
from graphprune.emulation.machine import call
from graphprune.errors import BackendError
from graphprune.target import get
from tests.test_proof import altered

ROOT = Path(__file__).parents[2]
NETWORKS = ("resnet18", "mobilenet_v2", "bert-mini")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def machine() -> Emulator:
    try:
        return find(os.environ.get(VARIABLE) or ROOT / "build/arm")
    except BackendError as error:
        pytest.skip(f"not run: {error}")


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_an_artifact_answers_as_its_graph(
    network: str, form: Form, machine: Emulator, tmp_path: Path
) -> None:
    if form.backend == "tvm":
        pytest.importorskip("tvm", reason="TVM is not installed: pip install 'graphprune[tvm]'")
        if "apache-tvm" not in machine.versions:
            pytest.skip("not run: the emulator was set up without TVM; make arm")
        from graphprune.backends.tvm_machine import linker

        try:
            linker(get("arm"))
        except BackendError as error:
            pytest.skip(f"not run: {error}")
    saved = build(network, form, "arm:cortex-a76", tmp_path)
    found = proof.prove(saved, emulator=machine, emulate=True)
    assert found.passed, found.lines
    assert found.emulated
    assert found.ran_on == "an emulated cortex-a76"
    assert found.statement == "proven under emulation, latency not measured"
    if form.precision is None:
        assert found.certificate.max_relative < 1e-4
    else:
        assert found.audit is not None
        assert found.audit.integers > 0.9
        assert found.host is not None
        assert found.host.sqnr > 30  # roundings that fell the other way


def test_generic_code_runs_on_the_least_of_processors(machine: Emulator, tmp_path: Path) -> None:
    found = proof.prove(build("resnet18", FORMS[0], "arm", tmp_path), emulator=machine, emulate=True)
    assert found.passed
    assert found.ran_on == "an emulated cortex-a53"


def test_an_artifact_of_another_network_fails(machine: Emulator, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    saved = graphprune.optimize(model, torch.randn(2, 6), target="arm", measure=False).save(tmp_path / "a")
    assert proof.prove(saved, emulator=machine, emulate=True).passed
    assert not proof.prove(altered(saved, tmp_path), emulator=machine, emulate=True).passed


def test_too_short_a_time(machine: Emulator, tmp_path: Path) -> None:
    saved = graphprune.optimize(nn.Linear(3, 2), torch.ones(1, 3), target="arm", measure=False)
    with pytest.raises(BackendError, match="longer than 1 s and was stopped"):
        proof.prove(saved.save(tmp_path / "a"), emulator=machine, emulate=True, timeout=1)


def test_code_for_more_than_the_processor_has_crashes_with_a_reason(
    machine: Emulator, tmp_path: Path
) -> None:
    """What is emulated is the target's processor: an instruction that it lacks is an error and not a pass."""
    script = tmp_path / "dot.py"
    script.write_text(
        "import ctypes, mmap\n"
        "page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
        "page.write(bytes.fromhex('0094822e c0035fd6'))  # udot v0.2s, v0.8b, v2.8b; ret\n"
        "code = ctypes.addressof(ctypes.c_char.from_buffer(page))\n"
        "ctypes.CFUNCTYPE(None)(code)()\n"
        "print('ran')\n"
    )
    assert machine.run(script, [], processor="cortex-a76").output == "ran\n"
    with pytest.raises(BackendError, match=r"SIGILL.*an instruction that a cortex-a72 has not"):
        machine.run(script, [], processor="cortex-a72")


def test_an_artifact_is_run_with_several_threads(machine: Emulator, tmp_path: Path) -> None:
    saved = build("mobilenet_v2", FORMS[0], "arm", tmp_path)
    assert proof.prove(saved, emulator=machine, emulate=True, threads=2).passed


def test_setting_up_again_does_nothing(machine: Emulator) -> None:
    said: list[str] = []
    assert install(machine.folder, say=said.append) == machine
    assert said == []


def test_a_crash_of_the_runtime_is_one_line(machine: Emulator, tmp_path: Path) -> None:
    saved = graphprune.optimize(nn.Linear(3, 2), torch.ones(1, 3), target="arm", measure=False)
    contents = read(saved.save(tmp_path / "a"))
    broken = replace(contents, files={"model.onnx": b"no model"})
    with pytest.raises(BackendError, match=r"failed \(exit code 1\): .*model\.onnx") as caught:
        call(broken, [torch.ones(1, 3)], machine)
    assert not re.search("\n", str(caught.value))
