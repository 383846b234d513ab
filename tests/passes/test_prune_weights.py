"""``prune-weights`` and ``strip-masks``: where zeros come, that they stay, and what correction is worth."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.pipeline import Context, PassResult
from graphprune.sparsity.zeros import dense_zeros
from graphprune.textual import make_pass, parse_pipeline

from .quantizing import Residual, images
from .rewriting import trace

DATA = images(16, 3, 16, 16)
DATA_8 = [torch.randn(8, 8) for _ in range(8)]


def run(graph: Graph, data: Any = None, name: str = "prune-weights", **options: Any) -> PassResult:
    before = graph.fingerprint()
    result = make_pass(name, options).run(graph, Context(calibration=data))
    assert graph.fingerprint() == before
    assert result.changed == (result.graph is not graph)
    return result


def residual(seed: int = 0) -> tuple[nn.Module, Graph]:
    torch.manual_seed(seed)
    model = Residual(16).eval()
    return model, trace(model, DATA[0])


def zeros(graph: Graph) -> dict[str, float]:
    return {
        n.removesuffix("_mask"): 1 - float(t.mean()) for n, t in graph.tensors.items() if n.endswith("_mask")
    }


def test_the_share_of_every_weight_and_its_largest_entries() -> None:
    _, graph = residual()
    done = run(graph, sparsity=0.75).graph
    weights = [n for n, t in graph.parameters.items() if t.dim() > 1]
    assert set(zeros(done)) == set(weights)
    for name, share in zeros(done).items():
        assert share == pytest.approx(0.75, abs=0.51 / graph.tensors[name].numel())
        mask = done.tensors[f"{name}_mask"].bool()
        values = graph.tensors[name].detach().abs()
        assert values[mask].min() >= values[~mask].max()
        assert torch.equal(done.tensors[name], graph.tensors[name]), "without inputs nothing else moves"


def test_one_ranking_over_all_weights() -> None:
    model, _ = residual()
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        first.weight.mul_(100)
    graph = trace(model, DATA[0])
    shares = zeros(run(graph, sparsity=0.5, scope="global").graph)
    total = sum(s * graph.tensors[n].numel() for n, s in shares.items()) / sum(
        graph.tensors[n].numel() for n in shares
    )
    assert total == pytest.approx(0.5, abs=1e-3)
    assert min(shares.values()) < 0.05


def test_two_of_four_in_every_layout() -> None:
    class Layouts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=2)
            self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
            self.line = nn.Linear(16, 12)
            self.product = nn.Parameter(torch.randn(12, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.line(self.up(self.conv(x))) @ self.product

    torch.manual_seed(0)
    model, data = Layouts().eval(), [torch.randn(2, 8, 4, 8) for _ in range(4)]
    done = run(trace(model, data[0]), data, pattern="2:4").graph
    conv = done.tensors["conv.weight_mask"].flatten(1).unflatten(1, (-1, 4)).sum(-1)
    line = done.tensors["line.weight_mask"].unflatten(1, (-1, 4)).sum(-1)
    product = done.tensors["product_mask"].T.unflatten(1, (-1, 4)).sum(-1)
    up = done.tensors["up.weight_mask"].movedim(1, 0).flatten(1).unflatten(1, (-1, 4)).sum(-1)
    for counts in (conv, line, product, up):
        assert (counts == 2).all()
    with torch.no_grad():
        for name in ("conv.weight", "line.weight", "product", "up.weight"):
            model.get_parameter(name).copy_(done.tensors[name] * done.tensors[f"{name}_mask"])
        torch.testing.assert_close(done(data[0]), model(data[0]))


def test_correction_is_worth_something() -> None:
    model, graph = residual()
    with torch.no_grad():
        wanted = torch.cat([model(x) for x in DATA])
    off = {}
    for correct in (False, True):
        result = run(graph, DATA[:12], pattern="2:4", correct=correct)
        found = torch.cat([result.graph(x) for x in DATA])
        off[correct] = float((found[12:] - wanted[12:]).norm() / wanted[12:].norm())
    assert off[True] < 0.7 * off[False]
    assert any("corrected" in note.message for note in result.notes)


def test_masks_survive_training_and_are_not_regrown() -> None:
    _, graph = residual()
    done = run(graph, sparsity=0.8).graph
    module = done.module.train()
    gone = {n: done.tensors[f"{n}_mask"] == 0 for n in zeros(done)}
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    for x in DATA[:4]:
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    again = graphprune.trace(module.eval(), DATA[0])
    stripped = run(again, name="strip-masks")
    assert len(stripped.notes) == len(gone)
    for name, mask in gone.items():
        value = stripped.graph.tensors[name]
        assert not value[mask].any()
        assert not torch.equal(value, graph.tensors[name] * ~mask), "what stayed was trained"
    assert not any(n.endswith("_mask") for n in stripped.graph.tensors)
    assert torch.allclose(again(DATA[0]), stripped.graph(DATA[0]), atol=1e-6)


def test_more_may_go_later() -> None:
    _, graph = residual()
    first = run(graph, sparsity=0.4).graph
    second = run(first, DATA, sparsity=0.8).graph
    assert set(zeros(first)) == set(zeros(second))
    for name in zeros(first):
        before, after = (g.tensors[f"{name}_mask"].bool() for g in (first, second))
        assert not (after & ~before).any(), "what went does not come back"
        assert 1 - float(after.float().mean()) == pytest.approx(0.8, abs=0.51 / after.numel())
    assert len([n for n in second.nodes if "mul" in n.name]) == len(
        [n for n in first.nodes if "mul" in n.name]
    )


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "1x4", "sparsity": 0.5},
        {"pattern": "2:4"},
        {"pattern": "2:4", "importance": "gradient"},
        {"sparsity": 0.3},
        {"sparsity": 0.3, "scope": "global"},
        {"threshold": 0.0},
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_what_went_before_makes_up_for_nothing(options: dict[str, Any], groups: int) -> None:
    """The error in the notes is the measured one, and nothing stands under a mask."""
    torch.manual_seed(0)
    layer = nn.Conv1d(32, 32, 1, groups=groups)
    data = [torch.einsum("ij,bjk->bik", torch.randn(32, 32), torch.randn(16, 32, 4)) for _ in range(2)]
    first = run(trace(layer, data[0]), data, sparsity=0.6, correct=False).graph
    result = run(first, data, **options)
    second = result.graph
    before, after = (g.tensors["weight_mask"].bool() for g in (first, second))
    assert not (after & ~before).any()
    assert not second.tensors["weight"][~after].any()
    if options.get("pattern") == "2:4":  # what went is no match for what is there
        left = after[..., 0].unflatten(1, (-1, 4)).sum(-1)
        assert torch.equal(left, before[..., 0].unflatten(1, (-1, 4)).sum(-1).clamp(max=2))
    wanted, found = (
        torch.cat([g(x) for x in data]).detach() - layer.bias.detach()[:, None] for g in (first, second)
    )
    (said,) = (note.message for note in result.notes if "corrected" in note.message)
    measured = float((found - wanted).norm() / wanted.norm())
    assert float(said.split()[-2]) == pytest.approx(measured, abs=2e-3)


def test_an_error_of_nothing_is_no_complex_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rounding error below zero."""
    from graphprune.passes.prune_weights import selection

    monkeypatch.setattr(selection, "error", lambda *_: torch.tensor([-1e-9], dtype=torch.float64))
    (said,) = (n.message for n in run(trace(nn.Linear(8, 8), DATA_8[0]), DATA_8).notes if "corr" in n.message)
    assert said.endswith("0.000 by magnitude alone, 0.000 corrected")


