"""Masks that a schedule drives: how many, which, that they never give back, and that training can go on."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from graphprune.passes.train import Train
from torch import Tensor, nn

import graphprune
from graphprune.errors import InputError
from graphprune.module import TracedModule
from graphprune.pipeline import Pipeline
from graphprune.train import Constant, Cubic, Polynomial, Sparsify

from .networks import batches, net, train

WEIGHTS = ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "head"]
OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    lambda p: torch.optim.Rprop(p, lr=0.01),
    lambda p: torch.optim.Adagrad(p, lr=0.01),
]


def weights(module: TracedModule) -> dict[str, Tensor]:
    return {f"{name}.weight": module.get_parameter(f"{name}.weight") for name in WEIGHTS}


class Watch:
    """Every step's masks and weights."""

    def __init__(self, sparsify: Sparsify):
        self.sparsify = sparsify
        self.masks = [self._now()]

    def _now(self) -> dict[str, Tensor]:
        return {name: mask.clone() for name, mask in self.sparsify.masks.items()}

    def step(self) -> None:
        self.masks.append(self._now())
        for name, mask in self.masks[-1].items():
            assert not self.sparsify.module.get_parameter(name)[mask == 0].any(), (
                "the parameter itself is zero"
            )


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_what_went_never_comes_back(make: Any) -> None:
    _, module = net()
    before = weights(module)
    optimizer = make(module.parameters())
    train(module, optimizer, batches(3))
    sparsify = Sparsify(module, Cubic(initial=0.2, final=0.8, end=10, frequency=2), optimizer=optimizer)
    watch = Watch(sparsify)
    train(module, optimizer, batches(14), [sparsify, watch])
    assert weights(module).keys() == before.keys()
    assert all(weights(module)[name] is before[name] for name in before), "the same parameters"
    for name, weight in weights(module).items():
        for early, late in pairwise(watch.masks):
            assert (late[name] <= early[name]).all()
        zeros = int((weight == 0).sum())
        assert zeros == int((watch.masks[-1][name] == 0).sum()) == round(0.8 * weight.numel())
        assert weight.abs().sum() > 0
        for key, value in optimizer.state[weight].items():
            if isinstance(value, Tensor) and value.shape == weight.shape and key != "step_size":
                assert not value[weight == 0].any(), "nor is there a momentum that would move it"
    assert sparsify.sparsity == pytest.approx(0.8, abs=1e-3)


def test_sparsity_follows_the_schedule_and_only_where_it_is_due() -> None:
    _, module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    schedule = Polynomial(initial=0.5, final=0.8, begin=2, end=8, frequency=3, power=1.0)
    sparsify = Sparsify(module, schedule, optimizer=optimizer)
    assert sparsify.sparsity == 0
    found = []
    for batch in batches(9):
        train(module, optimizer, [batch], [sparsify])
        found.append(round(sparsify.sparsity, 2))
    assert found == [0, 0.5, 0.5, 0.5, 0.65, 0.65, 0.65, 0.8, 0.8]


def test_without_a_step_it_computes_what_it_did() -> None:
    model, module = net()
    Sparsify(module, Cubic(final=0.5, begin=1, end=10))
    data = batches(1)[0][0]
    torch.testing.assert_close(module(data), model(data))
    module.train()
    assert module.training
    torch.testing.assert_close(module(data), copy.deepcopy(model).train()(data))


@pytest.mark.parametrize("scope", ["local", "global"])
def test_the_smallest_go(scope: str) -> None:
    _, module = net()
    old = {name: weight.detach().clone() for name, weight in weights(module).items()}
    sparsify = Sparsify(module, Constant(0.6), scope=scope)
    groups = [old] if scope == "global" else [{name: value} for name, value in old.items()]
    for group in groups:
        values = torch.cat([value.abs().flatten() for value in group.values()])
        masks = torch.cat([sparsify.masks[name].flatten() for name in group]).bool()
        count = round(0.6 * len(values))
        assert int((~masks).sum()) == count
        assert values[masks].min() >= values.sort().values[count - 1]


def test_gradients_since_the_last_step_that_was_due_decide() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5, bias=False)
    module = graphprune.trace(linear, torch.randn(2, 6)).module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    schedule = Polynomial(final=0.6, begin=1, end=4, frequency=3)
    sparsify = Sparsify(module, schedule, optimizer=optimizer, importance="gradient")
    weight, total = module.get_parameter("weight"), torch.zeros(5, 6)
    for step in range(1, 5):
        module(torch.randn(2, 6)).square().sum().backward()
        total = weight.grad.clone() if step == 2 else total + weight.grad
        optimizer.step()
        worth = (weight.detach() * total).abs()
        sparsify.step()
        optimizer.zero_grad()
    mask = sparsify.masks["weight"].bool()
    assert int((~mask).sum()) == 18
    assert worth[mask].min() >= worth[~mask].max()


def test_gradients_that_are_gone_or_not_there_yet() -> None:
    _, module = net()
    with pytest.raises(InputError, match="none before step 1"):
        Sparsify(module, Constant(0.5), importance="gradient")
    sparsify = Sparsify(module, Constant(0.5, begin=1), importance="gradient")
    with pytest.raises(InputError, match="zero_grad"):
        sparsify.step()


