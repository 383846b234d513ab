"""The exit's decision against one taken sample by sample in Python, what is skipped, and who refuses what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphprune.passes.early_exit import EarlyExit, ExitLoss, attach, branch, fit
from torch import nn

import graphprune
from graphprune.backend import Lowered
from graphprune.cost import cost
from graphprune.errors import BackendError, GraphpruneError
from graphprune.graph import Graph
from graphprune.pipeline import LOSSLESS, Context, Pipeline
from graphprune.registry import backends
from graphprune.target import get

IMAGES = (1, 12, 12)
SOME = 0.35  # a threshold that some of the images reach


class Plain(nn.Module):
    """Convolutions with batch norms, a shortcut over the cut, a piece of a split behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.late = nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.Linear(8 * 12 * 12, 5)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        """``[n, 1, 12, 12]`` to ``{"logits": [n, 5]}``."""
        first = self.stem(x)
        left, right = self.block(first).chunk(2, 1)
        y = torch.relu(self.late(left * right)) + first
        return {"logits": self.head(y.reshape(x.shape[0], -1))}


@pytest.fixture(scope="module")
def model() -> Plain:
    torch.manual_seed(0)
    model = Plain().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean, module.running_var = torch.randn(8) * 0.3, torch.rand(8) * 1.5 + 0.5
    nn.init.normal_(model.head.weight, 0, 0.1)
    return model


def images(count: int, seed: int = 1) -> torch.Tensor:
    """Noise of very different contrast, so that some samples are surer than others."""
    draw = torch.Generator().manual_seed(seed)
    scale = torch.rand(count, 1, 1, 1, generator=draw) * 3
    return torch.randn(count, *IMAGES, generator=draw) * scale


@pytest.fixture(scope="module")
def both(model: Plain) -> Graph:
    graph = graphprune.trace(model, images(2), dynamic_batch=True)
    return fit(attach(graph, "block"), [(images(256),)])


