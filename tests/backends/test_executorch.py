"""ExecuTorch: the original model, run eagerly, is the oracle."""

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

pytest.importorskip("executorch", reason="not run: pip install 'graphprune[executorch]'")

BACKEND = backends.load("executorch")()

# By hand: outputs times what each sums over, for one image of 16 by 16.
MACS = 8 * 16 * 16 * 27 + 12 * 6 * 6 * 2 * 9 + 12 * 5


@pytest.fixture
def runtime() -> str:
    return "executorch"


def test_a_symbolic_batch_stays_symbolic_up_to_what_memory_is_planned_for(opened):
    made = opened(convolutional(), torch.randn(1, 3, 16, 16), dynamic=True)
    assert sorted(made.lowered.files) == ["model.pte", "operators.json"]
    assert made.lowered.inputs[0].shape == ("batch", 3, 16, 16)
    assert any("go up to 64" in note for note in made.lowered.notes)
    for size in (1, 7, 64, 2):
        made.matches(torch.randn(size, 3, 16, 16))
    with pytest.raises(InputError, match=r"'input' has batch = 65; memory was planned for up to 64"):
        made.runner(torch.randn(65, 3, 16, 16))
    audit = BACKEND.audit(made.lowered, get("cpu"))
    assert audit.macs == {"float32": MACS}, "of one sample"


def test_a_batch_above_the_usual_bound_is_planned_for(opened):
    made = opened(nn.Linear(3, 2), torch.randn(70, 3), dynamic=True)
    made.matches(torch.randn(70, 3))
    with pytest.raises(InputError, match="up to 70"):
        made.runner(torch.randn(71, 3))


