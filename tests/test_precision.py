"""``optimize`` in integers: precision, bounds, pruning before, and what the runtime may not do silently."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune.backend import Audit, AuditRow
from graphprune.building import in_integers
from graphprune.errors import BackendError, InputError, PassError, VerificationError
from graphprune.lowering import deploy
from graphprune.measure import Ratio
from graphprune.measured import slower_in_integers
from graphprune.pipeline import Context
from graphprune.precision import suffix
from graphprune.registry import backends, passes
from graphprune.report.values import Latency
from graphprune.rounding import allow_rounding
from graphprune.verify import compare
from tests.passes.quantizing import CPU, Residual, images, lossless, run

DATA = images(4, 3, 16, 16)


def optimized(**options: Any) -> graphprune.Result:
    torch.manual_seed(0)
    model = Residual(channels=32).eval()
    settings: dict[str, Any] = {"calibration": DATA, "dynamic_batch": True, "measure": False, **options}
    return graphprune.optimize(model, DATA[0], **settings)


def test_int8_end_to_end(tmp_path: Path) -> None:
    result = optimized(precision="int8")
    assert result.report.audit is not None
    assert result.report.audit.integers == 1.0
    assert "100.0% of the MACs in integers" in str(result.report)
    assert all(certificate.passed for certificate in result.report.certificates.values())
    assert result.report.passes[-1].text.startswith(("quantize", "correct-bias"))
    x = images(7, 3, 16, 16, seed=4, count=1)[0]
    result.save(tmp_path / "built")
    loaded = graphprune.load(tmp_path / "built")
    assert torch.equal(loaded(x), result(x))
    with torch.no_grad():
        exact = result.module(x)
    assert float((result(x) - exact).norm() / exact.norm()) < 0.05


def test_what_trains_is_the_float_network() -> None:
    result = optimized(precision="int8")
    assert all(p.is_floating_point() for p in result.module.parameters())


def test_bfloat16_around_integers_where_the_runtime_has_it(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True).eval()
    data = [torch.randn(2, 16, 32) for _ in range(4)]
    found = {}
    for precision in ("int8", "int8+bfloat16"):
        options: dict[str, Any] = {"precision": precision, "measure": False, "threads": 1}
        result = graphprune.optimize(model, data[0], calibration=data, backend="openvino", **options)
        found[precision] = {row.precision for row in result.audit().rows}
        assert result.report.audit is not None
        assert result.report.audit.integers > 0.5
        assert all(certificate.passed for certificate in result.report.certificates.values())
    assert "bfloat16" not in found["int8"]
    if torch.cpu.get_capabilities().get("avx512_bf16", False):
        assert "bfloat16" in found["int8+bfloat16"]
    else:
        assert any("no bfloat16" in note for note in result.report.notes)
    loaded = graphprune.load(result.save(tmp_path / "built"), threads=1)
    assert torch.equal(loaded(data[1]), result(data[1]))


def test_a_runtime_without_bfloat16_says_so() -> None:
    plain, allowed = (optimized(precision=name) for name in ("int8", "int8+bfloat16"))
    assert [n for n in allowed.report.notes if n not in plain.report.notes] == [
        "bfloat16 was allowed around the integers, and onnxruntime computes in float32"
    ]
    assert torch.equal(plain(DATA[0]), allowed(DATA[0]))


@pytest.mark.parametrize("precision", ["float16+bfloat16", "bfloat16+bfloat16", "+bfloat16", "int8+float16"])
def test_bfloat16_goes_around_integers_alone(precision: str) -> None:
    with pytest.raises(
        InputError, match=r"unknown precision .*; known: .*\+bfloat16 behind one with integers"
    ):
        suffix(precision)


def test_pruned_and_then_quantized_keeps_both_certificates() -> None:
    result = optimized(macs=0.5, precision="int8")
    names = [record.text.partition("{")[0] for record in result.report.passes]
    assert names.index("prune-channels") < names.index("repair") < names.index("quantize")
    pruned = next(r for r in result.report.passes if r.text.startswith("prune-channels"))
    assert pruned.mask is not None
    assert pruned.mask.passed
    assert all(
        c.passed for t, c in result.report.certificates.items() if t.startswith("artifact against graph")
    )
    assert result.report.final.macs <= 0.5 * result.report.original.macs
    assert result.report.audit is not None
    assert result.report.audit.integers == 1.0


def test_a_bound_on_the_score(tmp_path: Path) -> None:
    x = torch.cat(DATA)
    torch.manual_seed(0)
    wanted = Residual(channels=32).eval()(x).detach()

    def evaluate(module: Any) -> float:
        with torch.no_grad():
            return 1.0 - float((module(x) - wanted).norm() / wanted.norm())

    result = optimized(max_drop=0.5, evaluate=evaluate)
    assert any(record.text.startswith("mixed-precision{") for record in result.report.passes)
    assert evaluate(result) >= 0.5
    (ranking,) = result.report.passes[-1].rankings
    page, text = result.report.html, str(result.report)
    assert page.count('<div style="width: ') == len(ranking.rows)
    assert '<div style="width: 100.0%"></div>' in page
    assert all(f"{row.value:.1f}" in page and row.name in text for row in ranking.rows)
    result.save(tmp_path / "built")
    manifest = json.loads((tmp_path / "built" / "manifest.json").read_text())
    saved = manifest["metrics"]["passes"][-1]["rankings"]
    assert [row["name"] for row in saved[0]["rows"]] == [row.name for row in ranking.rows]
    assert page == (tmp_path / "built" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"precision": "int3"}, InputError, "unknown precision 'int3'.*did you mean 'int8'"),
        ({"precision": "int8", "pipeline": "clean-up"}, InputError, "both a pipeline and a precision"),
        ({"precision": "int8", "calibration": None}, PassError, "needs calibration inputs"),
        ({"max_drop": 0.01}, PassError, "measured with `evaluate`"),
        ({"max_drop": 2.0}, InputError, "a share of what `evaluate` gives"),
        ({"max_drop": 0.1, "precision": "int4-weights"}, InputError, "under int8, not under int4-weights"),
        ({"precision": "int8", "target": "cuda"}, PassError, "nothing is known of integers"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        optimized(**options)


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "int8-weights", "int4-weights"])
def test_every_precision_makes_the_file_smaller(precision: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    data = [torch.randn(8, 64) for _ in range(4)]
    plain = graphprune.optimize(model, data[0], measure=False)
    small = graphprune.optimize(model, data[0], calibration=data, precision=precision, measure=False)
    assert sum(small.report.files.values()) < 0.4 * sum(plain.report.files.values())
    assert suffix(precision).split(",")[-1].partition("{")[0] in small.report.pipeline


def test_integers_are_timed_beside_float() -> None:
    result = optimized(precision="int8", measure=True, rounds=3, backend="onnxruntime")
    timing = result.report.latency
    assert timing.gain is not None
    assert timing.unrounded is not None
    assert "times as fast as in float" in str(result.report)
    assert "samples" not in result.report.latency.to_json()["unrounded"]
    assert optimized(measure=True, rounds=3, backend="onnxruntime").report.latency.gain is None


def test_integers_that_cost_time_are_named() -> None:
    faster, noise, slower = Ratio(1.4, 1.2, 1.6), Ratio(0.95, 0.8, 1.1), Ratio(0.5, 0.4, 0.6)
    assert not slower_in_integers(Latency())
    assert not any(slower_in_integers(Latency(gain=gain)) for gain in (faster, noise))
    (line,) = slower_in_integers(Latency(gain=slower))
    assert "2.00 times as long" in line


def test_a_transposed_convolution_is_not_what_was_asked_in_integers() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(32, 16, 4), nn.ReLU())
    result = graphprune.optimize(
        model.eval(), DATA[0], calibration=DATA, dynamic_batch=True, precision="int8", measure=False
    )
    assert result.report.audit is not None
    ((_, kind, precision, why),) = result.report.audit.fallbacks
    assert (kind, precision) == ("ConvTranspose", "float32")
    assert "no integer ConvTranspose" in why


def test_what_falls_back_to_float_is_an_error() -> None:
    rows = (
        AuditRow("conv", "Conv", "float32", 9, "in float: not fused", fell_back=True),
        AuditRow("add", "Add", "float32"),
    )
    with pytest.raises(BackendError, match=r"conv \(Conv\) in float: not fused.*allow_float=True"):
        in_integers(Audit(rows), allowed=False)
    in_integers(Audit(rows), allowed=True)
    in_integers(Audit(rows[1:]), allowed=False)
    in_integers(None, allowed=False)


def test_steps_are_allowed_and_mistakes_are_not() -> None:
    """The certificate of a quantized artifact: off like the graph itself, and no more."""
    graph = run("quantize", lossless(Residual(), torch.randn(1, 3, 16, 16)), images(1, 3, 16, 16)).graph
    assert graph.floating is not None
    call = images(1, 3, 16, 16, seed=8, count=1)
    mine, truth = graph.run(*call), graph.floating.run(*call)
    own = float((mine[0] - truth[0]).norm())
    direction = torch.randn_like(mine[0])
    for size, allowed in ((0.3, True), (6.0, False)):
        outputs = (mine[0] + direction / direction.norm() * own * size,)
        first = compare("runtime", [outputs], [mine])
        assert not first.passed
        certificate = allow_rounding(first, graph, call, outputs)
        assert certificate.passed is allowed
        assert "noise against float" in str(certificate)


def test_an_artifact_with_another_scale_is_refused() -> None:
    graph = run("quantize", lossless(Residual(), torch.randn(1, 3, 16, 16)), images(1, 3, 16, 16)).graph
    broken = graph.copy()
    broken.set_tensor("head.weight.scale", graph.tensors["head.weight.scale"] * 1.5)
    backend = backends.load("onnxruntime")()

    class Wrong(type(backend)):  # type: ignore[misc]
        def lower(self, graph: Any, target: Any) -> Any:
            return super().lower(broken, target)

    calls = {"example": images(1, 3, 16, 16, count=1)}
    deploy(graph, CPU, backend, calls=calls)
    with pytest.raises(VerificationError, match="does not reproduce its graph"):
        deploy(graph, CPU, Wrong(), calls=calls)


def test_without_integers_on_the_target_nothing_is_quantized() -> None:
    graph = lossless(Residual(), torch.randn(1, 3, 16, 16))
    context = Context(target=replace(CPU, integers=None), calibration=images(1, 3, 16, 16))
    with pytest.raises(PassError, match="nothing is known of integers"):
        passes.load("quantize")().run(graph, context)
