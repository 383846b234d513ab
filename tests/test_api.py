"""``optimize`` end to end: lossless by default, proved, measured where that means something, and harmless."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from graphprune.backends.onnxruntime import OnnxRuntime
from torch import nn

import graphprune
from graphprune import registry
from graphprune.errors import BackendError, InputError, PassError, RecipeError, TargetError, VerificationError
from graphprune.pipeline import Context, Pass, PassResult, Pipeline


class Net(nn.Module):
    """Convolution, batch norm with statistics that matter, dropout, and a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert variance is not None
        nn.init.normal_(mean)
        nn.init.uniform_(variance, 0.5, 2.0)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def fast(model: Any, *args: Any, **options: Any) -> graphprune.Result:
    return graphprune.optimize(model, *args, **{"measure": False, **options})


@pytest.fixture(scope="module")
def shared() -> tuple[Net, graphprune.Result]:
    """One model and its result, for tests that only read them."""
    torch.manual_seed(0)
    model = Net().eval()
    return model, fast(model, torch.randn(1, 3, 8, 8))


def test_the_default_is_lossless_and_proved(shared: tuple[Net, graphprune.Result]) -> None:
    model, result = shared
    other = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(result(other), model(other))
    report = result.report
    assert [p.text.partition("{")[0] for p in report.passes] == [
        "clean-up", "fold-constants", "remove-dropout", "fold-parameters", "fold-batch-norm", "clean-up",
    ]  # fmt: skip
    assert set(report.certificates) == {
        "capture against original", "artifact against graph", "artifact against original",
    }  # fmt: skip
    assert all(c.passed and c.exact for c in report.certificates.values())
    assert all(p.certificate is not None for p in report.passes if p.changed)
    assert report.final.nodes < report.original.nodes
    assert report.audit is not None
    assert sum(row[2] for row in report.audit.operators) == len(result.audit().rows) > 0
    assert report.latency.reason == "not measured: measure=False"
    assert report.example_source == "given"


def test_the_model_is_left_as_it_was(model: Net, x: torch.Tensor) -> None:
    model.train()
    model.norm.eval()
    model.head.weight.requires_grad_(False)
    calls: list[int] = []
    model.conv.register_forward_hook(lambda *_: calls.append(1))
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    graphprune.optimize(model, x, rounds=1, backend="onnxruntime")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [
        p is not model.head.weight for p in model.parameters()
    ]
    assert len(model.conv._forward_hooks) == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert not hasattr(model, "graph")


def test_training_the_model_later_leaves_the_result_alone(model: Net, x: torch.Tensor) -> None:
    result = fast(model, x)
    before, module_before = result.graph.run(x)[0], result.module(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(result.graph.run(x)[0], before, rtol=0, atol=0)
    torch.testing.assert_close(result.module(x), module_before, rtol=0, atol=0)


def test_the_module_trains_and_comes_back(model: Net, x: torch.Tensor) -> None:
    module = fast(model, x).module
    assert not module.training
    torch.testing.assert_close(module(x), model(x))
    kinds = [str(n.target) for n in module.graph.nodes]
    assert "aten.batch_norm.default" in kinds
    assert "aten.dropout.default" in kinds
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.randn(4, 3, 8, 8)[:1].repeat(1, 1, 1, 1)).square().sum().backward()
    optimizer.step()
    module.eval()
    again = fast(module)
    assert again.report.example_source == "those of the earlier result"
    torch.testing.assert_close(again(x), module(x), rtol=1e-4, atol=1e-5)
    assert (again(x) - model(x)).abs().max() > 1e-4


def test_dynamic_batch_is_proved_at_one_and_seven(model: Net, x: torch.Tensor) -> None:
    result = fast(model, x, dynamic_batch=True)
    for title in ("capture against original", "artifact against graph", "artifact against original"):
        assert {f"{title}, batch 1", f"{title}, batch 7"} <= set(result.report.certificates)
    for size in (1, 2, 5):
        batch = torch.randn(size, 3, 8, 8)
        torch.testing.assert_close(result(batch), model(batch), rtol=1e-4, atol=1e-5)


def test_examples_are_inferred_and_the_report_says_how(model: Net) -> None:
    assert "inferred: [1, 3, 224, 224] float32, from layer 'conv'" in fast(model).report.example_source


