"""Every importance against another way to compute it, and errors that say what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.errors import InputError
from graphprune.importance import NAMES, Data, rank, scores
from graphprune.importance.reconstruction import RIDGE, shrinkage

HIDDEN = "0.weight[0]"


def mlp(seed: int = 0) -> tuple[nn.Sequential, list[torch.Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    return model, list((torch.randn(64, 6) @ torch.randn(6, 6)).split(16))


def convolutional(seed: int = 0) -> tuple[nn.Sequential, list[torch.Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 2.0)
            nn.init.normal_(module.bias)
            module.running_mean = torch.randn(8)
            module.running_var = torch.rand(8) + 0.5
    return model.eval(), list(torch.randn(24, 3, 6, 6).split(8))


def traced(model: nn.Module, data: list[torch.Tensor]) -> graphprune.Graph:
    return graphprune.trace(model, data[0][:2], dynamic_batch=True)


# ---- the second-order one ------------------------------------------------------------


def oracle(x: np.ndarray, weight: np.ndarray, gram: np.ndarray, gone: tuple[int, ...]) -> float:
    """Least weighted error a call when columns go and the rest is refitted, by numpy's least squares."""
    x = x - x.mean(0)
    moments = torch.from_numpy(x.T @ x / 4)  # four calls
    ridge = max(RIDGE, shrinkage(moments, len(x))) * float(moments.diagonal().mean())
    kept = [i for i in range(x.shape[1]) if i not in gone]
    # Rows of sqrt(ridge) pull the change of every weight, that of a removed one included, towards zero.
    design = np.concatenate([x / 2, math.sqrt(ridge) * np.eye(x.shape[1])])
    target = design @ weight.T
    change, *_ = np.linalg.lstsq(design[:, kept], target, rcond=None)
    rest = target - design[:, kept] @ change
    return float(np.trace(rest.T @ rest @ gram))


def test_what_a_removal_costs_is_what_least_squares_leaves() -> None:
    model, data = mlp()
    graph = traced(model, data)
    # With as many probes as the estimate needs, G of a linear output is the identity over its mean square.
    ranking = rank(graph, [graph.axes[HIDDEN]], "reconstruction", data=Data(data))[HIDDEN]
    hidden = torch.relu(model[0](torch.cat(data))).detach().double().numpy()
    weight = model[2].weight.detach().double().numpy()
    gram = gradient_moments(model, data)
    singles = [oracle(hidden, weight, gram, (i,)) for i in range(8)]
    assert ranking.order[0] == int(np.argmin(singles))
    for count in range(1, 8):
        gone = tuple(ranking.order[:count])
        assert sum(ranking.costs[:count]) == pytest.approx(oracle(hidden, weight, gram, gone), rel=1e-6)
        more = [oracle(hidden, weight, gram, (*gone, i)) for i in range(8) if i not in gone]
        left = [i for i in range(8) if i not in gone]
        assert ranking.order[count] == left[int(np.argmin(more))]


def gradient_moments(model: nn.Module, data: list[torch.Tensor]) -> np.ndarray:
    """``mean g g'`` at the output for the projections that seed 0 draws."""
    generator = torch.Generator().manual_seed(0)
    scale = model(data[0]).detach().double().square().mean().sqrt().float()
    rows = torch.cat([torch.randn(len(x), 5, generator=generator) / scale for x in data]).double()
    return (rows.T @ rows / len(rows)).numpy()


def test_of_two_channels_that_say_the_same_only_one_is_free() -> None:
    model, data = mlp()
    data = [torch.randn(2000, 6)]  # enough for what is seen to be believed
    with torch.no_grad():
        model[0].weight[5] = model[0].weight[2]
        model[0].bias[5] = model[0].bias[2]
    graph = traced(model, data)
    ranking = rank(graph, [graph.axes[HIDDEN]], "reconstruction", data=Data(data))[HIDDEN]
    assert ranking.order[0] in (2, 5)
    assert ranking.costs[0] < 0.3 * ranking.costs[1]
    other = 7 - ranking.order[0]
    assert ranking.costs[ranking.order.index(other)] > 3 * ranking.costs[0]


