"""``correct-bias``: what it subtracts by hand, the error of whole networks before and after, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.pipeline import Context, PassResult, Pipeline
from graphprune.textual import parse_pipeline

from .rewriting import randomise, refusals
from .test_equalize import Mobile


def x(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(
    model: nn.Module, given: torch.Tensor, options: str = "{rounding=nearest}"
) -> tuple[Graph, Graph]:
    """The folded float graph, and the same quantized."""
    graph = graphprune.trace(model, given[:2], dynamic_batch=True)
    graph = Pipeline.parse("fold-batch-norm").run(graph).graph
    context = Context(calibration=[given])
    return graph, Pipeline.parse(f"quantize{options}").run(graph, context).graph


def correct(graph: Graph, given: torch.Tensor, options: str = "") -> PassResult:
    """Run the pass; the graph it was given stays as it was."""
    before = graph.fingerprint()
    (step,) = parse_pipeline(f"correct-bias{options}")
    result = step.run(graph, Context(calibration=[given]))
    assert graph.fingerprint() == before
    result.graph.fx.lint()
    return result


def errors(graph: Graph, wanted: Graph, inputs: torch.Tensor) -> tuple[float, float]:
    """Relative squared error of the outputs, and of their means over the samples."""
    exact = wanted.run(inputs)[0]
    error = graph.run(inputs)[0] - exact
    return float(error.square().mean() / exact.var()), float(error.mean(0).square().mean() / exact.var())


# ---- what it subtracts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_one_layer_by_hand(bias: bool) -> None:
    """The integers of the bias, from those of weight and input."""
    model = nn.Sequential(nn.Linear(12, 5, bias=bias))
    randomise(model, seed=3)
    given = x(64, 12) + 0.7
    _, graph = quantized(model, given, "{bits=3 rounding=nearest}")
    name = "0.bias" if bias else "linear.bias"
    result = correct(graph, given).graph
    quantizer = next(n for n in graph.nodes if n.name.startswith("dequantize_per_tensor"))
    step, zero = float(quantizer.args[1]), int(quantizer.args[2])  # type: ignore[arg-type]
    rounded = ((given / step).round() + zero).clamp(0, 255).sub(zero).double() * step
    scale = graph.tensors["0.weight.scale"].double()
    weight = graph.tensors["0.weight.integers"].double() * scale[:, None]
    before = graph.tensors["0.bias.integers"] if bias else torch.zeros(5)
    with torch.no_grad():
        wanted = model(given).double().mean(0)
    error = (rounded @ weight.T).mean(0) + before * scale * step - wanted
    assert float(error.abs().max()) > 0.05
    found = result.tensors[f"{name}.integers"].double()
    assert float((found - (before - error / (scale * step))).abs().max()) <= 1


def test_what_is_left_is_less_than_the_unit_of_an_integer() -> None:
    """Every operator's mean over the calibration inputs is the float network's, layer behind layer."""
    model = randomise(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6)), seed=5)
    given = x(128, 8)
    exact, graph = quantized(model, given, "{bits=4 rounding=nearest}")
    result = correct(graph, given).graph
    assert errors(graph, exact, given)[1] > 1e-4
    # The last operator's result is quantized, too, and that is not of the bias.
    assert errors(result, exact, given)[1] < errors(graph, exact, given)[1] / 20


def test_biases_stay_integers_in_the_unit_of_the_sums() -> None:
    given = x(32, 3, 16, 16)
    _, graph = quantized(randomise(Mobile(), 20), given)
    result = correct(graph, given)
    assert str(result.graph) == str(graph)  # no operator more, as every one of them has a bias already
    changed = {n for n, v in result.graph.tensors.items() if not torch.equal(v, graph.tensors[n])}
    assert changed
    assert all(name.endswith("bias.integers") for name in changed)
    assert all(result.graph.tensors[name].dtype == torch.int32 for name in changed)


def test_a_layer_without_bias_gets_one_in_the_same_unit() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1)), seed=4)
    given = x(16, 3, 8, 8)
    _, graph = quantized(model, given, "{bits=4 rounding=nearest}")
    result = correct(graph, given).graph
    assert result.tensors["conv2d.bias.integers"].dtype == torch.int32
    unit = result.tensors["conv2d.bias.scale"]
    quantizer = next(n for n in result.nodes if n.name.startswith("dequantize_per_tensor"))
    torch.testing.assert_close(unit, result.tensors["0.weight.scale"] * quantizer.args[1])
    again = result.copy().propagate()
    assert str(again) == str(result)


# ---- what it is for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "times"), [("{rounding=nearest}", 1.4), ("{bits=4 rounding=nearest}", 10)]
)
def test_networks_on_inputs_that_were_not_seen(options: str, times: float) -> None:
    given, fresh = x(128, 3, 16, 16), x(128, 3, 16, 16, seed=2)
    for seed in (20, 21):
        exact, graph = quantized(randomise(Mobile(), seed), given, options)
        result = correct(graph, given).graph
        before, after = errors(graph, exact, fresh), errors(result, exact, fresh)
        assert after[0] < before[0] / times
        assert after[1] < before[1] / 30


def test_in_one_pipeline_behind_equalize() -> None:
    given = x(64, 3, 16, 16)
    graph = graphprune.trace(randomise(Mobile(), 21), given[:2], dynamic_batch=True)
    text = "fold-batch-norm,equalize,quantize{rounding=nearest},correct-bias"
    found = Pipeline.parse(text).run(graph, Context(calibration=[given])).graph
    plain = (
        Pipeline.parse("fold-batch-norm,quantize{rounding=nearest}")
        .run(graph, Context(calibration=[given]))
        .graph
    )
    fresh = x(64, 3, 16, 16, seed=3)
    assert errors(found, graph, fresh)[0] < errors(plain, graph, fresh)[0] / 1.6


def test_a_transformer_with_attention_written_out() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.Sequential(layer, nn.Linear(16, 5)).eval()
    given = x(32, 6, 16)
    graph = graphprune.trace(model, given[:2], dynamic_batch=True)
    context = Context(calibration=[given])
    quantized_ = Pipeline.parse("quantize{bits=4 rounding=nearest}").run(graph, context).graph
    result = correct(quantized_, given)
    assert result.changed
    assert errors(result.graph, graph, given)[1] < errors(quantized_, graph, given)[1]


def test_the_same_calibration_gives_the_same_numbers_however_it_is_batched() -> None:
    given = x(24, 3, 16, 16)
    _, graph = quantized(randomise(Mobile(1), 20), given)
    (step,) = parse_pipeline("correct-bias")
    one, many = (
        step.run(graph, Context(calibration=list(given.split(size)))).graph.tensors for size in (24, 5)
    )
    for name, value in one.items():
        assert float((value.double() - many[name].double()).abs().max()) <= 1, name


def test_outputs_that_would_be_further_off_keep_their_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrections of the wrong sign stand for whatever makes a network worse."""
    from graphprune.passes import correct_bias

    honest = correct_bias._Bias.subtract
    monkeypatch.setattr(correct_bias._Bias, "subtract", lambda bias, error: honest(bias, -5 * error))
    given = x(32, 3, 16, 16)
    _, graph = quantized(randomise(Mobile(1), 20), given, "{bits=4 rounding=nearest}")
    result = correct(graph, given)
    assert result.graph is graph
    assert not result.changed
    assert refusals(result)[0].startswith("biases stay: corrected, they take the outputs' error")


