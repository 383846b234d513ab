"""Choosing among backends: by what was measured, and never by dropping one without a word."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from graphprune.backends.onnxruntime import OnnxRuntime
from torch import nn

import graphprune
from graphprune import registry
from graphprune.choice import fastest
from graphprune.errors import BackendError, InputError, RecipeError
from graphprune.integers import ONNX_RUNTIME, Scheme
from graphprune.lowering import candidates, deploy, fitted
from graphprune.measure import Timing
from graphprune.target import get
from tests.passes.quantizing import images

CPU = get("cpu")


class Slow(OnnxRuntime):
    """Takes 20 ms longer."""

    name: ClassVar[str] = "slow"

    def open(self, *args: Any, **kwargs: Any) -> Any:
        runner = super().open(*args, **kwargs)

        def run(*inputs: torch.Tensor) -> Any:
            time.sleep(0.02)
            return runner(*inputs)

        return run


class Missing(OnnxRuntime):
    name: ClassVar[str] = "missing"

    def unrunnable(self, target: Any) -> str | None:
        return "the runtime is not installed: pip install runtime"

    def lower(self, graph: Any, target: Any) -> Any:
        raise AssertionError("lowered although it cannot run")


class Broken(OnnxRuntime):
    """Fails as nobody meant it to; ``when`` says where."""

    name: ClassVar[str] = "broken"
    when: ClassVar[str] = "lower"
    opened: ClassVar[int] = 0

    def unrunnable(self, target: Any) -> str | None:
        if self.when == "unrunnable":
            raise OSError("libruntime.so: cannot open shared object file\nsecond line")
        return super().unrunnable(target)

    def lower(self, graph: Any, target: Any) -> Any:
        if self.when == "lower":
            raise RuntimeError("no kernel\nsecond line")
        return super().lower(graph, target)

    def open(self, *args: Any, **kwargs: Any) -> Any:
        Broken.opened += 1
        if self.when == "again" and self.opened > 1:
            raise MemoryError
        return super().open(*args, **kwargs)


class Products(OnnxRuntime):
    """Leaves products of two activations in float."""

    name: ClassVar[str] = "products"
    integers: ClassVar[Scheme | None] = replace(ONNX_RUNTIME, inputs=frozenset({"linear"}))


@pytest.fixture(autouse=True)
def _backends(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {c.name: f"{__name__}:{c.__name__}" for c in (Slow, Missing, Broken, Products)}
    own["unloaded"] = "tests.no_such_module:Backend"
    entries: Mapping[str, str] = {"onnxruntime": registry.backends.builtin["onnxruntime"], **own}
    monkeypatch.setitem(registry.backends.__dict__, "entries", entries)


def timing(*samples: float) -> Timing:
    ordered = sorted(samples)
    return Timing(ordered[len(ordered) // 2], ordered[0], ordered[-1], len(samples), 1, samples)


def chosen(**samples: list[float]) -> tuple[str, list[str]]:
    """The name that is chosen among backends that took these milliseconds, and all in the order shown."""

    timings = {name: timing(*values) for name, values in samples.items()}
    shown = fastest(dict.fromkeys(samples, lambda: list), measure=lambda openers, **options: timings)
    (taken,) = (one.backend for one in shown if one.chosen)
    return taken, [one.backend for one in shown]


def test_the_fastest_is_taken() -> None:
    assert chosen(a=[5, 5, 5, 5], b=[3, 3, 3, 3], c=[4, 4, 4, 4]) == ("b", ["b", "c", "a"])


def test_the_first_stays_within_the_spread() -> None:
    assert chosen(a=[5, 5, 5, 5], b=[4, 6, 4, 6.1])[0] == "a"
    assert chosen(a=[5, 5, 5, 5], b=[4, 4.5, 4, 4.9])[0] == "b"
    # Level with the fastest, though not the fastest: the order of the candidates decides.
    assert chosen(a=[9, 9, 9, 9], b=[5, 5, 5, 5], c=[4.9, 5.1, 4.9, 5.2])[0] == "b"


def test_the_first_goes_where_it_is_much_slower_though_the_spread_is_wide() -> None:
    assert chosen(a=[5, 5, 5, 5], b=[5.1, 4.5, 4.5, 4.6])[0] == "b"


def test_what_the_noise_hides_is_measured_again_and_the_rest_is_not() -> None:
    generator = random.Random(0)
    asked: list[list[str]] = []

    def measure(openers: Mapping[str, Any], *, rounds: int, **options: Any) -> dict[str, Timing]:
        asked.append(list(openers))
        length = {"default": 5.0, "faster": 4.8, "slow": 50.0}
        return {
            name: timing(*(length[name] * generator.uniform(0.5, 1.5) for _ in range(rounds)))
            for name in openers
        }

    shown = fastest(dict.fromkeys(("default", "faster", "slow"), lambda: list), measure=measure, rounds=20)
    assert shown[2].backend == "slow"
    assert len(asked) > 2
    assert asked[0] == ["default", "faster", "slow"]
    assert all(sorted(names) == ["default", "faster"] for names in asked[1:])
    assert [one.timing.rounds for one in shown] == [10 * len(asked), 10 * len(asked), 10]
    assert shown[2].to_chosen.median > 5


def test_the_first_stays_where_it_is_not_certain_that_it_is_slower() -> None:
    noisy = [3.0, 7.0, 3.2, 6.5]
    assert chosen(a=noisy, b=[value * 0.93 for value in reversed(noisy)])[0] == "a"


def test_quiet_candidates_are_measured_once() -> None:
    calls = []

    def measure(openers: Mapping[str, Any], **options: Any) -> dict[str, Timing]:
        calls.append(1)
        return {"a": timing(5, 5.05, 5, 5), "b": timing(4, 4.04, 4, 4)}

    fastest(dict.fromkeys("ab", lambda: list), measure=measure)
    assert len(calls) == 1


def test_who_is_measured_no_more_is_compared_on_the_turns_it_took() -> None:
    """The host is twice as slow from the second sitting on; who left before it looks fast only."""
    generator, sittings = random.Random(0), []

    def measure(openers: Mapping[str, Any], *, rounds: int, **options: Any) -> dict[str, Timing]:
        sittings.append(list(openers))
        slow = 1 if len(sittings) == 1 else 2
        length = {"default": 5.35, "fastest": 5.0, "left": 7.0}
        return {
            name: timing(*(slow * length[name] * generator.uniform(0.95, 1.05) for _ in range(rounds)))
            for name in openers
        }

    shown = fastest(dict.fromkeys(("default", "fastest", "left"), lambda: list), measure=measure, rounds=20)
    assert sorted(sittings[-1]) == ["default", "fastest"]
    assert [one.backend for one in shown] == ["fastest", "default", "left"]
    assert shown[0].chosen
    assert shown[2].to_chosen.median == pytest.approx(1.4, rel=0.1)


def test_a_few_turns_are_not_certain() -> None:
    lengths = {"a": iter([5.0, 4.0, 5.0, 4.0, 5.0, 4.0]), "b": iter([4.0, 5.0, 4.0, 5.0, 4.0, 5.0])}

    def measure(openers: Mapping[str, Any], *, rounds: int, **options: Any) -> dict[str, Timing]:
        return {name: timing(*(next(lengths[name]) for _ in range(rounds))) for name in openers}

    shown = fastest(dict.fromkeys("ab", lambda: list), measure=measure, rounds=2)
    assert [one.timing.rounds for one in shown] == [6, 6]
    assert next(one.backend for one in shown if one.chosen) == "a"


@pytest.mark.parametrize("rounds", [0, -1])
def test_no_rounds_are_an_error(rounds: int) -> None:
    with pytest.raises(InputError, match="rounds"):
        fastest({"a": lambda: list}, rounds=rounds)


def test_auto_means_all_only_where_they_are_measured() -> None:
    assert [b.name for b in candidates("auto", CPU)] == ["onnxruntime"]
    assert [b.name for b in candidates("auto", CPU, several=True)] == [
        "onnxruntime", "slow", "missing", "broken", "products", "unloaded"
    ]  # fmt: skip
    assert [b.name for b in candidates("slow, onnxruntime,slow", CPU)] == ["slow", "onnxruntime"]


def test_optimize_measures_and_says_what_it_took() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), torch.randn(2, 8)
    report = graphprune.optimize(model, x, backend="slow,missing,onnxruntime", rounds=4, threads=1).report
    assert report.backend == "onnxruntime"
    assert [(c.backend, c.chosen) for c in report.contestants] == [("onnxruntime", True), ("slow", False)]
    assert report.contestants[1].to_chosen.median > 2
    assert [n for n in report.notes if "missing" in n] == [
        "backend 'missing' was not tried: the runtime is not installed: pip install runtime"
    ]
    assert "taken" in str(report)
    assert report.to_json()["contestants"][0]["backend"] == "onnxruntime"


def test_without_measuring_the_first_that_works_is_taken() -> None:
    model, x = nn.Linear(8, 8).eval(), torch.randn(2, 8)
    report = graphprune.optimize(model, x, measure=False, backend="missing,slow,onnxruntime").report
    assert report.backend == "slow"
    assert report.contestants == ()
    said = "backend 'missing,slow,onnxruntime' is slow: measure=False, so none was measured here"
    assert said in report.notes
    alone = graphprune.optimize(model, x, measure=False, backend="onnxruntime").report
    assert not any("none was measured" in note for note in alone.notes)


@pytest.mark.parametrize(
    ("when", "words"),
    [
        ("unrunnable", "was not tried: OSError: libruntime.so: cannot open shared object file (a defect"),
        ("lower", "was not taken: RuntimeError: no kernel (a defect of the backend or of its runtime)"),
        ("again", "was not taken: opened again to be measured, MemoryError (a defect"),
    ],
)
def test_whatever_is_wrong_with_one_the_others_go_on(
    when: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broken, "when", when)
    monkeypatch.setattr(Broken, "opened", 0)
    model, x = nn.Linear(8, 8).eval(), torch.randn(2, 8)
    report = graphprune.optimize(model, x, backend="broken,onnxruntime", rounds=4, threads=1).report
    assert report.backend == "onnxruntime"
    (note,) = [note for note in report.notes if "broken" in note]
    assert note.startswith(f"backend 'broken' {words}")


def test_a_backend_that_does_not_load_is_an_error_only_alone() -> None:
    model, x = nn.Linear(8, 8).eval(), torch.randn(2, 8)
    report = graphprune.optimize(model, x, backend="unloaded,onnxruntime", measure=False).report
    assert report.backend == "onnxruntime"
    assert any("backend 'unloaded' does not load from tests.no_such_module" in note for note in report.notes)
    with pytest.raises(RecipeError, match="'unloaded' does not load"):
        graphprune.optimize(model, x, backend="unloaded", measure=False)
    with pytest.raises(RecipeError, match="unknown backend 'onxruntime'"):
        graphprune.optimize(model, x, backend="unloaded,onxruntime", measure=False)


def test_another_architecture_gets_the_default_and_a_line() -> None:
    other = next(name for name in ("arm", "x86") if not get(name).runs_here)
    report = graphprune.optimize(nn.Linear(8, 8).eval(), torch.randn(2, 8), target=other).report
    assert report.backend == "onnxruntime"
    assert any("none was measured here" in note for note in report.notes)


def test_none_that_works_is_an_error_with_every_reason() -> None:
    entries = registry.backends.entries | {"gone": f"{__name__}:Missing"}
    registry.backends.__dict__["entries"] = entries
    with pytest.raises(
        BackendError, match=r"'missing' was not tried: the runtime is not.*; .*'missing' was not"
    ):
        graphprune.optimize(nn.Linear(8, 8).eval(), torch.randn(2, 8), backend="missing,gone")


class Attends(nn.Module):
    """A product of two activations among linears."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return self.outer(torch.softmax(y @ y.transpose(-1, -2), -1) @ y)