@torch.no_grad()
def expected(
    model: Plain, both: Graph, x: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every sample by itself through the modules themselves: the answer, and whether it left early."""
    weight, bias = both.tensors["early_exit.weight"], both.tensors["early_exit.bias"]
    answers, left = [], []
    for sample in x.split(1):
        early = model.block(model.stem(sample)).mean((2, 3)) @ weight.T + bias
        exponentials = np.exp(early.double().numpy())
        left.append(bool(exponentials.max() / exponentials.sum() >= threshold))
        answers.append(early if left[-1] else model(sample)["logits"])
    return torch.cat(answers), torch.tensor(left)


@pytest.mark.parametrize("threshold", [0.326, 0.36])
def test_a_sample_gets_the_same_answer_alone_and_in_any_batch(
    model: Plain, both: Graph, threshold: float
) -> None:
    x = images(24, seed=2)
    wanted, left = expected(model, both, x, threshold)
    assert 0 < left.sum() < len(x)
    graph = branch(both, threshold)
    for batch in (1, 5, 24):
        found = torch.cat([graph(part)["logits"] for part in x.split(batch)])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def lowered(both: Graph) -> Lowered:
    found: Lowered = backends.load("onnxruntime")().lower(branch(both, SOME), get("cpu"))
    return found


def test_the_decision_survives_the_runtime(model: Plain, both: Graph, lowered: Lowered) -> None:
    agrees(model, both, "onnxruntime", lowered)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "inductor"])
def test_and_other_runtimes(model: Plain, both: Graph, backend: str) -> None:
    runtime = backends.load(backend)()
    if runtime.unrunnable(get("cpu")):
        pytest.skip(runtime.unrunnable(get("cpu")))
    agrees(model, both, backend, runtime.lower(branch(both, SOME), get("cpu")))


def agrees(model: Plain, both: Graph, backend: str, lowered: Lowered) -> None:
    """A runtime's answers are those taken sample by sample, on samples that leave and others."""
    x = images(24, seed=3)
    wanted, left = expected(model, both, x, SOME)
    assert 0 < left.sum() < len(x)
    runner = backends.load(backend)().open(lowered.files, lowered.inputs, lowered.outputs, get("cpu"), 1)
    for batch in (1, 7):
        found = torch.cat([runner(part)[0] for part in x.split(batch)])
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


def test_what_lies_behind_the_exit_does_not_run_for_a_sample_that_leaves(
    model: Plain, both: Graph, lowered: Lowered, tmp_path: Path
) -> None:
    import onnxruntime as ort

    x = images(24, seed=3)
    _, left = expected(model, both, x, SOME)

    def convolutions(sample: torch.Tensor) -> int:
        options = ort.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "run")
        session = ort.InferenceSession(lowered.files["model.onnx"], options)
        session.run(None, {lowered.inputs[0].name: sample.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
        return sum(
            "Conv" in e["args"].get("op_name", "") for e in events if e["name"].endswith("kernel_time")
        )

    leaves, stays = (x[int((left == flag).nonzero()[0])][None] for flag in (True, False))
    assert (convolutions(leaves), convolutions(stays)) == (2, 3)
    assert convolutions(torch.cat([leaves, stays])) == 3


def test_what_only_the_rest_reads_is_a_constant_of_its_branch(lowered: Lowered) -> None:
    """ONNX Runtime lays out a convolution's weight for the processor only where both are in one graph."""
    import onnx

    model = onnx.load_from_string(lowered.files["model.onnx"])
    onnx.checker.check_model(model)
    (decision,) = (node for node in model.graph.node if node.op_type == "If")
    inside = {t.name for a in decision.attribute for t in a.g.initializer}
    assert {"late.weight", "late.bias", "head.weight", "head.bias"} <= inside
    assert not inside & {t.name for t in model.graph.initializer}


def test_the_fit_is_the_optimum_it_is_said_to_be(model: Plain, both: Graph) -> None:
    with torch.no_grad():
        x = model.block(model.stem(images(256))).mean((2, 3)).double().numpy()
        logits = model(images(256))["logits"].double().numpy()
    wanted = np.exp(logits - logits.max(1, keepdims=True))
    wanted /= wanted.sum(1, keepdims=True)
    weight = both.tensors["early_exit.weight"].detach().double().numpy()
    bias = both.tensors["early_exit.bias"].detach().double().numpy()
    found = np.exp(x @ weight.T + bias)
    found /= found.sum(1, keepdims=True)
    scale = np.maximum(x.std(0), 1e-6)
    gradient = (found - wanted).T @ ((x - x.mean(0)) / scale) / len(x) + 1e-3 * weight * scale
    assert np.abs(gradient).max() < 1e-4
    assert np.abs((found - wanted).mean(0)).max() < 1e-4


def test_the_original_graph_is_untouched_and_costs_count_the_branch(model: Plain) -> None:
    graph = graphprune.trace(model, images(1))
    text, digest = str(graph), graph.fingerprint()
    result = EarlyExit(at="block", threshold=0.5).run(graph, Context(calibration=list(images(32).split(1))))
    assert (str(graph), graph.fingerprint()) == (text, digest)
    head = 8 * 5
    assert cost(result.graph).macs == cost(graph).macs + head
    assert cost(result.graph).parameters == cost(graph).parameters + head + 5
    assert [n for n in result.graph.fx.nodes if "conv" in n.name][-1].meta["module"] == "block.0"


@pytest.fixture(scope="module")
def quantized(model: Plain) -> Graph:
    graph = graphprune.trace(model, images(2), dynamic_batch=True)
    return Pipeline.parse(LOSSLESS + ",quantize").run(graph, Context(calibration=[images(32)])).graph


@pytest.mark.parametrize(
    ("at", "cut"),
    [("stem.0", "stem.2"), ("stem", "stem.2"), ("block.2", "block.2"), ("conv2d_1", "block.2")],
)
def test_behind_quantization_a_cut_is_behind_the_quantizer(quantized: Graph, at: str, cut: str) -> None:
    result = EarlyExit(at=at, threshold=SOME).run(quantized, Context(calibration=[images(32)]))
    (moved,) = (note for note in result.notes if "behind a quantizer" in note.message)
    assert repr(at) in moved.message
    place = next(node for node in quantized.fx.nodes if node.name == moved.where)
    assert "dequantize" in place.name
    assert place.meta["module"] == cut
    (decision,) = (node for node in result.graph.fx.nodes if node.target is torch.ops.higher_order.cond)
    crossing = [v.meta["val"] for v in decision.args[3] if v.op == "call_function"]
    assert {value.dtype for value in crossing if value.dim() == 4} == {torch.uint8}, "integers go in"


@pytest.mark.parametrize("at", ["stem", "block.0"])
def test_behind_quantization_answers_are_the_exits_or_the_quantized_networks(
    quantized: Graph, at: str
) -> None:
    runtime, target = backends.load("onnxruntime")(), get("cpu")
    both = fit(attach(quantized, at), [(images(256),)])
    x = images(24, seed=3)

    def answers(graph: Graph, batch: int) -> list[torch.Tensor]:
        lowered = runtime.lower(graph, target)
        runner = runtime.open(lowered.files, lowered.inputs, lowered.outputs, target, 1)
        return [torch.cat(parts) for parts in zip(*(runner(part) for part in x.split(batch)), strict=True)]

    early, final = answers(both, 24)
    torch.testing.assert_close(final, answers(quantized, 24)[0])
    threshold = float(early.softmax(1).amax(1).sort().values[10:12].mean())
    left = early.softmax(1).amax(1) >= threshold
    assert 0 < left.sum() < len(x)
    for batch in (1, 7):
        (found,) = answers(branch(both, threshold), batch)
        torch.testing.assert_close(found, torch.where(left[:, None], early, final), atol=1e-5, rtol=1e-4)


def test_behind_quantization_all_but_the_head_is_in_integers(model: Plain) -> None:
    """Convolutions on both sides of the cut, one of which reads a value of before it."""
    result = graphprune.optimize(
        model, images(2), dynamic_batch=True, calibration=[images(32)], backend="onnxruntime",
        pipeline=LOSSLESS + ',quantize,early-exit{at="block.0" threshold=0.35}', measure=False,
    )  # fmt: skip
    assert result.report.audit is not None
    assert not result.report.audit.fallbacks
    assert f"{result.report.audit.integers:.0%}" == "100%"
    head = 8 * 5
    audit = result.deployment.audit()
    one = result.report.final.macs // 2
    assert audit.macs == {"int8": one - head, "float32": head}
    assert audit.counts["QLinearConv"] == 3


def test_padding_goes_into_the_branch_with_its_reader() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8 * 9 * 9, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.b(nn.functional.pad(torch.relu(self.a(x)), (0, 1, 0, 1)))
            return self.head(y.flatten(1))

    result = graphprune.optimize(
        Padded().eval(), images(2), calibration=[images(4)], backend="onnxruntime", measure=False,
        pipeline=LOSSLESS + ',quantize{rounding=nearest},early-exit{at=pad}',
    )  # fmt: skip
    counts = result.deployment.audit().counts
    assert counts["QLinearConv"] == 2
    assert "Conv" not in counts


def test_openvino_takes_it_too_and_says_that_it_does_not_show_the_branch(quantized: Graph) -> None:
    runtime, target = backends.load("openvino")(), get("cpu")
    if runtime.unrunnable(target):
        pytest.skip(runtime.unrunnable(target))
    integers = fit(attach(quantized, "block.0"), [(images(256),)])
    graph = branch(integers, SOME)
    lowered = runtime.lower(graph, target)
    audit = runtime.audit(lowered, target)
    assert not any(row.fell_back for row in audit.rows)
    assert any("sides of an If" in note for note in audit.notes)
    runner = runtime.open(lowered.files, lowered.inputs, lowered.outputs, target, 1)
    x = images(24, seed=3)
    early = integers.run(x)[0].softmax(1).amax(1)
    sure = x[(early - SOME).abs() > 0.01]
    assert 0 < int((integers.run(sure)[0].softmax(1).amax(1) > SOME).sum()) < len(sure)
    for batch in (1, 7):
        found = torch.cat([runner(part)[0] for part in sure.split(batch)])
        (wanted,) = graph.run(sure)
        assert float((found - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_the_audit_has_the_branchs_operators(both: Graph, lowered: Lowered) -> None:
    audit = backends.load("onnxruntime")().audit(lowered, get("cpu"))
    convolutions = [row for row in audit.rows if "Conv" in row.operator]
    assert len(convolutions) == 3
    assert all(row.macs and row.precision == "float32" for row in convolutions)
    assert sum(audit.macs.values()) * 2 >= cost(branch(both, SOME)).macs, "of one image, captured with two"
    assert any("two sides of an If" in note for note in audit.notes)


@pytest.mark.slow
@torch.no_grad()
def test_an_exit_in_front_of_an_exit(model: Plain) -> None:
    data = [(x,) for x in images(64).split(1)]
    late = branch(fit(attach(graphprune.trace(model, images(1)), "block"), data), 0.345)
    both = fit(attach(late, "stem"), data)
    graph = branch(both, 0.35)
    runtime, target = backends.load("onnxruntime")(), get("cpu")
    lowered = runtime.lower(graph, target)
    runner = runtime.open(lowered.files, lowered.inputs, lowered.outputs, target, 1)
    ways = set()
    for x in images(24, seed=5).split(1):
        early, behind = both.run(x)[0], late.run(x)[0]
        sure = bool(early.softmax(1).max() >= 0.35)
        plain = torch.equal(behind, model(x)["logits"])
        ways.add((sure, plain))
        torch.testing.assert_close(graph.run(x)[0], early if sure else behind)
        torch.testing.assert_close(runner(x)[0], early if sure else behind, atol=1e-4, rtol=1e-3)
    assert {sure for sure, _ in ways} == {True, False}
    rows = runtime.audit(lowered, target).rows
    assert all(row.macs for row in rows if "Conv" in row.operator), "of both exits, whichever zeros take"


@pytest.mark.parametrize(("pool", "index"), [("mean", None), ("first", 0)])
def test_a_sequence_is_pooled_over_its_tokens(pool: str, index: int | None) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = layer, nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.two(self.one(x)))[:, 0])

    x = torch.randn(4, 6, 8)
    network = Classifier().eval()
    graph = fit(attach(graphprune.trace(network, x), "one", pool=pool), [(x,)])
    hidden = network.one(x)
    pooled = hidden.mean(1) if index is None else hidden[:, index]
    wanted = pooled @ graph.tensors["early_exit.weight"].T + graph.tensors["early_exit.bias"]
    torch.testing.assert_close(graph(x)[0], wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(graph(x)[1], network(x))


def test_features_may_stand_last(model: Plain) -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)).eval()
    graph = attach(graphprune.trace(network, torch.randn(2, 3, 3, 4)), "1", features=-1)
    assert graph.tensors["early_exit.weight"].shape == (3, 6)


def test_a_function_trains_both_answers_and_the_network_keeps_its_names(model: Plain) -> None:
    pytest.importorskip("accelerate", reason="the training helper needs it")
    from graphprune.train.finetune import finetune

    x = images(64)
    y = (x.mean((1, 2, 3)) > 0).long()
    seen: dict[str, Any] = {}

    def train(module: nn.Module) -> None:
        loss = ExitLoss(nn.functional.cross_entropy)
        seen["training"] = finetune(
            module, list(zip(x.split(16), y.split(16), strict=True)), loss, lr=1e-2, epochs=3
        )
        seen["outputs"] = module(x)

    step = EarlyExit(at="block", threshold=0.5, function=train)
    graph = graphprune.trace(model, images(2), dynamic_batch=True)
    result = step.run(graph, Context())
    losses = seen["training"].losses
    assert losses[-1] < losses[0]
    early, final = seen["outputs"][0], seen["outputs"][1]["logits"]
    sure = early.softmax(1).amax(1) >= 0.5
    wanted = torch.where(sure[:, None], early, final).detach()
    torch.testing.assert_close(result.graph(x)["logits"], wanted, atol=1e-5, rtol=1e-4)
    assert set(graph.tensors) < {*result.graph.tensors}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": ""}, "needs a cut"),
        ({"at": "blok"}, "did you mean 'block'"),
        ({"at": "block.7"}, "did you mean 'block"),
        ({"at": "7"}, "beside it are 'block', 'head', 'late', 'stem'"),
        ({"at": "head"}, "does not depend on it"),
        ({"at": "block", "threshold": 0.0}, "above 0 and at most 1"),
        ({"at": "block", "pool": "max"}, "unknown pool 'max'"),
        ({"at": "block", "pool": "first"}, "first token of a sequence"),
        ({"at": "block", "features": 7}, "features=7"),
    ],
)
def test_what_cannot_be_done_is_said(model: Plain, options: dict[str, Any], message: str) -> None:
    graph = graphprune.trace(model, images(2))
    with pytest.raises(GraphpruneError, match=message):
        EarlyExit(**options).run(graph, Context(calibration=[images(2)]))


def test_a_head_that_nothing_fits_is_refused_and_so_are_outputs_that_are_no_classes(model: Plain) -> None:
    graph = graphprune.trace(model, images(2))
    with pytest.raises(GraphpruneError, match="has to be fitted"):
        EarlyExit(at="block").run(graph, Context())
    two = nn.Conv2d(1, 3, 3).eval()
    with pytest.raises(GraphpruneError, match=r"needs an output \[n, classes\]"):
        EarlyExit(at="conv2d").run(graphprune.trace(two, images(2)), Context(calibration=[images(2)]))
    with pytest.raises(GraphpruneError, match=r"must return \(exit, final\)"):
        branch(graph, 0.5)


@pytest.mark.slow
def test_a_runtime_without_branches_refuses(both: Graph) -> None:
    pytest.importorskip("tvm", reason="it is TVM that refuses")
    tvm = backends.load("tvm")()
    with pytest.raises(BackendError):
        tvm.lower(branch(both, SOME), get("cpu"))