# ---- refusals and bad input -----------------------------------------------------------------------------


def test_a_graph_that_was_not_quantized_is_an_error() -> None:
    with pytest.raises(PassError, match="needs quantized"):
        Pipeline.parse("correct-bias").check()
    graph = graphprune.trace(nn.Linear(3, 2), torch.zeros(1, 3))
    with pytest.raises(PassError, match="does not know the float network"):
        correct(graph, x(1, 3))


def test_no_calibration_is_an_error() -> None:
    _, graph = quantized(nn.Linear(3, 2), x(4, 3))
    (step,) = parse_pipeline("correct-bias")
    with pytest.raises(PassError, match="needs calibration inputs"):
        step.run(graph, Context())


def test_values_that_are_not_finite_are_an_error_with_their_place() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    nn.init.constant_(model.get_parameter("0.weight"), 2.0)
    _, graph = quantized(model, x(8, 3))
    with pytest.raises(InputError, match=r"linear.*not finite"):
        correct(graph, torch.full((4, 3), 3e38))


def test_a_bias_in_float_that_two_operators_share_is_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.bias = nn.Parameter(torch.randn(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            one = nn.functional.linear(x, self.a.weight, self.bias)
            return nn.functional.linear(torch.relu(one), self.b.weight, self.bias)

    given = x(32, 6)
    _, graph = quantized(Shared(), given)
    result = correct(graph, given)
    shared = len(graph.readers("bias")) > 1
    assert (len(refusals(result)) == 2) == shared
    assert result.changed != shared