def test_a_dead_channel_goes_first_and_costs_nothing_through_a_depthwise_convolution() -> None:
    model, data = convolutional()
    with torch.no_grad():
        model[4].weight[:, 3] = 0
    graph = traced(model, data)
    ranking = rank(graph, [graph.axes[HIDDEN]], "reconstruction", data=Data(data))[HIDDEN]
    assert ranking.order[0] == 3
    assert ranking.costs[0] == pytest.approx(0, abs=1e-9)
    assert min(ranking.costs[1:]) > 0


def test_positions_with_several_columns_go_as_blocks() -> None:
    model, data = convolutional()
    graph = traced(model, data)
    axis = graph.axes["4.weight[0]"]  # read by a linear layer behind a flatten: 16 columns each
    ranking = rank(graph, [axis], "reconstruction", data=Data(data))[axis.name]
    assert sorted(ranking.order) == list(range(6))
    with torch.no_grad():
        model[7].weight[:, 16:32] = 0
    graph = traced(model, data)
    ranking = rank(graph, [graph.axes[axis.name]], "reconstruction", data=Data(data))[axis.name]
    assert ranking.order[0] == 1


class Attention(nn.Module):
    """Two heads of width 4; position 2 of the queries' and keys' width is nothing in either head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        with torch.no_grad():
            for at in (2, 6):
                self.q.weight[at] = self.q.bias[at] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))


def test_axes_that_nothing_reads_linearly_are_ranked_by_what_zeroing_them_changes() -> None:
    torch.manual_seed(0)
    model, data = Attention().eval(), list(torch.randn(12, 5, 8).split(4))
    graph = traced(model, data)
    axes = {axis.size: axis for axis in graph.axes.exact if axis.name.startswith("q.")}
    ranking = rank(graph, list(axes.values()), "reconstruction", data=Data(data))
    width = ranking[axes[4].name]
    assert width.order[0] == 2
    assert width.costs[0] == 0
    assert width.costs[1] > 0
    assert sorted(ranking[axes[2].name].order) == [0, 1]


@pytest.mark.parametrize(("samples", "width"), [(40, 200), (500, 60), (5, 300)])
def test_shrinkage_is_that_of_a_library(samples: int, width: int) -> None:
    from sklearn.covariance import oas

    generator = np.random.default_rng(0)
    data = generator.normal(size=(samples, width)) * np.linspace(0.1, 3, width)
    centred = data - data.mean(0)
    share = oas(centred, assume_centered=True)[1]
    found = shrinkage(torch.from_numpy(centred.T @ centred / samples), samples)
    assert found / (1 + found) == pytest.approx(min(share, 0.5), rel=0.05)  # it leaves out terms of 2 / width


# ---- first order ------------------------------------------------------------


@pytest.mark.parametrize("squared", [False, True])
def test_taylor_is_weight_times_gradient_of_the_users_loss(squared: bool) -> None:
    model, data = mlp()
    graph = traced(model, data)
    labels = [torch.arange(16) % 5 for _ in data]

    def loss(module: nn.Module) -> Iterator[torch.Tensor]:
        for x, y in zip(data, labels, strict=True):
            yield F.cross_entropy(module(x), y)

    name = "taylor-squared" if squared else "taylor"
    found = scores(graph, [graph.axes[HIDDEN]], name, data=Data(loss=loss))[HIDDEN]
    slopes = [
        torch.autograd.grad(value, list(model.parameters())) for value in loss(model)
    ]  # weight and bias of the first, weight of the second
    effects = torch.stack([
        torch.stack([
            (model[0].weight * first).sum(1), model[0].bias * bias, (model[2].weight * second).sum(0)
        ])
        for first, bias, second, _ in slopes
    ])  # fmt: skip
    wanted = effects.square().sum((0, 1)) if squared else effects.sum(0).abs().sum(0)
    torch.testing.assert_close(found, wanted.detach().double(), rtol=1e-4, atol=1e-7)


def test_taylor_without_a_loss_sees_what_the_outputs_depend_on() -> None:
    model, data = mlp()
    with torch.no_grad():
        model[2].weight[:, 4] = 0
    graph = traced(model, data)
    for name in ("taylor", "taylor-squared"):
        found = scores(graph, [graph.axes[HIDDEN]], name, data=Data(data))[HIDDEN]
        assert found[4] == 0
        assert (found > 0).sum() == 7


# ---- weights and activations ------------------------------------------------------------


def test_fpgm_sums_distances_between_filters() -> None:
    model, data = mlp()
    graph = traced(model, data)
    found = scores(graph, [graph.axes[HIDDEN]], "fpgm")[HIDDEN]
    total = torch.zeros(8, dtype=torch.float64)
    first, bias, second = (p.detach() for p in list(model.parameters())[:3])
    for rows in (first, bias[:, None], second.T):
        member = torch.tensor([
            sum(float((rows[i] - rows[j]).double().norm()) for j in range(8)) for i in range(8)
        ], dtype=torch.float64)  # fmt: skip
        total += member / member.mean()
    torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-6)


def test_batch_norm_scales_are_the_scores() -> None:
    model, data = convolutional()
    graph = traced(model, data)
    found = scores(graph, [graph.axes[HIDDEN]], "bn-scale")[HIDDEN]
    gamma = model[1].weight.detach().double().abs()
    torch.testing.assert_close(found, gamma / gamma.mean())


@pytest.mark.parametrize("name", ["activation-mean", "activation-var"])
def test_activations_are_what_readers_see(name: str) -> None:
    model, data = convolutional()
    graph = traced(model, data)
    axis = graph.axes["4.weight[0]"]
    found = scores(graph, [axis], name, data=Data(data))[axis.name]
    seen = torch.relu(model[:5](torch.cat(data))).detach().double().movedim(1, 0).flatten(2)
    each = seen.abs().mean(1) if name == "activation-mean" else seen.var(1, correction=0)
    wanted = each.sum(1)
    torch.testing.assert_close(found, wanted / wanted.mean(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_every_importance_gives_a_number_a_position_and_leaves_the_graph_alone(name: str) -> None:
    model, data = convolutional()
    graph = traced(model, data)
    before = graph.fingerprint()
    axes = [graph.axes[HIDDEN]]
    first = scores(graph, axes, name, seed=3, data=Data(data))[HIDDEN]
    assert first.shape == (8,)
    assert first.dtype == torch.float64
    assert bool(torch.isfinite(first).all())
    assert torch.equal(first, scores(graph, axes, name, seed=3, data=Data(data))[HIDDEN])
    assert graph.fingerprint() == before
    assert sorted(rank(graph, axes, name, seed=3, data=Data(data))[HIDDEN].order) == list(range(8))


# ---- errors ------------------------------------------------------------


def test_what_is_missing_is_said() -> None:
    model, data = mlp()
    graph = traced(model, data)
    axes = [graph.axes[HIDDEN]]
    for name in ("taylor", "reconstruction", "activation-var"):
        with pytest.raises(InputError, match=r"looks at data: give `calibration`"):
            scores(graph, axes, name)
    with pytest.raises(InputError, match="no batch norm scales it"):
        scores(graph, axes, "bn-scale")
    with pytest.raises(InputError, match="did you mean 'reconstruction'"):
        scores(graph, axes, "reconstuction")
    with pytest.raises(InputError, match="8 finite numbers"):
        scores(graph, axes, lambda graph, axis: torch.zeros(7))


def test_bad_calibration_is_an_error() -> None:
    model, data = mlp()
    graph = traced(model, data)
    axes = [graph.axes[HIDDEN]]
    broken = [data[0].clone()]
    broken[0][3, 2] = math.nan
    for calibration, words in (
        ([], "holds no inputs"), (broken, "not finite"), ([torch.zeros(4, 5)], "has shape"),
        ([data[0].double()], "captured was"), (data[0], "put it in a list"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            scores(graph, axes, "reconstruction", data=Data(calibration))


def test_a_loss_that_is_none_is_an_error() -> None:
    model, data = mlp()
    graph = traced(model, data)
    axes = [graph.axes[HIDDEN]]
    for loss, words in (
        (lambda module: module(data[0]), "finite scalar"),
        (lambda module: torch.zeros(()), "does not depend"),
        (lambda module: iter(()), "gave no value"),
        (lambda module: module(data[0]).sum() * math.inf, "finite scalar"),
    ):
        with pytest.raises(InputError, match=words):
            scores(graph, axes, "taylor", data=Data(loss=loss))
