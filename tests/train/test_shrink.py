"""Channels that go while a network trains: the budget, the optimizer's state against slicing by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune
from graphprune.cost import cost
from graphprune.errors import AxisError, InputError
from graphprune.module import TracedModule
from graphprune.train import (
    Constant,
    Cubic,
    GroupLasso,
    Polynomial,
    Shrink,
    Sparsify,
    StochasticDepth,
    finetune,
    remove,
)

from .networks import batches, net, train

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}

# The inner channels of the first block, 0, 3 and 6 of which go: parameter → dimension.
GONE, KEPT = [0, 3, 6], [1, 2, 4, 5, 7]
CUT = {
    "blocks.0.conv1.weight": 0,
    "blocks.0.bn1.weight": 0,
    "blocks.0.bn1.bias": 0,
    "blocks.0.conv2.weight": 1,
}


def by_hand(value: Tensor, dim: int, width: int = 8) -> Tensor:
    """The kept positions of a dimension, if the tensor has it at its full size."""
    return value if value.shape[dim] != width else torch.stack([value.select(dim, i) for i in KEPT], dim)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizers_state_is_sliced_with_its_parameters(kind: str) -> None:
    _, module = net()
    named = dict(module.named_parameters())
    places = [[n for n, p in named.items() if p.dim() > 1], [n for n, p in named.items() if p.dim() == 1]]
    groups = [
        {"params": [named[n] for n in places[0]]},
        {"params": [named[n] for n in places[1]], "lr": 0.003},
    ]
    optimizer = OPTIMIZERS[kind](groups)
    train(module, optimizer, batches(2))
    before = {n: (p.detach().clone(), copy.deepcopy(optimizer.state[p])) for n, p in named.items()}
    loss = nn.functional.cross_entropy(module(batches(1)[0][0]), batches(1)[0][1])
    loss.backward()
    slopes = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}

    remove(module, module.captured.plan({"blocks.0.conv1.weight[0]": GONE}), optimizer)

    after = dict(module.named_parameters())
    assert after.keys() == named.keys()
    for name, parameter in after.items():
        value, state = before[name]
        dim = CUT.get(name)
        if dim is None:
            assert parameter is named[name]
            wanted, slope = value, slopes[name]
        else:
            wanted, slope = by_hand(value, dim), by_hand(slopes[name], dim)
        assert torch.equal(parameter, wanted), name
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, slope), name
        found = optimizer.state[parameter]
        assert found.keys() == state.keys()
        for key, entry in state.items():
            if isinstance(entry, Tensor) and entry.dim() and dim is not None:
                entry = by_hand(entry, dim)
            assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(entry)), (name, key)
    held = {id(p) for p in after.values()}
    assert {id(p) for p in optimizer.state} <= held
    for names, group in zip(places, optimizer.param_groups, strict=True):
        assert [id(p) for p in group["params"]] == [id(after[n]) for n in names]
    train(module, optimizer, batches(2))
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_training_goes_on_as_if_the_network_had_always_been_small() -> None:
    """The steps after a removal are those of a small network whose optimizer was loaded with sliced state."""
    _, module = net()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    train(module, optimizer, batches(3))
    remove(module, module.captured.plan({"blocks.0.conv1.weight[0]": GONE}), optimizer)
    twin = copy.deepcopy(module)
    other = torch.optim.Adam(twin.parameters(), lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, opt in ((module, optimizer), (twin, other)):
        train(one, opt, batches(3, seed=5))
    for (name, mine), theirs in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_the_budget_follows_the_schedule() -> None:
    _, module = net(width=16)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    whole = cost(module.captured).macs
    schedule = Polynomial(initial=0.2, final=0.6, begin=2, end=6, frequency=2, power=1.0)
    shrink = Shrink(module, schedule, optimizer=optimizer)
    identity, found = id(module), []
    for batch in batches(8):
        train(module, optimizer, [batch], [shrink])
        found.append(cost(module.captured).macs / whole)
        assert shrink.sparsity == pytest.approx(1 - found[-1])
    step = 0.13  # of the wide residual axis, which all convolutions share
    for share, wanted in zip(found, [1, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.4], strict=True):
        assert wanted - step < share <= wanted
    assert found[0] == 1
    assert id(module) == identity
    assert len(shrink.plans) == 3


def test_shares_of_axes_are_of_their_first_size() -> None:
    _, module = net(width=16)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    schedule = Polynomial(final=0.7, end=6, frequency=1, power=1.0)
    shrink = Shrink(module, schedule, optimizer=optimizer, budget="params", minimum=0.5)
    train(module, optimizer, batches(6), [shrink])
    assert min(p.shape[0] for n, p in module.named_parameters() if "conv" in n) == 8


def test_an_end_out_of_reach_is_said_at_once() -> None:
    with pytest.raises(InputError, match="cannot be reached"):
        Shrink(net()[1], Cubic(final=0.9, end=10), optimizer=None, minimum=0.9)
    with pytest.raises(InputError, match="unknown budget"):
        Shrink(net()[1], Constant(0.5), optimizer=None, budget="latency")


def test_the_model_gets_its_channels_back_in_its_own_class() -> None:
    model, module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    shrink = Shrink(module, Constant(0.5, begin=1), optimizer=optimizer)
    train(module, optimizer, batches(2), [shrink])
    small = module.captured.write_back(model)
    data = batches(1)[0][0]
    torch.testing.assert_close(small(data), module(data))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert {n: p.shape for n, p in small.named_parameters()} == {
        n: p.shape for n, p in module.named_parameters()
    }


def test_a_process_that_was_killed_goes_on_where_it_was() -> None:
    data = batches(8)

    def start() -> tuple[TracedModule, torch.optim.Optimizer, Shrink]:
        _, module = net()
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        schedule = Polynomial(final=0.6, begin=1, end=7, frequency=3, power=1.0)
        return module, optimizer, Shrink(module, schedule, optimizer=optimizer)

    whole = start()
    train(whole[0], whole[1], data, [whole[2]])
    first = start()
    train(first[0], first[1], data[:5], [first[2]])
    states: list[Any] = [copy.deepcopy(thing.state_dict()) for thing in first]  # type: ignore[attr-defined]
    module, optimizer, shrink = start()
    shrink.load_state_dict(states[2])
    module.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    train(module, optimizer, data[5:], [shrink])
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name
    with pytest.raises(InputError, match="shrunk already"):
        shrink.load_state_dict(states[2])
    with pytest.raises(InputError, match="at first"):
        Shrink(net(width=12)[1], Constant(0.1, begin=1), optimizer=None).load_state_dict(states[2])


def test_zeros_and_channels_go_side_by_side() -> None:
    _, module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)
    zeros = Sparsify(module, Cubic(final=0.5, begin=1, end=6, frequency=1), optimizer=optimizer,
                     importance="gradient")  # fmt: skip
    shrink = Shrink(module, Cubic(final=0.5, begin=1, end=6, frequency=2), optimizer=optimizer)
    train(module, optimizer, batches(7), [zeros, shrink])
    assert shrink.sparsity >= 0.49
    for name, mask in zeros.masks.items():
        weight = module.get_parameter(name)
        assert mask.shape == weight.shape
        assert not weight[mask == 0].any()
    assert 0.4 < zeros.sparsity < 0.6


def test_finetune_drives_them_and_goes_on_after_a_stop() -> None:
    data = batches(6)

    def run(**options: Any) -> TracedModule:
        _, module = net()
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        zeros = Sparsify(module, Cubic(final=0.5, begin=1, end=18, frequency=1), optimizer=optimizer,
                         importance="gradient")  # fmt: skip
        shrink = Shrink(module, Cubic(final=0.5, begin=1, end=18, frequency=4), optimizer=optimizer)
        with StochasticDepth(module, 0.3):
            finetune(
                module, data, nn.functional.cross_entropy, optimizer=optimizer, epochs=3,
                after_step=[zeros, shrink], penalties=[GroupLasso(module, 1e-3)], **options,
            )  # fmt: skip
        assert shrink.sparsity > 0.4
        assert zeros.steps == shrink.steps == 18
        return module

    saved: list[Any] = []
    whole = run(on_epoch=lambda state: saved.append(state.state_dict()))
    again = run(resume=saved[1])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("axis", ["stem.weight[0]", "blocks.1.conv1.weight[0]"], ids=["first", "later"])
def test_a_state_that_cannot_be_cut_is_refused_before_anything_changes(axis: str) -> None:
    """L-BFGS keeps everything for the first parameter, which the plan may leave alone."""
    _, module = net()
    optimizer, closure = lbfgs(module)
    optimizer.step(closure)
    before = {name: (id(p), tuple(p.shape)) for name, p in module.named_parameters()}
    plan = module.captured.plan({axis: [0]})
    with pytest.raises(InputError, match=r"LBFGS keeps '\w+'.* for ('stem\.weight'|a parameter that stays)"):
        remove(module, plan, optimizer)
    assert {name: (id(p), tuple(p.shape)) for name, p in module.named_parameters()} == before


def test_an_optimizer_that_knows_its_parameters_by_another_name_goes_on_with_the_new_ones() -> None:
    _, module = net()
    optimizer, closure = lbfgs(module)
    remove(module, module.captured.plan(ratio=0.5), optimizer)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer.step(closure)
    assert not any(torch.equal(p, before[name]) for name, p in module.named_parameters())


def lbfgs(module: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[], Tensor]]:
    """The optimizer, and the closure that its steps take."""
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module(batches(1)[0][0]).square().mean()
        loss.backward()
        return loss

    return optimizer, closure


def test_a_plan_of_another_network() -> None:
    plan = net(width=12)[1].captured.plan({"stem.weight[0]": [0]})
    with pytest.raises(AxisError, match="another network"):
        remove(net()[1], plan)


def test_an_optimizer_of_another_network_is_refused() -> None:
    model, module = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: id(p) for name, p in module.named_parameters()}
    with pytest.raises(InputError, match="SGD given holds none"):
        remove(module, module.captured.plan({"stem.weight[0]": [0]}), optimizer)
    with pytest.raises(InputError, match="SGD given holds none"):
        Shrink(module, Constant(0.5), optimizer=optimizer)
    with pytest.raises(InputError, match="SGD given holds none"):
        Sparsify(module, Constant(0.5), optimizer=optimizer)
    assert {name: id(p) for name, p in module.named_parameters()} == before
    head = torch.optim.SGD([module.get_parameter("head.weight"), module.get_parameter("head.bias")], lr=0.1)
    sparsify = Sparsify(module, Constant(0.5), optimizer=head)
    assert {note.where for note in sparsify.notes} == sparsify.masks.keys() - {"head.weight"}
    Shrink(module, Constant(0.5), optimizer=head)
    assert head.param_groups[0]["params"][0] is module.get_parameter("head.weight")


def test_heads_of_attention_go_too() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True, dropout=0.0)
    module = graphprune.trace(layer, torch.randn(2, 5, 16)).module
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    shrink = Shrink(module, Constant(0.4, begin=1), optimizer=optimizer, scope="local")
    data = [(torch.randn(2, 5, 16), torch.randint(5, (2, 16))) for _ in range(3)]
    train(module, optimizer, data, [shrink])
    assert module.get_parameter("self_attn.in_proj_weight").shape[0] < 48
    assert module.get_parameter("linear1.weight").shape[0] < 32
    for parameter in module.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