def test_gradients_rank_otherwise_and_thresholds_cut() -> None:
    _, graph = residual()
    by_magnitude = run(graph, sparsity=0.5, scope="global").graph
    by_gradient = run(graph, DATA, sparsity=0.5, scope="global", importance="gradient", correct=False).graph
    assert zeros(by_magnitude) != zeros(by_gradient)

    def loss(module: nn.Module) -> Any:
        return (module(x).square().mean() for x in DATA[:4])

    by_loss = run(graph, sparsity=0.5, importance="gradient", loss=loss).graph
    assert set(zeros(by_loss)) == set(zeros(by_magnitude))
    cut = run(graph, threshold=0.05).graph
    for name in zeros(cut):
        kept = cut.tensors[f"{name}_mask"].bool()
        assert torch.equal(kept, graph.tensors[name].abs() >= 0.05)


def test_blocks_of_rows_leave_dead_channels_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.randn(2, 16)
    graph = trace(model, x)
    done = run(graph, sparsity=0.5, pattern="1x16", only=("0",)).graph
    stripped = run(done, name="strip-masks").graph
    (step,) = parse_pipeline("remove-dead-channels")
    small = step.run(stripped, Context()).graph
    assert small.tensors["0.weight"].shape == (16, 16)
    torch.testing.assert_close(small(x), done(x))


