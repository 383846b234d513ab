"""``smooth-quant``: equation 4 by hand, the error of int8 with outliers before and after, refusals."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.pipeline import Context, PassResult
from graphprune.quantization.parameters import INT8, UINT8, of_range, of_weight, to_integers, to_numbers
from graphprune.textual import parse_pipeline

from .rewriting import assert_same, randomise, refusals, text, trace


def x(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def smooth(graph: Graph, calibration: Sequence[torch.Tensor] | None, options: str = "") -> PassResult:
    """Run the pass; the graph it was given stays as it was."""
    before = graph.fingerprint()
    (step,) = parse_pipeline(f"smooth-quant{options}")
    result = step.run(graph, Context(calibration=calibration))
    assert graph.fingerprint() == before
    assert result.changed == (result.graph is not graph)
    assert text(result.graph) == text(graph)
    return result


class Block(nn.Module):
    """A pre-norm transformer block, separate queries, keys and values."""

    def __init__(self, width: int = 16, heads: int = 4, activation: nn.Module | None = None):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.activation = activation or nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        q, k, v = (
            f(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.activation(self.up(self.norm2(x))))


def block() -> Block:
    model = Block().double()
    randomise(model)
    return model


class Network(nn.Module):
    """Patches, blocks, a head: small, but with everything a vision transformer has."""

    def __init__(self, blocks: int = 3, width: int = 16):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])


def with_outliers(model: Network, times: float = 60.0) -> Network:
    """Weights of an ordinary size, and two channels of every layer norm many times larger than the rest."""
    torch.manual_seed(4)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.weight.data[[3, 7]] *= times
    for (
        module
    ) in model.modules():  # what is large is multiplied with little, or the network would be its outliers
        if isinstance(module, nn.Linear) and module.in_features == 16:
            module.weight.data[:, [3, 7]] /= times / 2
    return model.double().eval()


class _Int8(fx.Interpreter):
    """What every matrix product reads with one scale a tensor, weights with one an output channel."""

    def __init__(self, graph: Graph, ranges: dict[str, tuple[float, float]] | None = None):
        super().__init__(fx.GraphModule({**graph.tensors, **graph.bodies}, graph.fx))
        self.ranges: dict[str, tuple[float, float]] = {} if ranges is None else ranges
        self.counting = ranges is None

    def run_node(self, n: fx.Node) -> object:
        if n.target is not torch.ops.aten.linear.default:
            return super().run_node(n)
        given, weight, *rest = (self.env[a] if isinstance(a, fx.Node) else a for a in n.args)
        if self.counting:
            low, high = self.ranges.get(n.name, (0.0, 0.0))
            self.ranges[n.name] = (min(low, float(given.min())), max(high, float(given.max())))
        else:
            how, per_row = of_range(*self.ranges[n.name], UINT8), of_weight(weight, INT8, 0)
            given = to_numbers(to_integers(given, how), how).double()
            weight = to_numbers(to_integers(weight, per_row), per_row).double()
        return F.linear(given, weight, *rest)


def error(graph: Graph, reference: Graph, calibration: torch.Tensor, inputs: torch.Tensor) -> float:
    """The relative squared error of the outputs in int8."""
    with torch.no_grad():
        counter = _Int8(graph)
        counter.run(calibration)
        found = _Int8(graph, counter.ranges).run(inputs)[0]
        wanted = reference.run(inputs)[0]
    return float((found - wanted).square().sum() / wanted.square().sum())


# ---- the algebra --------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_factors_are_those_of_equation_4(alpha: float) -> None:
    model = block()
    given = [x(2, 5, 16, seed=s) for s in range(3)]
    graph = trace(model, given[0])
    found = smooth(graph, given, f"{{alpha={alpha}}}").graph.tensors
    with torch.no_grad():
        seen = torch.cat([model.norm1(g) for g in given]).abs().amax((0, 1))
        weight = torch.stack([model.q.weight, model.k.weight, model.v.weight]).abs().amax((0, 1))
        s = seen**alpha / weight ** (1 - alpha)
        for name in ("norm1.weight", "norm1.bias"):
            torch.testing.assert_close(found[name].detach(), model.get_parameter(name) / s)
        for name in ("q", "k"):
            wanted = model.get_parameter(f"{name}.weight") * s
            torch.testing.assert_close(found[f"{name}.weight"].detach(), wanted)
            assert torch.equal(found[f"{name}.bias"], model.get_parameter(f"{name}.bias"))


def test_values_reach_the_output_projection_head_by_head() -> None:
    """The channels of a head share the factor of the head, and those at one place in it that of the place."""
    model = block()
    given = x(2, 5, 16)
    graph = trace(model, given)
    found = smooth(graph, [given]).graph.tensors
    s = (found["out.weight"] / model.out.weight).detach()
    assert float((s / s[:1] - 1).abs().max()) < 1e-9
    table = s[0].view(4, 4).log()
    crossed = table - table.mean(0, keepdim=True) - table.mean(1, keepdim=True) + table.mean()
    assert float(crossed.abs().max()) < 1e-9
    assert float(table.std()) > 0.05


def test_outputs_stay() -> None:
    model = with_outliers(Network())
    graph = trace(model, x(2, 3, 16, 16))
    result = smooth(graph, [x(2, 3, 16, 16, seed=s) for s in range(4)])
    assert_same(result.graph, model, x(2, 3, 16, 16, seed=9), tolerance=1e-9)
    changed = [n.where for n in result.notes if n.kind == "changed"]
    assert len(changed) == 3 * 4 + 1  # two norms and two axes of values a block, and the last norm
    assert changed[0] == "layer_norm → linear, linear_1, linear_2"


def test_an_open_batch_and_a_limit() -> None:
    model = with_outliers(Network(1))
    graph = trace(model, x(2, 3, 16, 16), dynamic_batch=True)
    samples = x(9, 3, 16, 16, seed=3)
    some = smooth(graph, [samples], "{limit=4}")
    assert "4 samples in 1 calls" in [n.message for n in some.notes]
    assert some.graph.fingerprint() == smooth(graph, [samples[:4]]).graph.fingerprint()
    assert some.graph.fingerprint() != smooth(graph, [samples]).graph.fingerprint()


def test_an_rms_norm_written_by_hand() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            normed = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
            return F.silu(self.a(normed)).sum(-1, keepdim=True) + self.b(normed)

    model = Normed().double()
    randomise(model)
    result = smooth(trace(model, x(2, 8)), [x(2, 8)])
    assert result.changed
    assert not torch.equal(result.graph.tensors["weight"], model.weight)
    assert_same(result.graph, model, x(5, 8)[:2])


# ---- what it is for -----------------------------------------------------------------------------------


def test_outliers_cost_a_fraction_of_what_they_did() -> None:
    model = with_outliers(Network())
    calibration, inputs = x(32, 3, 16, 16, seed=5), x(32, 3, 16, 16, seed=6)
    graph = trace(model, x(2, 3, 16, 16), dynamic_batch=True)
    smoothed = smooth(graph, [calibration]).graph
    before, after = (error(g, graph, calibration, inputs) for g in (graph, smoothed))
    assert after < before / 8


def test_notes_say_how_far_out_the_outliers_were() -> None:
    model = with_outliers(Network(1))
    result = smooth(trace(model, x(2, 3, 16, 16)), [x(2, 3, 16, 16)])
    (note,) = (n for n in result.notes if n.where == "layer_norm → linear, linear_1, linear_2")
    was, now = (
        float(number) for number in note.message.removeprefix("largest over median channel ").split(" to ")
    )
    assert was > 30
    assert now < was / 3


# ---- refusals and bad input ---------------------------------------------------------------------------


def test_a_norm_whose_result_is_added_elsewhere_is_refused() -> None:
    class PostNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last, self.a, self.b = (
                nn.LayerNorm(8),
                nn.LayerNorm(8),
                nn.Linear(8, 6),
                nn.Linear(6, 8),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(x)
            return self.last(x + self.b(F.gelu(self.a(x))))

    result = smooth(trace(randomise(PostNorm().double()), x(2, 8)), [x(2, 8)])
    assert not result.changed
    assert "normalises it" in refusals(result)[0]
    assert result.notes[0].message == "no matrix product reads what a gain or another product writes"


def test_convolutions_are_left_to_equalize() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).double())
    result = smooth(trace(model, x(2, 3, 4, 4)), [x(2, 3, 4, 4)])
    assert refusals(result)[0] == "conv2d_1, a convolution, reads it; equalize is for those"


def test_ignored_products_keep_their_weights() -> None:
    model = with_outliers(Network(2))
    graph = trace(model, x(2, 3, 16, 16))
    result = smooth(graph, [x(2, 3, 16, 16)], "{ignored=[blocks.0]}")
    changed = {n for n, v in result.graph.tensors.items() if not torch.equal(v, graph.tensors[n])}
    assert changed
    assert not any(name.startswith("blocks.0") for name in changed)
    assert "ignored='blocks.0'" in refusals(result)


def test_no_calibration_is_an_error() -> None:
    with pytest.raises(PassError, match="needs calibration inputs"):
        smooth(trace(block(), x(2, 5, 16)), None)


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_out_of_range_is_an_error(alpha: float) -> None:
    with pytest.raises(InputError, match="alpha must be between 0 and 1"):
        smooth(trace(block(), x(2, 5, 16)), [x(2, 5, 16)], f"{{alpha={alpha}}}")


def test_values_that_are_not_finite_inside_are_an_error_with_their_place() -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double())
    given = torch.full((2, 4), 1e308, dtype=torch.float64)
    with pytest.raises(InputError, match=r"relu.*not finite"):
        smooth(trace(model, x(2, 4)), [given])


def test_channels_that_are_always_zero_stay() -> None:
    model = randomise(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)).double())
    norm, linear = model.get_submodule("0"), model.get_submodule("1")
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(linear, nn.Linear)
    norm.weight.data[2] = norm.bias.data[2] = 0.0
    linear.weight.data[:, 4] = 0.0
    found = smooth(trace(model, x(2, 6)), [x(2, 6)]).graph.tensors
    assert all(bool(torch.isfinite(value).all()) for value in found.values())
    assert torch.equal(found["1.weight"][:, [2, 4]], linear.weight[:, [2, 4]])


def test_constant_inputs_and_one_sample_are_enough() -> None:
    """The result is finite and exact, however little the ranges say."""
    model = with_outliers(Network(1))
    graph = trace(model, x(1, 3, 16, 16))
    result = smooth(graph, [torch.zeros(1, 3, 16, 16, dtype=torch.float64)])
    assert_same(result.graph, model, x(1, 3, 16, 16, seed=8), tolerance=1e-8)


def test_float32_stays_float32() -> None:
    model = with_outliers(Network(2)).float()
    given = x(2, 3, 16, 16).float()
    result = smooth(trace(model, given), [given])
    assert all(value.dtype == torch.float32 for value in result.graph.tensors.values())
    assert_same(result.graph, model, given, tolerance=2e-5)
