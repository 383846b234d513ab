"""Targets by name: what they hold, how they read back, and what an unknown one is answered."""

from __future__ import annotations

import pytest

from graphprune.errors import TargetError
from graphprune.manifest import target_json, target_of
from graphprune.target import ARM_PROCESSORS, Target, get, known


@pytest.mark.parametrize("name", sorted(known()))
def test_a_named_target_reads_back_from_a_manifest(name: str) -> None:
    assert target_of(target_json(get(name))) == get(name)


@pytest.mark.parametrize("processor", sorted(ARM_PROCESSORS))
def test_a_processor_is_a_target(processor: str) -> None:
    target = get(f"arm:{processor}")
    assert (target.name, target.arch, target.processor) == (f"arm:{processor}", "aarch64", processor)
    assert target.features == ARM_PROCESSORS[processor]
    arm = get("arm")
    assert (target.channel_alignment, target.integers) == (arm.channel_alignment, arm.integers)


@pytest.mark.parametrize("processor", sorted(ARM_PROCESSORS))
def test_llvm_knows_the_processor_and_its_features(processor: str) -> None:
    """An oracle: what LLVM's own table says a processor has."""
    pytest.importorskip("tvm", reason="LLVM is asked through TVM")
    import tvm
    from tvm.target.codegen import llvm_get_cpu_features

    machine = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": processor})
    has = {f"+{feature}" for feature in map(str, llvm_get_cpu_features(machine))}
    asked = {"+dotprod", "+fullfp16", "+i8mm", "+bf16"}
    assert set(get(f"arm:{processor}").features) == has & asked


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("amr", r"known: arm, arm:PROCESSOR, cpu, cuda, x86 \(did you mean 'arm'\?\)"),
        ("cortex-a76", r"did you mean 'arm:cortex-a76'\?"),
        ("arm:cortex-a67", r"processors of arm: cortex-a53, .* \(did you mean 'arm:cortex-a"),
        ("arm:neoverse-n3", r"did you mean 'arm:neoverse-n[12]'\?"),
        ("toaster", r"^unknown target 'toaster'; known: arm, arm:PROCESSOR, cpu, cuda, x86$"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, said: str) -> None:
    with pytest.raises(TargetError, match=said):
        get(name)


def test_a_target_made_by_hand() -> None:
    mine = Target("board", "aarch64", processor="cortex-a35", features=("+crc",))
    back = target_of(target_json(mine))
    assert (back.processor, back.features) == ("cortex-a35", ("+crc",))
