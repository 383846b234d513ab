"""``equalize``: the ranges it makes equal, the error of one scale a tensor before and after, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.pipeline import Context, Pipeline
from graphprune.quantization.parameters import INT8, of_weight, to_integers, to_numbers

from .rewriting import apply, assert_same, randomise, refusals, text, trace
from .test_scaling import scaled_at_random


def x(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    model = nn.Sequential(*layers).double()
    randomise(model, seed)
    return model


def layer(model: nn.Sequential, place: int) -> nn.Linear:
    found = model[place]
    assert isinstance(found, nn.Linear)
    return found


def ranges(weight: torch.Tensor, dim: int) -> torch.Tensor:
    return weight.detach().abs().amax([d for d in range(weight.dim()) if d != dim])


def rounded(graph: Graph) -> Graph:
    """The graph with every weight as int8 with one scale for the whole tensor, and back."""
    result = graph.copy()
    for name, value in graph.parameters.items():
        if value.dim() > 1:
            how = of_weight(value, INT8, None)
            result.set_tensor(name, to_numbers(to_integers(value, how), how).to(value.dtype))
    return result


def error(graph: Graph, given: Graph, inputs: torch.Tensor) -> float:
    """The relative squared error of the outputs when weights have one scale a tensor."""
    wanted, found = given.run(inputs)[0], rounded(graph).run(inputs)[0]
    return float((found - wanted).square().sum() / wanted.square().sum())


def run(graph: Graph, options: str = "") -> Graph:
    return apply(f"equalize{options}", graph).graph


class Mobile(nn.Module):
    """Inverted residuals with ReLU (Sandler et al. 2018), batch norms with statistics."""

    def __init__(self, blocks: int = 3):
        super().__init__()

        def layer(cin: int, cout: int, kernel: int = 1, groups: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(cin, cout, kernel, padding=kernel // 2, groups=groups, bias=False)
            return [conv, nn.BatchNorm2d(cout)]

        self.stem = nn.Sequential(*layer(3, 12, 3), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(*layer(12, 36), nn.ReLU(), *layer(36, 36, 3, 36), nn.ReLU(), *layer(36, 12))
            for _ in range(blocks)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def mobile(seed: int = 5) -> tuple[nn.Module, Graph]:
    model = randomise(Mobile().double(), seed)
    return model, Pipeline.parse("fold-batch-norm").run(trace(model, x(4, 3, 16, 16))).graph


# ---- the algebra --------------------------------------------------------------------------------------


def test_a_pair_is_that_of_the_paper() -> None:
    """Equation 11, computed here from the definition."""
    model = double(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 3))
    first, second = (layer(model, i).weight.detach().clone() for i in (0, 2))
    r1, r2 = ranges(first, 0), ranges(second, 1)
    s = (r1 * r2).sqrt() / r2
    graph = run(trace(model, x(2, 5)))
    torch.testing.assert_close(graph.tensors["0.weight"].detach(), first / s[:, None], rtol=1e-12, atol=0)
    torch.testing.assert_close(graph.tensors["2.weight"].detach(), second * s, rtol=1e-12, atol=0)
    assert_same(graph, model, x(3, 5, seed=2))


def test_both_sides_of_every_axis_have_one_range_afterwards() -> None:
    model = double(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.LeakyReLU(0.3),
        nn.Conv2d(8, 6, 1, bias=False),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 4),
    )
    graph = run(trace(model, x(2, 3, 8, 8)))
    assert_same(graph, model, x(2, 3, 8, 8, seed=3))
    w = {name: value.detach() for name, value in graph.tensors.items()}
    # Sweeps end when no factor is further than 1 % from one.
    torch.testing.assert_close(ranges(w["0.weight"], 0), ranges(w["2.weight"], 0), rtol=0.03, atol=0.0)
    torch.testing.assert_close(ranges(w["2.weight"], 0), ranges(w["4.weight"], 1), rtol=0.03, atol=0.0)
    torch.testing.assert_close(
        ranges(w["4.weight"], 0), ranges(w["7.weight"].view(4, 6, 4), 1), rtol=0.03, atol=0.0
    )


def test_the_graph_keeps_its_operators_and_names() -> None:
    _, graph = mobile()
    other = run(graph)
    assert text(other) == text(graph)
    assert set(other.tensors) == set(graph.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_keep_their_dtype(dtype: torch.dtype) -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), seed=2).to(dtype)
    given = x(2, 5).to(dtype)
    assert_same(run(trace(model, given)), model, given, tolerance=4 * torch.finfo(dtype).eps)


def test_twice_changes_nothing_more() -> None:
    _, graph = mobile()
    once = run(graph)
    again = apply("equalize", once)
    assert not again.changed
    assert "have equal ranges already" in again.notes[0].message


# ---- what it is for -----------------------------------------------------------------------------------


def test_one_scale_a_tensor_loses_less() -> None:
    """Networks as their batch norms leave them, and the same with factors that only a quantizer feels."""
    errors = []
    inputs = x(16, 3, 16, 16, seed=7)
    for seed in range(20, 24):
        model, graph = mobile(seed)
        skewed, count = scaled_at_random(graph, seed)
        assert count == 7
        again = run(skewed)
        assert_same(again, model, inputs, tolerance=1e-8)
        errors.append([error(g, graph, inputs) for g in (graph, run(graph), skewed, again)])
    plain, equal, unbalanced, restored = torch.tensor(errors).log().mean(0).exp().tolist()
    assert equal < plain / 3
    assert restored < unbalanced / 500
    assert restored == pytest.approx(equal, rel=2.0)


def test_the_notes_say_how_far_apart_channels_were() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)).double()
    layer(model, 0).weight.data = torch.tensor([[64.0, 1.0], [1.0, 0.5]]).double()
    layer(model, 2).weight.data = torch.tensor([[1.0, 64.0], [0.5, 9.0]]).double()
    result = apply("equalize", trace(model, x(1, 2)))
    assert [(n.kind, n.where, n.message) for n in result.notes] == [
        ("info", "", "1 axes equalized in 1 sweeps, 1 left"),
        ("changed", "linear → linear_1", "largest over smallest range of a channel 64 to 1"),
        ("refused", "linear_1 → ?", "the caller sees it"),
    ]


# ---- channels that must stay --------------------------------------------------------------------------


def test_a_channel_that_is_zero_on_one_side_stays_as_it_is() -> None:
    model = double(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    layer(model, 0).weight.data[1] = 0.0
    layer(model, 2).weight.data[:, 4] = 0.0
    graph = run(trace(model, x(2, 4)))
    assert all(bool(torch.isfinite(t).all()) for t in graph.tensors.values())
    assert torch.equal(graph.tensors["2.weight"][:, 1], layer(model, 2).weight[:, 1])
    assert torch.equal(graph.tensors["0.weight"][4], layer(model, 0).weight[4])
    assert_same(graph, model, x(5, 4))


def test_a_bias_is_part_of_its_rows_range() -> None:
    """A channel that a batch norm left with next to no weights does not get an enormous bias."""
    model = double(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    layer(model, 0).weight.data[2] *= 1e-9
    bias, read = layer(model, 0).bias.detach().abs(), ranges(layer(model, 2).weight, 1)
    graph = run(trace(model, x(2, 4)))
    found = graph.tensors["0.bias"].detach().abs()
    assert float(found[2]) == pytest.approx(float((bias * read).sqrt()[2]), rel=0.02)
    assert bool((found <= 1.02 * (bias * read).sqrt()).all())
    assert_same(graph, model, x(5, 4))


def test_everything_zero_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    for parameter in model.parameters():
        parameter.data.zero_()
    assert not apply("equalize", trace(model, x(2, 4))).changed


# ---- refusals -----------------------------------------------------------------------------------------


def test_a_clamp_is_refused_and_the_rest_equalized() -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU6(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.GELU(), nn.Linear(5, 2)
    )
    result = apply("equalize", trace(randomise(model.double()), x(2, 4)))
    assert [n.where for n in result.notes if n.kind == "changed"] == ["linear_1 → linear_2"]
    assert "has a bound that would not follow" in refusals(result)[0]
    assert refusals(result)[1:] == ["gelu is not positively homogeneous", "the caller sees it"]


def test_a_batch_norm_is_refused_with_the_pass_that_helps() -> None:
    model = randomise(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    )
    result = apply("equalize", trace(model, x(2, 3, 4, 4)))
    assert not result.changed
    assert refusals(result)[0] == "batch_norm normalises it; fold-batch-norm comes first"
    assert refusals(result)[1] == "batch_norm writes it with a gain, not with a weight of rows"


def test_ignored_layers_keep_their_weights() -> None:
    """And with them whatever shares an axis with them: here what writes and reads the residual stream."""
    _, graph = mobile()
    result = apply('equalize{ignored=["blocks.1"]}', graph)
    changed = {n for n, value in result.graph.tensors.items() if not torch.equal(value, graph.tensors[n])}
    inner = ["0.weight", "0.bias", "3.weight", "3.bias", "6.weight"]
    assert changed == {f"blocks.{block}.{name}" for block in (0, 2) for name in inner}
    assert "ignored='blocks.1'" in refusals(result)


def test_an_unknown_layer_to_ignore_is_an_error() -> None:
    with pytest.raises(InputError, match="'nowhere' matches no operator"):
        apply("equalize{ignored=[nowhere]}", mobile()[1])


def test_a_network_without_a_pair_says_so() -> None:
    result = apply("equalize", trace(nn.Linear(3, 2), torch.zeros(1, 3)))
    assert not result.changed
    assert result.notes[0].message == "no two layers with only homogeneous operators between them"


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    graph = graphprune.trace(model, torch.zeros(2, 4, device="meta"))
    result = Pipeline.parse("equalize").passes[0].run(graph, Context())
    assert not result.changed
    assert any("has no values" in note.message for note in result.notes)


def test_after_quantization_it_is_too_late() -> None:
    with pytest.raises(PassError, match="needs float"):
        Pipeline.parse("quantize,equalize").check()
