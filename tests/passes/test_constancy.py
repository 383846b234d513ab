"""Bounds before an input is seen: what never fires is found, and no value ever leaves its bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphprune.passes.dead.constancy import Constancy
from graphprune.passes.dead.extents import is_float
from graphprune.passes.dead.intervals import Interval
from torch import fx, nn

from graphprune.graph import Graph
from tests.passes.dead import changes, double, remove, shapes, values, x
from tests.passes.rewriting import randomise, trace

# ---- what never fires ---------------------------------------------------------------------------

BOUNDED: dict[str, tuple[nn.Module, float]] = {
    "sigmoid": (nn.Sigmoid(), 1.0),
    "relu6": (nn.ReLU6(), 6.0),
    "hardsigmoid": (nn.Hardsigmoid(), 1.0),
    "softmax over pixels": (nn.Softmax(dim=-1), 1.0),
    "clamp": (nn.Hardtanh(0.0, 2.0), 2.0),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_a_relu_that_never_fires(name: str) -> None:
    activation, bound = BOUNDED[name]
    model = double(
        nn.Conv2d(2, 4, 1), activation, nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3, padding=1)
    )
    layer = model[2]
    layer.weight.data[[0, 3]] = -layer.weight.data[[0, 3]].abs()
    layer.bias.data[[0, 3]] = values(-0.01, 0.01)  # the second one fires where its operands are small
    layer.bias.data[4] = -bound * float(layer.weight.data[4].clamp(min=0).sum()) - 1e-6
    result = remove(model, x(1, 2, 6, 6))
    assert changes(result) == {"2.weight[0]": "2 of 5 removed (positions 0, 4): 2 never fires"}


def test_a_tanh_reaches_below_zero() -> None:
    model = double(nn.Conv2d(2, 4, 1), nn.Tanh(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1))
    model[2].weight.data[0] = -model[2].weight.data[0].abs()
    model[2].bias.data[0] = -0.01
    assert not remove(model, x(1, 2, 4, 4)).changed
    model[2].bias.data[0] = -float(model[2].weight.data[0].abs().sum()) - 1e-6
    assert remove(model, x(1, 2, 4, 4)).changed


def test_padding_widens_bounds_to_zero() -> None:
    """In [1, 2] everywhere but at the border, where the kernel meets zeros and the ReLU fires."""
    model = double(
        nn.Conv2d(2, 1, 1),
        nn.Hardtanh(1.0, 2.0),
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 1, 1),
    )
    model[2].weight.data[0] = -1.0
    model[2].bias.data[0] = 8.0  # below 9, above 6 and 4
    assert not remove(model, x(1, 2, 5, 5)).changed
    model[2].padding = (0, 0)
    assert remove(model, x(1, 2, 5, 5)).changed


@pytest.mark.parametrize(
    ("activation", "zero"),
    [(nn.SiLU(), True), (nn.GELU(), True), (nn.Hardswish(), True), (nn.Tanh(), True), (nn.LeakyReLU(), True),
     (nn.Sigmoid(), False), (nn.Softplus(), False), (nn.ELU(), True), (nn.Mish(), True)],
)  # fmt: skip
def test_zero_weights_through_an_activation(activation: nn.Module, zero: bool) -> None:
    model = double(nn.Linear(3, 5), activation, nn.Linear(5, 2))
    model[0].weight.data[[1, 4]] = 0
    model[0].bias.data[1] = 0
    kinds = "1 zero, 1 constant" if zero else "2 constant"
    assert changes(remove(model, x(3, 3))) == {
        "0.weight[0]": f"2 of 5 removed (positions 1, 4): {kinds}, taken into the bias behind it"
    }


CLAMPED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "through a square": lambda y: -y.square(),
    "through a difference": lambda y: 1.0 - y.exp() - 1.0,
    "through a quotient": lambda y: -1.0 / (1.0 + y.abs()),
    "through a maximum": lambda y: torch.minimum(y, -y.abs()),
    "through a choice": lambda y: torch.where(y > 0, -y.abs(), -1.0),
    "through a masked fill": lambda y: (-y.relu()).masked_fill(y > 1, -3.0),
    "through a clamp and a sum": lambda y: y.clamp(-3, -1).sum(0, keepdim=True) * y.sigmoid(),
}


@pytest.mark.parametrize("name", CLAMPED)
def test_bounds_through_arithmetic(name: str) -> None:
    """Nothing gets past a ReLU when its operand cannot be positive, however that comes about."""

    class Program(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(CLAMPED[name](self.first(x)).relu())

    model = randomise(Program().double())
    result = remove(model, x(5, 3))
    assert shapes(result.graph, "last.weight") == [(2, 1)]


# ---- no value leaves its bounds ------------------------------------------------------------------


class Within(fx.Interpreter):
    """Runs a graph and holds every value to its bounds."""

    def __init__(self, graph: Graph):
        super().__init__(fx.GraphModule({**graph.tensors, **graph.bodies}, graph.fx))
        self.found = Constancy(graph)
        self.bounded = 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function":
            results = value if isinstance(value, (tuple, list)) else [value]
            for result, bounds in zip(results, self.found.results(n), strict=True):
                if is_float(result):
                    self._check(n, result.double(), bounds)
        return value

    def _check(self, node: fx.Node, value: torch.Tensor, bounds: Interval) -> None:
        slack = 1e-9 * (1 + value.abs())
        assert bool((value >= bounds.lo - slack).all()), node
        assert bool((value <= bounds.hi + slack).all()), node
        self.bounded += bool((bounds.lo.isfinite() | bounds.hi.isfinite()).any())


class Everything(nn.Module):
    """One of each operator that a rule is written for, after a layer of unknown range and a bounded one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.group, self.instance = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)
        self.second = nn.Conv2d(8, 8, 3, groups=4, padding=1)
        self.third = nn.ConvTranspose2d(8, 8, 3, stride=2)
        self.layer, self.line = nn.LayerNorm(8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.norm(self.first(x))
        y = x.sigmoid() - 0.25
        z = self.layer(y.flatten(2).mT)
        heads = self.line(z).sigmoid().view(2, -1, 2, 4).transpose(1, 2)
        scores = heads @ heads.mT
        return [
            x, x.relu(), F.silu(x), F.gelu(x), F.gelu(x, approximate="tanh"), F.hardswish(x), F.mish(x),
            self.group(x), self.instance(x), self.second(y), self.third(y), y * x, y / (y.square() + 1), -y,
            1 - y, x.tanh(),
            y.abs(), F.leaky_relu(y), F.elu(y), F.softplus(y), y.exp(), y.square(), y**3, y.clamp(0.1, 0.5),
            F.max_pool2d(y, 2, padding=1), F.avg_pool2d(y, 3, padding=1), F.interpolate(y, scale_factor=2.0),
            F.pad(y, (1, 1), value=3.0), F.pad(y, (0, 0, 0, 0, 1, 2)), F.pad(y, (1, 1, 1, 1), mode="reflect"),
            y.mean((2, 3)), y.sum((1, 2)), y.amax(1), torch.maximum(x, y), torch.where(x > 0, y, 2 * y),
            torch.cat([x, y], 1), torch.stack([y, -y]), F.pixel_shuffle(y, 2), y.flatten(1).softmax(-1),
            y.view(-1, 2, 4, 5, 5).transpose(1, 2).flatten(1, 2), y.chunk(2, 1)[1], y[:, 1:5], y[:, ::2],
            z, self.line(z), self.attention(z, z, z)[0], self.recurrent(z)[0], z @ z.mT, F.hardsigmoid(y),
            scores, scores.softmax(-1) @ heads, F.scaled_dot_product_attention(heads, heads.exp(), heads),
        ]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_values_stay_within_their_bounds(seed: int, scale: float) -> None:
    model = randomise(Everything().double(), seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.3)
            if "norm.weight" in name:
                parameter[::3] = 0
    graph = trace(model, x(2, 3, 5, 5))
    watch = Within(graph)
    with torch.no_grad():
        for again in range(3):
            watch.run(scale * x(2, 3, 5, 5, seed=again))
    operators = sum(n.op == "call_function" for n in graph.nodes)
    assert watch.bounded > 0.6 * 3 * operators  # most operators get bounds, so that the test says something