class Rows(nn.Module):
    """Convolutions, a linear and one more, whose outputs may go, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 20), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("scope", ["local", "global"])
def test_whole_outputs_of_every_layer(scope: str) -> None:
    torch.manual_seed(0)
    graph = trace(Rows().eval(), DATA[0])
    result = run(graph, DATA, sparsity=0.5, pattern="1x*", scope=scope, ignored=("head",))
    masks = [result.graph.tensors[f"body.{n}.weight_mask"].flatten(1) for n in (0, 2, 6)]
    assert all(((mask == 0).all(1) | (mask == 1).all(1)).all() for mask in masks)
    gone = [int((mask == 0).all(1).sum()) for mask in masks]
    assert sum(gone) == 24
    assert scope == "global" or gone == [8, 6, 10]
    said = {note.where: note.message for note in result.notes if note.kind == "changed"}
    for name, mask, count in zip(("0", "2", "6"), masks, gone, strict=True):
        words = f"{count} of {len(mask)} outputs have no other: strip-masks,remove-dead-channels"
        assert (words in said[f"body.{name}.weight"]) == (count > 0)


def test_outputs_that_masks_emptied_go_with_the_lossless_passes() -> None:
    torch.manual_seed(0)
    model = Rows().eval()
    model.body[0].bias.data.zero_()  # behind padding, a constant that is not 0 stays
    graph = trace(model, DATA[0])
    done = run(graph, sparsity=0.5, pattern="1x*", ignored=("head",)).graph
    result = graphprune.optimize(done.module, DATA[0], backend="onnxruntime", measure=False)
    shapes = [list(t.shape) for t in result.graph.parameters.values() if t.ndim > 1]
    assert sorted(shapes) == [[4, 10], [6, 8, 3, 3], [8, 3, 3, 3], [10, 24]]
    torch.testing.assert_close(result(DATA[0]), done(DATA[0]), atol=1e-5, rtol=1e-4)
    other = run(graph, sparsity=0.5, ignored=("head",)).graph
    plain = graphprune.optimize(other.module, DATA[0], backend="onnxruntime", measure=False)
    assert "remove-dead-channels" not in str([one.text for one in plain.report.passes])


def test_end_to_end_and_smaller_when_packed(tmp_path: Any) -> None:
    import gzip

    model, _ = residual()
    sizes, said = {}, {}
    for text in ("clean-up", "prune-weights{sparsity=0.9}"):
        result = graphprune.optimize(
            model, DATA[0], pipeline=f"{text},fold-parameters,fold-batch-norm", calibration=DATA,
            measure=False,
        )  # fmt: skip
        sizes[text] = len(gzip.compress(result.deployment.lowered.files["model.onnx"]))
        said[text] = [line for line in result.report.notes if "size only" in line]
    assert said["clean-up"] == []
    (line,) = said["prune-weights{sparsity=0.9}"]
    assert re.search(r"9[0-9]% of the weights of .* are zero; onnxruntime", line)
    assert sizes["prune-weights{sparsity=0.9}"] < 0.45 * sizes["clean-up"]
    certificate = result.report.passes[0].certificate
    assert certificate is not None
    assert not certificate.exact


def test_zeros_are_those_of_products_behind_masks_and_quantizers() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("mask", torch.ones(8, 8).tril())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).masked_fill(self.mask == 0, 0.0)

    graph = trace(Causal(), torch.randn(8, 8))
    assert dense_zeros(graph, "tvm") == ""
    few = run(graph, sparsity=0.25).graph
    assert dense_zeros(few, "tvm") == ""
    many = run(graph, sparsity=0.75).graph  # the mask is not multiplied into the weight
    assert dense_zeros(many, "tvm").startswith("75% of the weights of linear.weight are zero; tvm")
    integers = run(run(many, name="fold-parameters").graph, DATA_8, name="quantize").graph
    assert dense_zeros(integers, "tvm").startswith("7")


class Left(nn.Module):
    """Weights that are recurrent, computed, on the left of a product, and one that is like any other."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 8, batch_first=True)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.left, self.head = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((self.left @ self.norm(self.gru(x)[0][:, -1]).mT).mT)


