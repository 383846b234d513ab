"""The harness of the quantization benchmark: how it judges, and that a tool that fails is a row."""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from benchmarks.quantization import cases, goals, measure, methods, results, table
from benchmarks.quantization.accuracy import Score
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