def test_each_backend_gets_the_integers_that_it_computes() -> None:
    torch.manual_seed(0)
    model, data = Attends().eval(), [torch.randn(1, 6, 16) for _ in range(8)]
    notes: dict[str, Any] = {}
    for backend in ("onnxruntime", "products"):
        report = graphprune.optimize(
            model, data[0], precision="int8", calibration=data, backend=backend, measure=False
        ).report
        assert report.audit is not None
        notes[backend] = report.audit.integers
    assert notes["onnxruntime"] == 1.0
    assert 0 < notes["products"] < 1.0


def test_passes_run_once_for_backends_alike(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    data, lines = images(4, 3, 8, 8), []  # type: ignore[var-annotated]
    options: dict[str, Any] = {"precision": "int8", "calibration": data, "measure": False}
    graphprune.optimize(model, data[0], backend="slow,products", progress=lines.append, **options)
    assert lines.count("pass quantize") == 1, "without a product of activations both quantize alike"
    lines.clear()
    data = [torch.randn(1, 6, 16) for _ in range(4)]
    options["calibration"] = data
    result = graphprune.optimize(
        Attends().eval(), data[0], backend="slow,products", progress=lines.append, dump=tmp_path, **options
    )
    assert lines.count("pass quantize") == 2
    assert lines.count("pass fold-batch-norm") == 1
    assert len(result.report.passes) == 7, "the records of the other backend's passes stay out"
    assert {p.name for p in tmp_path.iterdir()} >= {"07-quantize.txt", "products"}
    assert [p.name for p in (tmp_path / "products").iterdir()] == ["07-quantize.txt"]


def test_a_targets_own_integers_stay() -> None:
    mine = replace(CPU, integers=replace(ONNX_RUNTIME, whole=frozenset()))
    assert fitted(mine, Products()) is mine
    assert fitted(CPU, Products()).integers == Products.integers
    assert fitted(CPU, OnnxRuntime()) == CPU


def test_deploy_notes_what_cannot_run_here() -> None:
    graph = graphprune.trace(nn.Linear(2, 2), torch.randn(1, 2))

    class Elsewhere(OnnxRuntime):
        def unrunnable(self, target: Any) -> str | None:
            return "it is machine code"

    made = deploy(graph, CPU, Elsewhere(), calls={})
    assert made.runner is None
    assert made.notes == ("artifact not run here: it is machine code",)