def test_what_stays_dense_is_said() -> None:
    graph = trace(Left(), torch.ones(2, 3, 4))
    result = run(graph)
    said = {note.where: note.message for note in result.notes if note.kind == "refused"}
    assert said == {
        "gru in module 'gru'": "stays dense: recurrent weights",
        "linear in module 'norm'": "stays dense: computed by _weight_norm; run fold-parameters first",
        "matmul": "stays dense: matmul does not multiply with it as a linear layer does",
    }
    whole = 24 * 4 + 24 * 8 + 8 * 8 + 8 * 8 + 16
    share = f"{16 / whole:.1%} of the {whole:,} weights of products get a mask, the others stay dense"
    assert share in [note.message for note in result.notes]
    folded = run(run(graph, name="fold-parameters").graph)
    assert len([note for note in folded.notes if note.kind == "refused"]) == 2
    assert set(zeros(folded.graph)) > {"head.weight"}
    notes = [note.message for note in run(graph, only=("head",)).notes]
    assert not [message for message in notes if message.startswith("stays dense")]
    assert share in notes


def test_what_is_refused() -> None:
    _, graph = residual()

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids) @ self.table.weight.T

    result = run(trace(nn.Sequential(nn.ReLU()), torch.ones(1, 3)))
    assert not result.changed
    narrow = run(trace(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), torch.ones(1, 3)), pattern="2:4")
    assert any("3 columns" in note.message for note in narrow.notes)
    assert set(zeros(narrow.graph)) == {"1.weight"}
    for options, words in (
        ({"pattern": "2 of 4"}, "N:M as in 2:4"),
        ({"scope": "layer"}, "scope must be"),
        ({"importance": "taylor"}, "importance must be"),
        ({"pattern": "2:4", "scope": "global"}, "share in every group"),
        ({"pattern": "2:4", "threshold": 0.1}, "a threshold takes single entries"),
        ({"pattern": "2:4", "sparsity": 0.9}, r"2:4 makes 0\.5 of the entries zero, and sparsity is 0\.9"),
        ({"threshold": float("nan")}, "finite and at least 0, got nan"),
        ({"threshold": float("inf")}, "finite and at least 0, got inf"),
        ({"threshold": -1}, "finite and at least 0, got -1"),
        ({"threshold": 0.1, "sparsity": 0.5}, r"sparsity=0\.5 and threshold=0\.1 both say what goes"),
        ({"sparsity": -1.0}, "share, 0 to 1"),
        ({"sparsity": float("nan")}, "share, 0 to 1"),
        ({"ignored": ("nothing",)}, "matches no operator"),
    ):
        with pytest.raises(InputError, match=words):
            run(graph, **options)
    with pytest.raises(PassError, match="give a loss, or calibration"):
        run(graph, importance="gradient")
    assert not run(graph, name="strip-masks").changed
    assert zeros(run(graph, pattern="2:4", sparsity=0.5).graph) == zeros(run(graph, pattern="2:4").graph)
