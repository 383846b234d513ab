"""TVM libraries: they compute what the module does, whatever the sizes; what is refused, and how."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("tvm", reason="needs graphprune[tvm]")

from graphprune.backends import tvm_machine
from graphprune.backends.tvm import Tvm
from graphprune.backends.tvm_package import cores
from graphprune.backends.tvm_runtime import architecture

import graphprune
from graphprune.backend import Lowered
from graphprune.errors import BackendError, InputError, TargetError
from graphprune.target import Target, get, host_arch, known
from tests.backends.conftest import Everything, Opened, convolutional
from tests.passes.quantizing import Block, images

CPU = get("cpu")


@pytest.fixture
def runtime() -> str:
    return "tvm"


@pytest.fixture(autouse=True)
def _no_measured_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody has tuned on this machine must not decide what is tested."""
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path / "cache"))


class Residual(nn.Module):
    """A strided block with batch norms, a shortcut and a sum, as in ResNets."""

    def __init__(self, inside: int, outside: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False, groups=groups)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1)
        self.short = nn.Conv2d(inside, outside, 1, stride)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outside) for _ in range(2))
        for name, value in (*self.norms.named_buffers(), *self.norms.named_parameters()):
            if value.is_floating_point():
                nn.init.uniform_(value, 0.5, 2) if name.endswith("var") else nn.init.normal_(value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(y)) + self.short(x))


class Excited(nn.Module):
    """A depthwise separable block with squeeze and excitation, as in MobileNetV3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(channels, channels, 5, 2, 2, groups=channels)
        self.down, self.up = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)
        self.point = nn.Conv2d(channels, 24, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.hardswish(self.depth(x))
        scale = torch.sigmoid(self.up(torch.relu(self.down(y.mean((2, 3), keepdim=True)))))
        return nn.functional.relu6(self.point(y * scale))


class Branches(nn.Module):
    """Concatenations, of whole blocks and not, and what reads them."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, left, 3, padding=1), nn.Conv2d(3, right, 1)
        self.after = nn.Conv2d(left + right, 7, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.cat([self.left(x), self.right(x)], 1)
        return self.after(y), y[:, 1:3]


CONVOLUTIONS = {
    "residual": (Residual(16, 32, 2), (1, 16, 14, 14)),
    "odd channels": (Residual(13, 21), (2, 13, 9, 11)),
    "groups of four": (Residual(32, 32, groups=8), (1, 32, 8, 8)),
    "groups of odd width": (Residual(15, 25, 2, groups=5), (1, 15, 8, 8)),
    "depthwise, odd": (Excited(19), (1, 19, 13, 13)),
    "depthwise, aligned": (Excited(32), (2, 32, 14, 14)),
    "depthwise of two": (nn.Conv2d(10, 20, 3, groups=10), (1, 10, 8, 8)),
    "dilation and uneven padding": (nn.Conv2d(20, 20, (3, 5), (1, 2), (2, 1), (2, 1)), (1, 20, 12, 17)),
    "a width no tile divides": (nn.Conv2d(16, 16, 3, padding=1), (1, 16, 37, 37)),
    "a wide depthwise": (nn.Conv2d(16, 16, 3, padding=1, groups=16), (1, 16, 5, 59)),
    "max pool, ceiling": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.MaxPool2d(3, 2, 1, ceil_mode=True)), (1, 3, 14, 14)),
    "average pool": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False)), (1, 3, 9, 9)),
    "average pool, padding counts": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.AvgPool2d(3, 2, 1, ceil_mode=True)), (1, 3, 10, 10)),
    "adaptive pool": (nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(2)), (1, 3, 8, 8)),
    "whole blocks": (Branches(16, 32), (1, 3, 8, 8)),
    "parts of blocks": (Branches(5, 9), (1, 3, 8, 8)),
    "all kinds": (convolutional(), (2, 3, 12, 12)),
    "transposed": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2, 2)), (1, 3, 8, 8)),
    "one dimension": (nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 3, 1)), (1, 4, 20)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, opened: Any) -> None:
    model, shape = CONVOLUTIONS[name]
    built = opened(model, torch.randn(shape))
    for _ in range(2):
        built.matches(torch.randn(shape))