@pytest.mark.parametrize("name", ["transformer_layer", "multihead_attention", "gru", "unet"])
def test_blocks_answer_as_the_original(opened, name):
    chosen = network(name)
    made = opened(chosen.build(), *chosen.inputs(), **chosen.kwargs())
    made.matches(*chosen.inputs(), **chosen.kwargs(), relative=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_outputs_of_every_kind(opened, dynamic):
    class Several(Everything):
        def forward(self, weight, output):
            found = super().forward(weight, output)
            return {**found, "size": 3}

    made = opened(Several(), torch.randn(2, 4), torch.tensor([True, False]), dynamic=dynamic)
    made.matches(torch.randn(2, 4), torch.tensor([False, True]))
    if dynamic:
        made.matches(torch.randn(5, 4), torch.ones(5, dtype=torch.bool))


def test_a_symbolic_size_as_an_output_is_refused(opened):
    with pytest.raises(BackendError, match="an output is a symbolic size"):
        opened(Everything(), torch.randn(2, 4), torch.ones(2, dtype=torch.bool), dynamic=True)


def test_results_are_the_callers_own(opened):
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
    made.matches(torch.randint(0, 11, (2, 6)), torch.tensor(-0.5), torch.tensor([3, 1, 2], dtype=torch.int32))
    audit = BACKEND.audit(made.lowered, get("cpu"))
    assert any("on ExecuTorch's own kernels" in note and "embedding" in note for note in audit.notes)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def test_half_precision(opened, dtype, relative):
    model = nn.Sequential(nn.Linear(60, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)
    made = opened(model, torch.randn(2, 60).to(dtype), dynamic=True)
    made.matches(torch.randn(5, 60).to(dtype), relative=relative)


def test_float64_is_exact_and_says_that_xnnpack_has_no_part_in_it(opened):
    made = opened(nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double(), torch.randn(2, 3).double())
    made.matches(torch.randn(2, 3).double(), relative=1e-14)
    assert any("is float64, which runs on ExecuTorch's own kernels" in n for n in made.lowered.notes)
    audit = BACKEND.audit(made.lowered, get("cpu"))
    assert audit.macs == {"float64": 2 * 3 * 4}
    assert all("own kernel" in row.reason for row in audit.rows)


def test_any_layout_and_gradient_state_will_do(opened):
    made = opened(nn.Linear(3, 2), torch.randn(4, 3))
    x = torch.randn(3, 4).t().requires_grad_()
    same(made(x).detach(), made.model(x).detach(), 1e-5)
    assert not made(x).requires_grad
    with pytest.raises(InputError, match="'input' must have shape"):
        made.runner(torch.randn(4, 5))
    with pytest.raises(InputError, match="'input' must be float32, got float64"):
        made.runner(x.double())


def test_threads_of_one_runner_do_not_disturb_another(opened):
    from graphprune.backends.executorch_program import runtime as library

    one, two = (opened(convolutional(), torch.randn(1, 3, 16, 16), threads=count) for count in (1, 2))
    free = opened(convolutional(), torch.randn(1, 3, 16, 16))
    x = torch.randn(1, 3, 16, 16)
    for _ in range(3):
        for made, count in ((one, 1), (two, 2)):
            made.matches(x)
            assert library()._threadpool_get_thread_count() == count
    free.matches(x)
    with pytest.raises(InputError, match="at least 1"):
        opened(nn.Linear(3, 2), torch.randn(1, 3), threads=0)


def test_calls_from_several_threads_do_not_mix(opened):
    made = opened(convolutional(), torch.randn(1, 3, 16, 16), threads=1)
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
    assert b"site-packages" not in first["model.pte"]


def test_audit_counts_by_hand(opened):
    audit = BACKEND.audit(opened(convolutional(), torch.randn(2, 3, 16, 16)).lowered, get("cpu"))
    assert audit.macs == {"float32": 2 * MACS}
    assert audit.counts["Conv2d"] + audit.counts.get("DepthwiseConv2d", 0) == 2
    assert not any(row.fell_back or row.reason for row in audit.rows)
    assert audit.notes == ()

    class Product(nn.Module):
        def forward(self, a, b):
            return a.transpose(-1, -2) @ b

    made = opened(Product(), torch.randn(2, 4, 3), torch.randn(2, 4, 5))
    assert BACKEND.audit(made.lowered, get("cpu")).macs == {"float32": 2 * 3 * 4 * 5}


SCRIPT = """
import sys, torch, graphprune
artifact = graphprune.load(sys.argv[1], threads=1)
x, wanted = torch.load(sys.argv[2])
assert torch.allclose(artifact(x), wanted, atol=1e-5), (artifact(x) - wanted).abs().max()
print(artifact.manifest["backend"], "onnxruntime" in sys.modules)
"""


def test_an_artifact_opens_in_a_fresh_process(tmp_path):
    model, x = convolutional(), torch.randn(3, 3, 16, 16)
    result = graphprune.optimize(
        model, (x,), backend="executorch", dynamic_batch=True, measure=False, threads=1
    )
    result.save(tmp_path / "build")
    assert {"model.pte", "manifest.json"} <= {p.name for p in (tmp_path / "build").iterdir()}
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "call.pt")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "build"), str(tmp_path / "call.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.split() == ["executorch", "False"], done.stderr
    assert "executorch" in result.deployment.lowered.versions


def test_without_the_package_the_extra_is_named(opened, monkeypatch):
    made = opened(nn.Linear(3, 2), torch.randn(1, 3))
    honest = builtins.__import__

    def missing(name: str, *rest: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "executorch":
            raise ModuleNotFoundError("No module named 'executorch'", name="executorch")
        return honest(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    says = r"'executorch', which is not installed: pip install 'graphprune\[executorch\]'"
    with pytest.raises(MissingExtraError, match=says):
        BACKEND.lower(made.graph, get("cpu"))
    with pytest.raises(MissingExtraError, match=says):
        BACKEND.open(made.lowered.files, made.lowered.inputs, made.lowered.outputs, get("cpu"))
    with pytest.raises(MissingExtraError, match=says):
        graphprune.optimize(nn.Linear(3, 2), torch.randn(1, 3), backend="executorch", measure=False)


def test_an_operator_without_a_kernel_is_named(opened):
    class Unusual(nn.Module):
        def forward(self, x):
            return torch.erfinv(x).cumprod(-1)

    says = r"no kernel for the operators aten::cumprod\.out, aten::erfinv\.out; .*use backend='onnxruntime'"
    with pytest.raises(BackendError, match=says) as caught:
        opened(Unusual(), torch.rand(3, 3))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_program(opened):
    made = opened(nn.Linear(3, 2), torch.randn(1, 3))
    rest = made.lowered.inputs, made.lowered.outputs, get("cpu")
    program = made.lowered.files["model.pte"]
    with pytest.raises(BackendError, match=r"there is no model\.pte"):
        BACKEND.open({}, (), (), get("cpu"))
    with pytest.raises(BackendError, match="not a program of ExecuTorch"):
        BACKEND.open({"model.pte": b"nonsense, and more"}, *rest)
    with pytest.raises(BackendError, match="does not open") as caught:
        BACKEND.open({"model.pte": program[: len(program) // 2]}, *rest)
    assert "\n" not in str(caught.value)
    newer = program[:4] + b"ET13" + program[8:]
    with pytest.raises(
        BackendError, match="of ExecuTorch's format ET13, this executorch reads ET12; upgrade"
    ):
        BACKEND.open({"model.pte": newer}, *rest)
    with pytest.raises(BackendError, match="the program has 1 inputs"):
        BACKEND.open(made.lowered.files, (), made.lowered.outputs, get("cpu"))


def test_other_targets(opened):
    with pytest.raises(BackendError, match="run on CPUs"):
        BACKEND.lower(graphprune.trace(nn.Linear(3, 2), torch.randn(1, 3)), get("cuda"))
    assert "run on CPUs" in BACKEND.unrunnable(get("cuda"))
    other = get("arm" if host_arch() == "x86_64" else "x86")
    assert BACKEND.unrunnable(other) is None
    made = opened(nn.Linear(3, 2), torch.randn(1, 3))
    assert other.arch in BACKEND.audit(made.lowered, other).notes[0]
    assert other.arch in BACKEND.unrunnable(Target("bound", other.arch, portable=False))


def test_for_arm_the_file_is_the_same_and_proved_here():
    model, x = convolutional(), torch.randn(1, 3, 16, 16)
    options: dict[str, Any] = {"backend": "executorch", "measure": False, "threads": 1}
    here, there = (graphprune.optimize(model, (x,), target=name, **options) for name in ("x86", "arm"))
    assert here.deployment.lowered.files == there.deployment.lowered.files
    assert there.report.certificates["artifact against original"].passed


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("name", ["tv_resnet18", "tv_mobilenet_v2", "hf_bert"])
def test_networks_are_proved(name):
    chosen = network(name)
    result = graphprune.optimize(
        chosen.build(), chosen.inputs(), example_kwargs=chosen.kwargs(), backend="executorch",
        measure=False, threads=1,
    )  # fmt: skip
    assert all(certificate.passed for certificate in result.report.certificates.values())
    audit = result.deployment.audit()
    assert set(audit.macs) == {"float32"}
    delegated = sum(row.macs for row in audit.rows if not row.reason)
    assert delegated >= 0.9 * sum(audit.macs.values())