def test_latency_is_measured_in_turn(model: Net, x: torch.Tensor) -> None:
    threads = torch.get_num_threads()
    latency = graphprune.optimize(model, x, rounds=3, threads=1, backend="onnxruntime").report.latency
    assert latency.original is not None
    assert latency.artifact is not None
    assert latency.original.rounds == latency.artifact.rounds == 3
    assert latency.original.threads == 1
    assert latency.speedup is not None
    assert torch.get_num_threads() == threads


def test_another_architecture_is_built_not_measured(model: Net, x: torch.Tensor) -> None:
    foreign = "arm" if graphprune.Target("here", "x86_64").runs_here else "x86"
    report = graphprune.optimize(model, x, target=foreign).report
    assert report.latency.artifact is None
    assert report.latency.reason.startswith(f"built, not measured: target '{foreign}'")
    assert "artifact against original" in report.certificates


def test_a_target_that_cannot_run_here(model: Net, x: torch.Tensor, tmp_path: Path) -> None:
    foreign = "aarch64" if graphprune.Target("here", "x86_64").runs_here else "x86_64"
    result = graphprune.optimize(model, x, target=graphprune.Target("board", foreign, portable=False))
    with pytest.raises(BackendError, match=r"'board' cannot run here .*result\.module still runs"):
        result(x)
    with pytest.raises(BackendError, match="cannot be audited here"):
        result.audit()
    assert set(result.report.certificates) == {"capture against original", "graph against original"}
    assert result.report.audit is None
    assert any("artifact not run here" in note for note in result.report.notes)
    assert result.report.latency.reason.startswith("built, not measured")
    torch.testing.assert_close(result.module(x), model(x))
    assert result.save(tmp_path / "build").is_dir()


def test_save_and_load(shared: tuple[Net, graphprune.Result], x: torch.Tensor, tmp_path: Path) -> None:
    model, result = shared
    directory = result.save(tmp_path / "build")
    torch.testing.assert_close(graphprune.load(directory)(x), model(x))
    assert {p.name for p in directory.iterdir()} >= {"model.onnx", "manifest.json", "report.html"}
    assert "Net" in (directory / "report.html").read_text()
    loaded = graphprune.load(directory)
    assert loaded.manifest["metrics"]["final"]["nodes"] == result.report.final.nodes
    assert loaded.manifest["pipeline"] == result.report.pipeline