@pytest.mark.parametrize(
    ("rows", "inside", "outside"), [(1, 24, 1000), (197, 20, 33), (8, 64, 64), (30, 7, 3), (2, 16, 17)]
)
def test_linears(rows: int, inside: int, outside: int, opened: Any) -> None:
    model = nn.Sequential(nn.Linear(inside, outside), nn.GELU(), nn.Linear(outside, inside, bias=False))
    opened(model, torch.randn(rows, inside)).matches(torch.randn(rows, inside))
    opened(model, torch.randn(2, rows, inside)).matches(torch.randn(2, rows, inside))


@pytest.mark.parametrize("function", [torch.exp, torch.sigmoid, torch.tanh, torch.erf, nn.functional.silu])
def test_exponentials(function: Any, opened: Any) -> None:
    """Written out, they are as good as float32 is, from where they vanish to where they are largest."""

    class Elementwise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    x = torch.cat([torch.linspace(-95, 80, 5001), torch.linspace(-3, 3, 5001), torch.zeros(1)])
    built = opened(Elementwise(), x)
    found, wanted = built(x).double(), function(x.double())
    scale = wanted.abs().clamp_min(1e-30) if function is torch.exp else wanted.abs().clamp_min(1)
    assert float(((found - wanted).abs() / scale)[x > -87].max()) < 6e-7
    assert float(found[x <= -87].abs().max()) < 2e-36 or function in (torch.tanh, torch.erf)


def test_attention(opened: Any) -> None:
    x = torch.randn(2, 17, 32)
    opened(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=True), x).matches(x)
    opened(Block(), torch.randn(2, 12, 32)).matches(torch.randn(2, 12, 32))


def test_outputs_of_every_kind(opened: Any) -> None:
    built = opened(Everything(), torch.randn(3, 4), torch.randn(2))
    weight, output = torch.randn(3, 4), torch.randn(2)
    built.matches(weight, output)
    result = built(weight, output)
    kept = weight.clone()
    result["input"].zero_()
    assert torch.equal(weight, kept)
    table = result["table"].clone()
    result["table"].zero_()
    assert torch.equal(built(weight, output)["table"], table)


def test_inputs_of_any_layout_and_alignment(opened: Any) -> None:
    built = opened(nn.Conv2d(4, 8, 3), torch.randn(1, 4, 8, 8))
    x = torch.randn(1, 4, 8, 8)
    built.matches(x.to(memory_format=torch.channels_last))
    shifted = torch.randn(4 * 64 + 1)[1:].view(1, 4, 8, 8)
    assert shifted.data_ptr() % 64
    built.matches(shifted)


def test_threads(opened: Any) -> None:
    model = Residual(32, 64)
    one, two = (opened(model, torch.randn(1, 32, 28, 28), threads=n) for n in (1, 2))
    x = torch.randn(1, 32, 28, 28)
    one.matches(x)
    two.matches(x)
    one.matches(x)
    with pytest.raises(InputError, match="at least 1"):
        opened(model, x, threads=0)


