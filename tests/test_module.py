"""The traced module: it trains, saves and copies as the original does."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune.graph import Graph


class Net(nn.Module):
    """Convolution, batch norm, dropout, a tied pair of linears."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.first, self.last = nn.Dropout(0.5), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.register_buffer("offset", torch.full((4,), 0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3)) + self.offset
        return self.last(self.drop(self.first(x)))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def data(seed: int = 0) -> torch.Tensor:
    return torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def trace(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> Graph:
    return graphprune.trace(model, inputs or (data(),), **options)


def test_modes_follow(model: Net) -> None:
    module = trace(model).module
    assert not module.training
    torch.testing.assert_close(module(data()), model(data()))
    for mode in (True, False, True):
        module.train(mode)
        model.train(mode)
        torch.manual_seed(3)
        found = module(data(1))
        torch.manual_seed(3)
        torch.testing.assert_close(found, model(data(1)))


def test_training_steps_are_the_originals(model: Net) -> None:
    module = trace(model).module
    for trained in (module, model):
        trained.train()
        optimiser = torch.optim.SGD(trained.parameters(), lr=0.1)
        for step in range(3):
            torch.manual_seed(step)
            optimiser.zero_grad()
            trained(data(step)).square().mean().backward()
            optimiser.step()
        trained.eval()
    state = module.state_dict()
    for name, value in model.state_dict().items():
        if "num_batches_tracked" not in name:
            torch.testing.assert_close(state[name], value, msg=name)
    assert model.norm.running_mean is not None
    assert model.norm.running_mean.count_nonzero() == 4, "statistics moved"
    torch.testing.assert_close(module(data(9)), model(data(9)))


def test_state_dict_has_the_originals_names(model: Net) -> None:
    module = trace(model).module
    counted = {n for n in model.state_dict() if "num_batches_tracked" in n}
    assert set(module.state_dict()) == set(model.state_dict()) - counted
    assert "offset" not in module.state_dict()
    assert set(dict(module.named_parameters())) == set(dict(model.named_parameters()))
    other = Net().eval()
    other.load_state_dict(module.state_dict(), strict=False)
    torch.testing.assert_close(other(data()), model(data()))
    randomised = {k: torch.randn_like(v) for k, v in module.state_dict().items() if "running_var" not in k}
    module.load_state_dict(randomised, strict=False)
    other.load_state_dict(randomised, strict=False)
    torch.testing.assert_close(module(data()), other(data()))


def test_ties_stay_tied(model: Net) -> None:
    graph = trace(model)
    assert graph.tied == {"last.weight": "first.weight"}
    module = graph.module
    assert module.get_parameter("last.weight") is module.get_parameter("first.weight")
    assert len(list(module.parameters())) == len(list(model.parameters()))


def test_training_the_module_leaves_the_original_alone(model: Net) -> None:
    before = copy.deepcopy(model.state_dict())
    module = trace(model).module.train()
    module(data()).sum().backward()
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_the_module_trains_the_graph(model: Net) -> None:
    graph = trace(model)
    before = graph.run(data())[0]
    with torch.no_grad():
        graph.module.get_parameter("conv.weight").mul_(2)
    assert not torch.equal(graph.run(data())[0], before)
    torch.testing.assert_close(graph.run(data())[0], graph.module(data()))


def test_deep_copies_are_independent(model: Net) -> None:
    module = trace(model).module.train()
    module(data()).sum().backward()
    twin = copy.deepcopy(module)
    assert twin.training
    assert twin.get_parameter("last.weight") is twin.get_parameter("first.weight")
    for (name, one), (other_name, other) in zip(
        module.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert name == other_name
        assert one is not other
        assert torch.equal(one, other)
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
    with torch.no_grad():
        twin.get_parameter("conv.bias").add_(1)
    assert not torch.equal(module.get_parameter("conv.bias"), twin.get_parameter("conv.bias"))
    assert not torch.equal(twin.eval()(data()), module.eval()(data()))


def test_a_module_is_not_pickled(model: Net) -> None:
    with pytest.raises(TypeError, match="save its state_dict"):
        pickle.dumps(trace(model).module)


def test_a_module_is_captured_again_without_exporting(model: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    module = trace(model).module
    with torch.no_grad():
        module.get_parameter("conv.bias").add_(1)

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("exported again")

    monkeypatch.setattr(torch.export, "export", never)
    again = graphprune.trace(module)
    torch.testing.assert_close(again.run(data())[0], module(data()))
    assert str(again) == str(module.captured)


def test_frozen_statistics_stay_frozen() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n = self.norm
            return nn.functional.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False)

    module = trace(Frozen().eval()).module.train()
    before = module.state_dict()["norm.running_mean"].clone()
    module(data())
    assert torch.equal(module.state_dict()["norm.running_mean"], before)
    torch.testing.assert_close(module(data()), Frozen()(data()))


def test_statistics_that_are_not_tracked_are_the_batches() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)).eval()
    module = trace(model).module
    for mode in (True, False):
        torch.testing.assert_close(module.train(mode)(data(2)), model.train(mode)(data(2)))