def test_two_of_four_by_way_of_three() -> None:
    _, module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    schedule = Polynomial(final=0.5, end=4, frequency=1, power=1.0)
    sparsify = Sparsify(module, schedule, optimizer=optimizer, pattern="2:4", ignored=("stem",))
    kept = []
    for batch in batches(4):
        train(module, optimizer, [batch], [sparsify])
        head = sparsify.masks["head.weight"].reshape(-1, 4).sum(1)
        kept.append(set(head.tolist()))
    assert kept == [{4.0}, {3.0}, {3.0}, {2.0}]
    assert "stem.weight" not in sparsify.masks
    with pytest.raises(InputError, match="final sparsity"):
        Sparsify(net()[1], Cubic(final=0.8, end=4), pattern="2:4")


@pytest.mark.parametrize("only", ["head", "head.weight"])
def test_blocks_of_a_module_or_of_a_weight_by_name(only: str) -> None:
    _, module = net()
    sparsify = Sparsify(module, Constant(0.5), pattern="4x4", only=(only,))
    (mask,) = sparsify.masks.values()
    assert sorted(mask.reshape(4, 2, 4).sum((0, 2)).tolist()) == [0, 16]


def test_a_process_that_was_killed_goes_on_where_it_was() -> None:
    data = batches(10)

    def start() -> tuple[TracedModule, torch.optim.Optimizer, Sparsify]:
        _, module = net()
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        schedule = Cubic(initial=0.1, final=0.7, begin=1, end=10, frequency=3)
        return module, optimizer, Sparsify(module, schedule, optimizer=optimizer, importance="gradient")

    whole = start()
    train(whole[0], whole[1], data, [whole[2]])
    first = start()
    train(first[0], first[1], data[:6], [first[2]])
    states = copy.deepcopy([thing.state_dict() for thing in first])
    again = start()
    thing: Any
    for thing, state in zip(again, states, strict=True):
        thing.load_state_dict(state)
    train(again[0], again[1], data[6:], [again[2]])
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, again[0].state_dict()[name]), name
    assert again[2].steps == whole[2].steps == 10


def test_a_state_of_another_network_is_refused() -> None:
    state = Sparsify(net()[1], Constant(0.5)).state_dict()
    with pytest.raises(InputError, match=r"head\.weight"):
        Sparsify(net()[1], Constant(0.5), ignored=("head",)).load_state_dict(state)


def test_strip_makes_zeros_permanent_and_keeps_the_parameters() -> None:
    _, module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    sparsify = Sparsify(module, Constant(0.75), optimizer=optimizer)
    train(module, optimizer, batches(2), [sparsify])
    data, before = batches(1)[0][0], weights(module)
    wanted = module(data)
    assert any(name.endswith("_mask") for name in module.state_dict())
    sparsify.strip()
    assert not any(name.endswith("_mask") for name in module.state_dict())
    assert all(weights(module)[name] is before[name] for name in before)
    torch.testing.assert_close(module(data), wanted)
    assert all(round(0.75 * w.numel()) == int((w == 0).sum()) for w in before.values())
    assert sparsify.masks == {}
    assert sparsify.sparsity == pytest.approx(0.75, abs=0.01)
    sparsify.strip()  # once more is nothing more
    with pytest.raises(InputError, match=r"masks were stripped, .* a new Sparsify"):
        sparsify.step()
    train(module, optimizer, batches(1))  # and it trains on
    assert sparsify.sparsity < 0.1


def test_the_graph_of_the_module_has_the_masks_too() -> None:
    model, _ = net()
    graph = graphprune.trace(model, torch.randn(2, 3, 8, 8))
    module = graph.module
    Sparsify(module, Constant(0.5))
    assert "head.weight_mask" in graph.tensors
    assert graph.module is module
    torch.testing.assert_close(graph(graph.examples[0]), module(graph.examples[0]))
    folded = Pipeline.parse("fold-parameters").run(module.captured).graph
    assert not any("_mask" in name for name in folded.tensors)
    torch.testing.assert_close(folded(graph.examples[0]), module(graph.examples[0]))


def test_sparsify_in_training_between_passes() -> None:
    model, _ = net()

    def callback(module: TracedModule, step: int) -> None:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        train(module, optimizer, batches(1), [Sparsify(module, Constant(0.25 * step), optimizer=optimizer)])

    graph = graphprune.trace(model, torch.randn(2, 3, 8, 8), dynamic_batch=True)
    twice = Pipeline((Train(callback, 1), Train(callback, 2))).run(graph).graph
    assert float((twice.tensors["head.weight_mask"] == 0).float().mean()) == 0.5
    assert "head.weight_mask" not in graph.tensors


def test_notes_say_what_stays_dense_and_what_is_not_reached() -> None:
    _, module = net()
    schedule = Polynomial(final=0.8, end=211, frequency=100)
    sparsify = Sparsify(module, schedule, pattern="4x6", ignored=("blocks.0",))
    texts = {note.where: note.message for note in sparsify.notes}
    assert texts[""].startswith("the last step that is due is 200")
    with pytest.raises(InputError, match="no weight to prune"):
        Sparsify(net()[1], Constant(0.5), pattern="64x64")
    with pytest.raises(InputError, match=r"graphprune\.trace"):
        Sparsify(nn.Linear(2, 2), Constant(0.5))  # type: ignore[arg-type]