@pytest.mark.skipif(cores() < 2, reason="needs two cores")
def test_threads_are_those_asked_for_and_nobody_is_bound(opened: Any, tmp_path: Path) -> None:
    """In a process of its own, where TVM's pool has not started yet."""
    result = graphprune.optimize(Residual(32, 64), torch.randn(1, 32, 8, 8), backend="tvm", measure=False)
    result.save(tmp_path / "built")
    program = (
        "import os, sys, torch, graphprune, tvm\n"
        "before, counts = os.sched_getaffinity(0), []\n"
        "for threads in (1, 2, 1):\n"
        "    graphprune.load(sys.argv[1], threads=threads)(torch.ones(1, 32, 8, 8))\n"
        "    counts.append(tvm.get_global_func('runtime.NumThreads')())\n"
        "assert os.sched_getaffinity(0) == before\n"
        "assert counts == [1, 2, 1], counts\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "built")], check=True)


def test_an_index_beyond_the_end_does_not_end_the_process(opened: Any) -> None:
    built = opened(nn.Embedding(7, 4), torch.zeros(1, 3, dtype=torch.long))
    built.matches(torch.tensor([[0, 6, 3]]))
    found = built(torch.tensor([[1000, 7, -5]]))
    table = built.model.weight.detach()
    assert torch.equal(found[0], table[[6, 6, 0]])


def test_inputs_that_do_not_fit(opened: Any) -> None:
    runner = opened(nn.Linear(3, 2), torch.zeros(1, 3)).runner
    with pytest.raises(InputError, match="must have shape"):
        runner(torch.zeros(2, 3))
    with pytest.raises(InputError, match="must be float32"):
        runner(torch.zeros(1, 3, dtype=torch.float64))


def test_nothing_is_computed_as_scalar_loops(opened: Any) -> None:
    """Every product of a network with awkward sizes has a template, and the audit says so."""
    built = opened(nn.Sequential(Residual(13, 21), Excited(21)), torch.randn(1, 13, 15, 15))
    facts = json.loads(built.lowered.files["tvm.json"])
    products = [row for row in facts["functions"] if row["macs"]]
    assert [row["template"] for row in products] == [
        "conv",
        "conv",
        "conv",
        "depthwise",
        "conv",
        "conv",
        "conv",
    ]
    audit = Tvm().audit(built.lowered, CPU)
    assert audit.macs.keys() == {"float32"}
    layouts = [row.operator for row in audit.rows if "pack" in row.operator]
    assert layouts == ["pack", "unpack"] or layouts == ["unpack"], layouts
    assert any("fused" in row.name and "add" in row.operator for row in audit.rows)


def test_a_fresh_process_needs_no_compiler(opened: Any, tmp_path: Path) -> None:
    model = convolutional()
    example = torch.randn(1, 3, 12, 12)
    result = graphprune.optimize(model, example, backend="tvm", measure=False)
    assert all(certificate.passed for certificate in result.report.certificates.values())
    result.save(tmp_path / "built")
    program = (
        "import sys, torch, graphprune\n"
        "runner = graphprune.load(sys.argv[1])\n"
        "torch.save(runner(torch.ones(1, 3, 12, 12)), sys.argv[2])\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "built"), str(tmp_path / "out.pt")], check=True,
        env={"PATH": "/nonexistent", "CXX": "/bin/false"}, capture_output=True,
    )  # fmt: skip
    assert torch.equal(torch.load(tmp_path / "out.pt"), result(torch.ones(1, 3, 12, 12)))


def test_tvm_and_numpy_alone_run_a_library(opened: Any, tmp_path: Path) -> None:
    """The program of the documentation, in a process that cannot import torch or this package."""
    built = opened(convolutional(), torch.randn(1, 3, 12, 12))
    for name, content in built.lowered.files.items():
        (tmp_path / name).write_bytes(content)
    program = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['graphprune'] = None\n"
        "import json, numpy as np, tvm\n"
        "facts = json.load(open('tvm.json'))\n"
        "program = tvm.relax.VirtualMachine(tvm.runtime.load_module('model.so'), tvm.cpu())\n"
        "given = [tvm.runtime.tensor(np.ones(s['shape'], s['dtype'])) for s in facts['inputs']]\n"
        "results = [result.numpy() for result in program[facts['function']](*given)]\n"
        "np.save('out.npy', results[0])\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, capture_output=True)
    import numpy as np

    found = torch.from_numpy(np.load(tmp_path / "out.npy"))
    assert torch.equal(found, built(torch.ones(1, 3, 12, 12)))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "raise RuntimeError('ffi\\nmismatch')",
            "tvm does not import (RuntimeError: ffi; installed: apache-tvm ",
        ),
        ("import tvm_ffi; tvm_ffi.nothing", "(AttributeError: module 'tvm_ffi' has no attribute 'nothing'; "),
        ("import tvm.absent", "(ModuleNotFoundError: No module named 'tvm.absent'; "),
        ("", "apache-tvm', which is not installed: pip install 'graphprune[tvm]'"),
    ],
)
def test_a_tvm_that_does_not_import(
    line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tvm").mkdir()
    if line:
        (tmp_path / "tvm" / "__init__.py").write_text(line)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(sys.path if line else ())])
    for name in [name for name in sys.modules if name.partition(".")[0] == "tvm"]:
        monkeypatch.delitem(sys.modules, name)
    for _ in range(2):
        reason = Tvm().unrunnable(CPU)
        assert reason is not None
        assert said in reason
        assert "pip install 'graphprune[tvm]'" in reason
        assert "\n" not in reason


@pytest.mark.skipif(host_arch() != "x86_64", reason="what comparing with NaN selects is the processor's")
@pytest.mark.parametrize(
    ("module", "wanted"),
    [(nn.ReLU(), 0.0), (nn.ReLU6(), 6.0), (nn.Hardtanh(-1, 2), 2.0), (nn.Tanh(), 1.0), (nn.GELU(), None)],
)
def test_nan_is_what_the_documentation_says(opened: Any, module: nn.Module, wanted: float | None) -> None:
    (found,) = opened(module, torch.zeros(1, 16)).runner(torch.full((1, 16), torch.nan))
    assert bool(found.isnan().all()) if wanted is None else bool((found == wanted).all())