def test_weight_standardisation_is_no_batch_norm_of_the_mode() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = self.weight.reshape(1, self.out_channels, -1)
            weight = nn.functional.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
            return self._conv_forward(x, weight, self.bias)

    model = Standardised(3, 4, 3).eval()
    module = trace(model).module
    for mode in (True, False):
        torch.testing.assert_close(module.train(mode)(data()), model.train(mode)(data()))


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_dropout_follows(need_weights: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x, x, x, need_weights=need_weights)[0]

    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 5, 8)
    module = trace(model, x).module
    torch.testing.assert_close(module(x), model(x))
    module.train()
    model.train()
    torch.manual_seed(1)
    found = module(x)
    torch.manual_seed(1)
    torch.testing.assert_close(found, model(x))
    assert not torch.equal(module(x), module(x))
    torch.testing.assert_close(module.eval()(x), model.eval()(x))


def test_devices_and_precision_move_with_to(model: Net) -> None:
    module = copy.deepcopy(trace(model).module).to(torch.float64)
    torch.testing.assert_close(module(data().double()), model.double()(data().double()))


def test_hooks_and_parameters_to_vector(model: Net) -> None:
    module = trace(model).module
    seen: list[tuple[int, ...]] = []
    module.register_forward_hook(lambda m, inputs, output: seen.append(tuple(output.shape)))
    module(data())
    assert seen == [(5, 4)]
    assert nn.utils.parameters_to_vector(module.parameters()).numel() == sum(
        p.numel() for p in model.parameters()
    )


def test_frozen_parameters_stay_frozen(model: Net) -> None:
    model.conv.requires_grad_(False)
    module = trace(model).module
    assert not module.get_parameter("conv.weight").requires_grad
    assert module.get_parameter("first.weight").requires_grad


class Structured(nn.Module):
    """A mapping out, a keyword in, a batch norm and a dropout that follow the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout()

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor) -> dict[str, Any]:
        return {"moved": self.drop(self.norm(self.layer(x))) + shift, "count": 3}


@pytest.mark.parametrize("dynamic", [False, True])
def test_captured_again_with_inputs_of_another_size(dynamic: bool) -> None:
    torch.manual_seed(0)
    model = Structured().eval()
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    first = graphprune.trace(model, (torch.randn(2, 3),), {"shift": torch.randn(2, 2)})
    x, shift = torch.randn(5, 3), torch.randn(5, 2)
    given = () if dynamic else ((x,), {"shift": shift})
    again = graphprune.trace(first.module, *given, dynamic_batch=dynamic)
    found, wanted = again(x, shift=shift), model(x, shift=shift)
    assert found["count"] == 3
    torch.testing.assert_close(found["moved"], wanted["moved"])
    assert list(again.tensors) == list(first.tensors)
    marks = [node.meta.get("follows_training") for node in again.nodes]
    assert sum(map(bool, marks)) == 2, "normalisation and dropout follow the mode"
    single = nn.Linear(3, 2).eval()
    result = graphprune.optimize(single, torch.ones(1, 3), measure=False)
    twice = graphprune.optimize(result.module, torch.ones(4, 3), measure=False)
    assert twice(x[:4]).shape == (4, 2), "a tensor, not a tuple with one"


class Tied(nn.Module):
    """A weight that two linears share, a batch norm, and a buffer that no state has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("offset", torch.full((6,), 0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x).relu() + self.second(x)) + self.offset)


def test_a_module_takes_on_a_rewrite_in_place() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3)
    graph = trace(Tied().eval(), x)
    module = graph.module
    module.train()
    last = module.get_parameter("last.bias")
    captured = module.captured
    (axis,) = captured.axes.exact
    small = captured.apply(captured.plan({axis.name: [1, 4]}))
    wanted = small.copy().module
    module.become(small)
    assert module.training
    assert graph.module is module
    assert graph.tensors["last.weight"] is module.get_parameter("last.weight")
    assert module.get_parameter("last.bias") is last, "what both have stays the same object"
    assert module.get_parameter("second.weight") is module.get_parameter("first.weight")
    assert module.get_parameter("first.weight").shape == (4, 3)
    assert module.get_buffer("norm.running_mean").shape == (4,)
    assert "offset" not in module.state_dict()
    assert set(module.state_dict()) == set(wanted.state_dict())
    torch.testing.assert_close(module(x), copy.deepcopy(wanted).train()(x))
    assert not torch.equal(module.get_buffer("norm.running_mean"), wanted.get_buffer("norm.running_mean"))
