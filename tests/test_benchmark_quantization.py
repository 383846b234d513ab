"""The harness of the quantization benchmark: how it judges, and that a tool that fails is a row."""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

import graphprune
from benchmarks.pruning.training import Recipe
from benchmarks.quantization import cases, goals, measure, methods, pruned, qat, results, table
from benchmarks.quantization.accuracy import Score
from benchmarks.quantization.pruned import Proof, Pruned
from benchmarks.quantization.qat import Trained
from benchmarks.quantization.results import Results
from benchmarks.quantization.speed import AGAIN, PLAIN, Row
from graphprune.backend import Audit, AuditRow
from graphprune.measure import Ratio


def ratio(median: float, spread: float = 0.01) -> Ratio:
    return Ratio(median, median - spread, median + spread)


def row(tool: str, variant: str, to_float: float, to_ours: float, size: float = 0.26) -> Row:
    return Row("net", tool, variant, 1, 10 * to_float, ratio(to_float), ratio(to_ours), size, 1.0, 0, 0.02)


def speed(rival: float, noise: float = 1.0, size: float = 0.26) -> Results:
    """Ours, one static rival at so many times our latency, and a dynamic one that is twice as fast."""
    return Results(
        [
            row("", PLAIN, 1.0, 2.0, 1.0), row("graphprune", "int8", 0.5, 1.0, size),
            row("onnxruntime", "static", 0.5 * rival, rival), row("onnxruntime", "dynamic", 0.25, 0.5),
            row("openvino", "nncf int8", 0.1, 0.2), row("", AGAIN, noise, 2 * noise, 1.0),
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rival", "noise", "told"),
    [(1.2, 1.0, "yes"), (1.0, 1.0, "yes"), (0.9, 1.0, "**no**"), (0.95, 1.06, "within noise")],
)
def test_the_fastest_static_rival_on_the_same_runtime_decides(rival: float, noise: float, told: str) -> None:
    found = goals.verdict(speed(rival, noise), "net", 1)
    assert found[0] == told
    assert found[1].startswith(f"{rival:.2f} of onnxruntime, static")


def test_without_a_rival_nothing_is_claimed() -> None:
    alone = Results([r for r in speed(1.2).speed if r.tool in ("", "graphprune")])
    assert goals.verdict(alone, "net", 1) == ("–", "–")


def test_a_goal_that_is_missed_is_marked() -> None:
    assert "| file at most 0.27 of fp32 | 0.260 | yes |" in goals.goals(speed(1.2))
    assert "| file at most 0.27 of fp32 | 0.280 | **no** |" in goals.goals(speed(1.2, size=0.28))


@pytest.mark.parametrize(("lost", "met"), [(0.002, "yes"), (0.003, "**no**")])
def test_lost_points_are_the_median_of_seeds(lost: float, met: str) -> None:
    losses = [0.0, lost, 0.05]
    scores = [Score("vit", i, "graphprune", "int8", {"accuracy": 0.97}, by) for i, by in enumerate(losses)]
    line = goals.goals(Results([], scores)).splitlines()[-1]
    assert line.endswith(f"| {met} |")
    assert "worst +5.00" in line


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    failed = Row("net", "nncf", "default", failure="not installed here")
    scores = [Score("vit", 0, "", "float", {"accuracy": 0.97}, 0.0, 1.0)]
    whole = Results([*speed(1.2).speed, failed], scores, {"speed, net": "then"}, {"nncf": "3"})
    text = table.write(whole, {"host": "here"}, tmp_path).read_text()
    assert results.load(tmp_path / "quantization.json") == whole
    assert "fails: not installed here" in text
    assert "nncf: 3" in text


def test_a_network_that_is_run_again_loses_its_old_rows_alone() -> None:
    other = replace(speed(1.2).speed[0], network="other")
    whole = Results([*speed(1.2).speed, other], [], {"speed, net": "then", "speed, other": "then"})
    assert whole.without(["net"], []) == Results([other], [], {"speed, other": "then"})


def proof(kind: str, exact: bool = True, passed: bool = True, error: float = 1e-7) -> Proof:
    return Proof(f"of {kind}", kind, exact, passed, error)


PROVED = [
    proof("mask"),
    proof("runtime"),
    proof("runtime", error=2e-4),
    proof("end-to-end", False, error=0.04),
]
SMALLER = Pruned("vit", 0, "accuracy", 0.977, 0.974, 0.972, 0.49, 1.0, 0.14, PROVED, "change the order", 20.0)
TAUGHT = Trained("resnet20", 0, 3, "accuracy", 0.987, 0.976, 0.984, 0.983, 1.0, 4, 60.0)


def test_the_later_parts_are_written_read_and_replaced_alone(tmp_path: Path) -> None:
    failed = Pruned("resnet20", 0, "accuracy", 0.98, failure="PassError: cannot")
    diverged = replace(TAUGHT, seed=1, trained=None, failure="InputError: diverged")
    scores = [
        Score("vit", 0, "", "float", {"accuracy": 0.977}, 0.0, 1.0),
        Score("vit", 0, "graphprune", "int8", {"accuracy": 0.975}, 0.002, 0.28),
        Score("vit", 1, "graphprune", "int8", {"accuracy": 0.98}, 0.002, 0.28),
    ]
    when = {"accuracy, vit": "then", "pruned, vit": "then", "training, resnet20": "then"}
    whole = Results([], scores, when, {}, [SMALLER, failed], [TAUGHT, diverged])
    text = table.write(whole, {}, tmp_path).read_text()
    assert results.load(tmp_path / "quantization.json") == whole
    proved = "| holds, 1 of 1, 1e-07 | holds, 2 of 2, 2e-04 | recorded, 4e-02 |"
    assert (
        "| vit | 0 | accuracy | 97.70 | 97.50 | 97.40 | **97.20** | 49.0 % | 100.0 % | 0.140 " + proved
        in text
    )
    assert "| resnet20 | 0 | accuracy | 98.00 | fails: PassError: cannot |" in text
    assert "| resnet20 | 0 | 3 | 98.70 | 97.60 | 98.40 | **98.30** | +0.40 | 100.0 % | 4 | 60 |" in text
    assert "refused: `change the order`" in text
    rest = whole.without(pruned=["vit"], trained=["resnet20"])
    assert rest == Results([], scores, {"accuracy, vit": "then"}, {}, [failed], [])


def test_results_of_before_the_later_parts_are_read(tmp_path: Path) -> None:
    table.write(Results(speed(1.2).speed), {}, tmp_path)
    path = tmp_path / "quantization.json"
    data = json.loads(path.read_text())
    del data["pruned"], data["training"]
    path.write_text(json.dumps(data))
    assert results.load(path) == Results(speed(1.2).speed)


@pytest.mark.parametrize(
    ("change", "met"),
    [
        ({}, "yes"),
        ({"refusal": ""}, "**no**"),
        ({"proofs": []}, "**no**"),
        ({"proofs": PROVED[1:]}, "**no**"),
        ({"proofs": [replace(PROVED[0], exact=False), *PROVED[1:]]}, "**no**"),
        ({"proofs": [*PROVED[:2], replace(PROVED[2], passed=False)]}, "**no**"),
    ],
)
def test_both_certificates_and_the_order_are_what_counts(change: dict[str, object], met: str) -> None:
    found = Results(pruned=[replace(SMALLER, **change), SMALLER])  # type: ignore[arg-type]
    assert goals.goals(found).splitlines()[-1].endswith(f"| {met} |")


@pytest.mark.parametrize(("trained", "met"), [(0.982, "yes"), (0.981, "**no**"), (None, "**no**")])
def test_training_is_held_to_half_a_point(trained: float | None, met: str) -> None:
    found = Results(training=[replace(TAUGHT, trained=trained)])
    assert goals.goals(found).splitlines()[-1].endswith(f"| {met} |")


def test_a_report_gives_all_its_certificates() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.randn(64, 16)
    result = graphprune.optimize(model, x[:1], calibration=[x], macs=0.5, precision="int8", measure=False)
    found = pruned.proofs(result.report)
    assert {pruned.MASK, pruned.RUNTIME, pruned.ORIGINAL} <= {p.kind for p in found}
    assert Pruned("net", 0, proofs=found).proved


def test_one_that_is_pruned_after_quantizing_is_refused() -> None:
    assert "prune-channels" in pruned.refusal(cases.accuracy_case("crepe-tiny"))


def test_the_benchmarks_training_is_prepare_loop_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_batch(module: nn.Module, recipe: Recipe) -> None:
        optimizer = torch.optim.Adam(module.parameters(), lr=recipe.rate)
        module(torch.randn(8, 12)).square().sum().backward()
        optimizer.step()

    monkeypatch.setattr(qat, "fit", one_batch)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    case = cases.Case("net", lambda: model, lambda n: [(torch.randn(1, 12),) for _ in range(n)])
    graph = qat.trained(case, 3)
    integers = graph.tensors["0.weight.integers"]
    assert int(integers.abs().max()) <= 3


def test_a_share_is_not_rounded_to_all() -> None:
    assert [results.share(value) for value in (1.0, 0.9999, 0.985, None)] == [
        "100.0 %",
        "> 99.9 %",
        "98.5 %",
        "–",
    ]


def job(folder: Path) -> methods.Job:
    return methods.Job(cases.speed_case("bert-mini"), folder, folder / "float.onnx", folder / "c.npz")


def test_a_tool_that_is_not_installed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nncf = next(m for m in methods.INT8 if m.tool == "nncf")
    monkeypatch.delenv(methods.VARIABLE, raising=False)
    assert methods.VARIABLE in methods.make(nncf, job(tmp_path)).failure
    monkeypatch.setenv(methods.VARIABLE, str(tmp_path))
    made = methods.make(nncf, job(tmp_path))
    assert made.path is None
    assert "nncf/bin/python" in made.failure


def test_the_error_of_a_tool_is_its_result(tmp_path: Path) -> None:
    def quantize(job: methods.Job, path: Path) -> dict[str, str]:
        methods.called([sys.executable, "-c", "raise ValueError('no such scale')"], job.folder)
        return {}

    made = methods.make(methods.Method("tool", "", quantize), job(tmp_path))
    assert made.failure == "ValueError: no such scale"
    silent = methods.make(methods.Method("tool", "", lambda job, path: {}), job(tmp_path))
    assert silent.failure == "no file was written"


def test_tools_import_nothing_of_this_project() -> None:
    for path in methods.TOOLS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.startswith(("benchmarks", "graphprune", "tests"))], path.name


def test_held_out_inputs_are_others() -> None:
    case = cases.speed_case("bert-mini")
    seen, held_out = case.parts()
    assert (len(seen), len(held_out)) == (case.calibration, cases.HELD_OUT)
    assert not any(torch.equal(a[0], b[0]) for a in seen for b in held_out)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(seen, case.samples(len(seen)), strict=True))


def test_shares_of_multiply_accumulates_come_from_the_audit() -> None:
    rows = (AuditRow("a", "QLinearConv", "int8", 30), AuditRow("b", "Conv", "float32", 10))
    assert measure.in_integers(Audit(rows)) == 0.75
    assert measure.in_integers(Audit(())) is None


def test_files_of_one_sample_are_scored_in_batches(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 3]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    path = tmp_path / "m.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    batch = torch.randn(5, 3)
    assert torch.equal(measure.network(path)(batch), batch.relu())
    inputs = measure.arrays([(sample,) for sample in batch.split(1)], path, tmp_path / "in.npz")
    (found,) = measure.outputs(path, inputs)
    np.testing.assert_array_equal(found, batch.relu().numpy())
    assert measure.size(path) == path.stat().st_size