# -- another machine ------------------------------------------------------------------------------------

ELSEWHERE = Target("board", "aarch64" if host_arch() == "x86_64" else "x86_64", portable=False)


def test_unrunnable_elsewhere() -> None:
    assert Tvm().unrunnable(CPU) is None
    assert "--emulate" in str(Tvm().unrunnable(ELSEWHERE))


def test_a_library_of_another_machine_is_refused(opened: Any) -> None:
    built: Opened = opened(nn.Linear(3, 2), torch.zeros(1, 3))
    library = bytearray(built.lowered.files["model.so"])
    library[18:20] = (183 if host_arch() == "x86_64" else 62).to_bytes(2, "little")
    files = {**built.lowered.files, "model.so": bytes(library)}
    with pytest.raises(BackendError, match=f"machine code for {ELSEWHERE.arch}, and this host is"):
        Tvm().open(files, built.lowered.inputs, built.lowered.outputs, CPU)


@pytest.mark.skipif(host_arch() != "x86_64", reason="names processors of x86_64")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_narrower_vectors(processor: str) -> None:
    """Blocks of eight channels: what runs on a processor without AVX-512."""
    target = Target("older", "x86_64", processor=processor)
    graph = graphprune.trace(nn.Sequential(Residual(13, 21), Excited(21)).eval(), torch.randn(1, 13, 15, 15))
    made = Tvm().lower(graph, target)
    runner = Tvm().open(made.files, made.inputs, made.outputs, target)
    x = torch.randn(1, 13, 15, 15)
    wanted = graph.run(x)[0]
    assert float((runner(x)[0] - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_a_library_for_a_processor_that_has_more(opened: Any) -> None:
    made = opened(nn.Linear(3, 2), torch.zeros(1, 3)).lowered
    facts = json.loads(made.files["tvm.json"])
    facts["llvm"]["mattr"] = ["+sve2" if host_arch() == "x86_64" else "+avx512f"]
    with pytest.raises(BackendError, match="which this processor lacks; build it here"):
        Tvm().open({**made.files, "tvm.json": json.dumps(facts).encode()}, made.inputs, made.outputs, CPU)


@pytest.mark.parametrize(
    ("arch", "processor", "features", "said"),
    [
        (
            "x86_64",
            "granitterapids",
            (),
            "no x86_64 processor 'granitterapids' (did you mean 'graniterapids'?)",
        ),
        ("aarch64", "cortex-a67", (), "no aarch64 processor 'cortex-a67' (did you mean 'cortex-a"),
        ("aarch64", "graniterapids", (), "no aarch64 processor 'graniterapids'"),
        ("x86_64", "skylake-avx512", ("+avx512vnmi",), "'avx512vnmi' (did you mean 'avx512vnni'?)"),
        ("aarch64", "cortex-a76", ("-dotprd",), "no aarch64 feature 'dotprd' (did you mean 'dotprod'?)"),
        ("aarch64", "", ("dotprod",), "write '+dotprod' or '-dotprod'"),
    ],
)
def test_a_processor_that_llvm_does_not_know(
    arch: str, processor: str, features: tuple[str, ...], said: str
) -> None:
    """LLVM itself would compile for any processor, and say so to standard error only."""
    with pytest.raises(TargetError, match=re.escape(said)):
        tvm_machine.machine(Target("edge", arch, processor=processor, features=features))


def test_names_that_llvm_knows(capfd: pytest.CaptureFixture[str]) -> None:
    for target in known().values():
        if target.arch in tvm_machine.TRIPLES:
            tvm_machine.machine(target)
    tvm_machine.machine(Target("edge", "aarch64", features=("+reserve-x18", "-dotprod")))
    assert capfd.readouterr().err == ""


def test_what_the_linker_said_is_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("g++", "gcc", "clang", "cc", "c++"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'ld: cannot find -lstdc++' >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    graph = graphprune.trace(nn.Linear(3, 2).eval(), torch.zeros(1, 3))
    with pytest.raises(BackendError, match=r"the library does not link: ld: cannot find -lstdc\+\+$"):
        Tvm().lower(graph, CPU)


@pytest.mark.skipif(
    host_arch() != "x86_64" or shutil.which("aarch64-linux-gnu-g++") is None,
    reason="cross-compiling needs aarch64-linux-gnu-g++ on x86_64",
)
def test_cross_compiled() -> None:
    target = Target("pi", "aarch64", processor="cortex-a76", features=("+dotprod",), portable=False)
    graph = graphprune.trace(convolutional(), torch.randn(1, 3, 12, 12))
    made = Tvm().lower(graph, target)
    assert architecture(made.files["model.so"]) == "aarch64"
    facts = json.loads(made.files["tvm.json"])
    assert facts["processor"] == "aarch64-linux-gnu cortex-a76 +neon +dotprod"
    assert [spec["name"] for spec in facts["inputs"]] == [spec.name for spec in made.inputs]
    with pytest.raises(BackendError, match="machine code for aarch64"):
        Tvm().open(made.files, made.inputs, made.outputs, target)


def test_without_the_cross_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_machine.shutil, "which", lambda name: None)
    graph = graphprune.trace(nn.Linear(3, 2), torch.zeros(1, 3))
    with pytest.raises(BackendError, match="not installed: apt-get install g"):
        Tvm().lower(graph, ELSEWHERE)
    with pytest.raises(BackendError, match="links with a C"):
        Tvm().lower(graph, CPU)


def test_a_gpu_is_refused() -> None:
    graph = graphprune.trace(nn.Linear(3, 2), torch.zeros(1, 3))
    with pytest.raises(TargetError, match="no TVM schedules"):
        Tvm().lower(graph, get("cuda"))


# -- what is no library, and what cannot be one -----------------------------------------------------------


def _linear(opened: Any) -> Lowered:
    return opened(nn.Linear(3, 2), torch.zeros(1, 3)).lowered


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.so", None, "there is no model.so among the files"),
        ("model.so", b"nothing", "not a shared library"),
        ("tvm.json", b"{", "not JSON"),
        ("tvm.json", b'{"format": 99}', "newer than this graphprune reads"),
    ],
)
def test_files_that_do_not_fit(name: str, content: bytes | None, words: str, opened: Any) -> None:
    made = _linear(opened)
    files = {k: v for k, v in {**made.files, name: content}.items() if v is not None}
    with pytest.raises(BackendError, match=words):
        Tvm().open(files, made.inputs, made.outputs, CPU)