def test_same_input_same_bytes(shared: tuple[Net, graphprune.Result], tmp_path: Path) -> None:
    model, result = shared
    first = result.save(tmp_path / "one")
    second = fast(model, *result.graph.examples).save(tmp_path / "two")
    for name in ("model.onnx", "manifest.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_progress_and_dump_name_every_stage(model: Net, x: torch.Tensor, tmp_path: Path) -> None:
    lines: list[str] = []
    graphprune.optimize(
        model, x, progress=lines.append, rounds=1, backend="onnxruntime", dump=tmp_path / "stages"
    )
    assert lines[0] == "capture"
    assert "pass fold-batch-norm" in lines
    assert lines[-2:] == ["lower with onnxruntime", "measure latency"]
    names = sorted(p.name for p in (tmp_path / "stages").iterdir())
    assert names[0] == "00-captured.txt"
    assert names[-1] == "06-clean-up.txt"


@dataclass(frozen=True)
class Scale(Pass):
    """Doubles the last bias: a mistake when it claims to be exact."""

    name: ClassVar[str] = "scale"
    exact: ClassVar[bool] = True

    def run(self, graph: graphprune.Graph, context: Context) -> PassResult:
        """Rewrite a copy."""
        changed = graph.copy()
        changed.set_tensor("head.bias", graph.tensors["head.bias"] * 2)
        return PassResult(changed, True)


class Approximate(Scale):
    exact: ClassVar[bool] = False


def test_a_pass_that_lies_is_caught(model: Net, x: torch.Tensor) -> None:
    with pytest.raises(VerificationError, match="pass 'scale' changed the network's outputs: relative error"):
        fast(model, x, pipeline=Pipeline((Scale(),)))


def test_an_approximate_pass_is_recorded(model: Net, x: torch.Tensor) -> None:
    report = fast(model, x, pipeline=Pipeline((Approximate(),))).report
    end = report.certificates["artifact against original"]
    assert end.passed
    assert not end.exact
    assert end.max_relative > 1e-3
    assert report.passes[0].certificate is not None
    assert not report.passes[0].certificate.exact


def test_a_comparison_of_zeros_is_not_sold_as_a_proof(model: Net, x: torch.Tensor) -> None:
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    notes = fast(model, x).report.notes
    assert "output 0 is zero everywhere on the example inputs, so comparing it proves nothing" in notes


def test_verification_switched_off_is_said(model: Net, x: torch.Tensor) -> None:
    report = fast(model, x, pipeline=Pipeline((Scale(),)), verify=False).report
    assert report.certificates == {}
    assert "nothing here is proved" in str(report)
    assert "not verified" in str(report)


class Wrong(OnnxRuntime):
    """A runtime whose answers are off by a thousandth."""

    name: ClassVar[str] = "wrong"

    def open(self, *args: Any, **kwargs: Any) -> Any:
        runner = super().open(*args, **kwargs)
        return lambda *inputs: tuple(o * 1.001 for o in runner(*inputs))


class Unable(OnnxRuntime):
    name: ClassVar[str] = "unable"

    def lower(self, graph: Any, target: Any) -> Any:
        raise BackendError("cannot lower the node 'conv2d'")


@pytest.fixture
def extra_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    entries: Mapping[str, str] = {
        **registry.backends.entries, "wrong": f"{__name__}:Wrong", "unable": f"{__name__}:Unable",
    }  # fmt: skip
    monkeypatch.setitem(registry.backends.__dict__, "entries", entries)


@pytest.mark.usefixtures("extra_backends")
def test_a_runtime_that_is_off_is_caught(model: Net, x: torch.Tensor) -> None:
    with pytest.raises(VerificationError, match="the wrong artifact does not reproduce its graph"):
        fast(model, x, backend="wrong")


@pytest.mark.usefixtures("extra_backends")
def test_a_backend_that_cannot_is_an_error(model: Net, x: torch.Tensor) -> None:
    with pytest.raises(BackendError, match="conv2d"):
        fast(model, x, backend="unable")


@pytest.mark.usefixtures("extra_backends")
def test_candidates_that_fail_are_noted(model: Net, x: torch.Tensor) -> None:
    result = fast(model, x, backend="unable,wrong,onnxruntime")
    assert result.report.backend == "onnxruntime"
    assert len([n for n in result.report.notes if "was not taken" in n]) == 2
    with pytest.raises(BackendError, match=r"'unable' was not taken.*'wrong' was not taken"):
        fast(model, x, backend="unable,wrong")


def test_an_exported_program(model: Net, x: torch.Tensor) -> None:
    program = torch.export.export(model, (x,), strict=False)
    result = fast(program)
    torch.testing.assert_close(result(x), model(x))
    with pytest.raises(InputError, match="carries its example inputs"):
        fast(program, x)
    with pytest.raises(InputError, match="fixed shapes"):
        fast(program, dynamic_batch=True)


def test_a_model_that_draws_random_numbers_says_so(x: torch.Tensor) -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x, 0.5, training=True)

    with pytest.raises(VerificationError, match=r"draws random numbers.*verify=False"):
        fast(Noisy(), x)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target": "x68"}, TargetError, "did you mean 'x86'"),
        ({"backend": "onxruntime"}, RecipeError, "did you mean 'onnxruntime'"),
        ({"backend": "auto, tvm"}, RecipeError, "auto means all that are installed, and stands alone"),
        ({"pipeline": "fold-batchnorm"}, RecipeError, "did you mean 'fold-batch-norm'"),
        ({"threads": 0}, InputError, "threads"),
    ],
)
def test_wrong_options(
    model: Net, x: torch.Tensor, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        fast(model, x, **options)


def test_an_impossible_order_is_refused_before_capture(model: Net) -> None:
    @dataclass(frozen=True)
    class Needy(Pass):
        name: ClassVar[str] = "needy"
        requires: ClassVar[frozenset[str]] = frozenset({"quantized"})

    lines: list[str] = []
    with pytest.raises(PassError, match="needs quantized"):
        fast(model, pipeline=Pipeline((Needy(),)), progress=lines.append)
    assert lines == []


def test_the_result_is_frozen(shared: tuple[Net, graphprune.Result]) -> None:
    _, result = shared
    with pytest.raises(AttributeError):
        result.report = replace(result.report, model="other")  # type: ignore[misc]