def test_a_library_of_a_newer_tvm(opened: Any) -> None:
    made = _linear(opened)
    facts = json.loads(made.files["tvm.json"]) | {"tvm": "9.1.0"}
    with pytest.raises(BackendError, match=r"built with TVM 9\.1\.0.*pip install 'apache-tvm>=9\.1\.0'"):
        Tvm().open({**made.files, "tvm.json": json.dumps(facts).encode()}, made.inputs, made.outputs, CPU)


def test_a_damaged_library(opened: Any) -> None:
    made = _linear(opened)
    with pytest.raises(BackendError, match="is damaged: it has 4000 bytes"):
        Tvm().open({**made.files, "model.so": made.files["model.so"][:4000]}, made.inputs, made.outputs, CPU)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tvm", None)
    graph = graphprune.trace(nn.Linear(3, 2), torch.zeros(1, 3))
    with pytest.raises(BackendError, match=r"pip install 'graphprune\[tvm\]'"):
        Tvm().lower(graph, CPU)


def test_open_sizes_are_refused() -> None:
    graph = graphprune.trace(nn.Linear(3, 2), torch.zeros(2, 3), dynamic_batch=True)
    with pytest.raises(BackendError, match="fixed sizes"):
        Tvm().lower(graph, CPU)


def test_integers_are_refused() -> None:
    data = images(2, 3, 16, 16)
    with pytest.raises(BackendError, match="no integer form"):
        graphprune.optimize(
            convolutional(), data[0], calibration=data, precision="int8", backend="tvm", measure=False
        )


def test_a_branch_is_refused_as_one() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v.amax() - v, (x,))

    with pytest.raises(BackendError, match=r"no branches or loops \(cond\)"):
        Tvm().lower(graphprune.trace(Branches(), torch.ones(3)), CPU)


def test_half_precision_is_refused() -> None:
    graph = graphprune.trace(nn.Linear(3, 2).bfloat16(), torch.zeros(1, 3, dtype=torch.bfloat16))
    with pytest.raises(BackendError, match="bfloat16, for which TVM has no"):
        Tvm().lower(graph, CPU)


def test_an_operator_that_tvm_does_not_know() -> None:
    class Unknown(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    graph = graphprune.trace(Unknown(), torch.zeros(1, 3))
    with pytest.raises(BackendError, match=r"importer has no .*bessel"):
        Tvm().lower(graph, CPU)
