"""``clean-up``: expected graphs; what must stay; random programs against eager PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphprune.pipeline import Pipeline
from tests.passes.rewriting import apply, assert_same, expected, text, trace


class Program(nn.Module):
    """A function as a module, with one parameter for those that want it."""

    def __init__(self, function: Any):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.arange(3.0))
        self.register_buffer("table", torch.arange(3.0) + 1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def cleaned(function: Any, *inputs: torch.Tensor) -> str:
    """The printed graph after clean-up, compared with eager on the way."""
    model = Program(function)
    inputs = inputs or (torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),)
    result = apply("clean-up", trace(model, *inputs))
    assert_same(result.graph, model, *inputs, tolerance=0)
    return text(result.graph)


NOTHING_BUT_RELU = expected("""
    x: f32[2, 3]
    relu: f32[2, 3] = relu(x)
    return (relu,)
""")

IDENTITIES = {
    "alias": lambda m, x: torch.ops.aten.alias.default(x).relu(),
    "clone": lambda m, x: x.clone().relu(),
    "contiguous after clone": lambda m, x: x.relu().clone().contiguous(),
    "to the same dtype": lambda m, x: x.to(torch.float32).relu(),
    "type_as": lambda m, x: x.relu().type_as(x),
    "detach without parameters": lambda m, x: x.detach().relu(),
    "view": lambda m, x: x.view(2, 3).relu(),
    "view of a contiguous copy": lambda m, x: x.contiguous().view(2, 3).relu(),
    "reshape": lambda m, x: x.relu().reshape(-1, 3),
    "flatten": lambda m, x: x.relu().flatten(1),
    "expand": lambda m, x: x.relu().expand(2, 3),
    "squeeze": lambda m, x: x.relu().squeeze(1),
    "permute": lambda m, x: x.permute(0, 1).relu(),
    "negative permutation": lambda m, x: x.permute(0, -1).relu(),
    "transpose": lambda m, x: x.transpose(1, -1).relu(),
    "slices": lambda m, x: x[:, 0:3][:2].relu(),
    "pad": lambda m, x: nn.functional.pad(x, (0, 0)).relu(),
    "numbers": lambda m, x: ((x * 1 + 0) / 1 - 0).relu(),
    "cat of one": lambda m, x: torch.cat([x], 1).relu(),
    "dead code": lambda m, x: (x.sin() * m.weight, x.relu())[1],
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name: str) -> None:
    assert cleaned(IDENTITIES[name]) == NOTHING_BUT_RELU


KEPT = {
    "another dtype": lambda m, x: x.double().relu(),
    "integer times a float": lambda m, x: x.int() * 1.0,
    "another layout": lambda m, x: x.t().contiguous().view(6),
    "copy of an input for the caller": lambda m, x: x.clone(),
    "view of a copy for the caller": lambda m, x: x.clone().view(3, 2),
    "strided slice": lambda m, x: x[:, ::2],
    "real permutation": lambda m, x: x.permute(1, 0),
    "broadcast": lambda m, x: x[:1].expand(2, 3),
    "floor division": lambda m, x: torch.div(x, 1, rounding_mode="floor"),
    "one, as a tensor": lambda m, x: x * m.table,
    "detach of what is trained": lambda m, x: (x * m.weight).detach() * m.weight,
    "square": lambda m, x: x.reshape(3, 2).relu(),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_has_an_effect_stays(name: str) -> None:
    model = Program(KEPT[name])
    result = apply("clean-up", trace(model, torch.randn(2, 3)))
    assert not result.changed, result.notes
    assert result.notes[0].message == "nothing to clean up"


def test_repeated_computations_merge() -> None:
    def program(m: Any, x: torch.Tensor) -> torch.Tensor:
        return (x * m.weight).sin() + (x * m.weight).sin() + (x * 2).split(2)[0] - (x * 2).split(2)[0]

    assert cleaned(program) == expected("""
        x: f32[2, 3]
        mul: f32[2, 3] = mul.Tensor(x, %weight)
        sin: f32[2, 3] = sin(mul)
        add: f32[2, 3] = add.Tensor(sin, sin)
        mul_2: f32[2, 3] = mul.Tensor(x, 2)
        split: (f32[2, 3]) = split.Tensor(mul_2, 2)
        getitem: f32[2, 3] = getitem(split, 0)
        add_1: f32[2, 3] = add.Tensor(add, getitem)
        sub: f32[2, 3] = sub.Tensor(add_1, getitem)
        return (sub,)
    """)


def test_equal_numbers_of_other_kinds_do_not_merge() -> None:
    def program(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.int()
        return y * 2, y * 2.0, torch.full((2,), True), torch.full((2,), 1), x.pow(0.0), x.pow(-0.0)

    printed = cleaned(program)
    assert printed.count("mul.Tensor") == 2
    assert printed.count("full(") == 2


def test_what_follows_the_mode_never_merges() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(x) + self.drop(x) + self.norm(x) + self.norm(x)

    graph = trace(Twice().eval(), torch.randn(4, 3))
    assert not apply("clean-up", graph).changed


def test_random_draws_never_merge() -> None:
    graph = trace(Program(lambda m, x: torch.rand_like(x) - torch.rand_like(x)), torch.randn(2, 3))
    assert not apply("clean-up", graph).changed


def test_unused_tensors_are_named() -> None:
    graph = trace(Program(lambda m, x: x * m.weight + m.table), torch.randn(2, 3))
    (add,) = graph.find(torch.ops.aten.add.Tensor)
    add.replace_all_uses_with(add.args[0])  # type: ignore[arg-type]
    result = apply("clean-up", graph)
    assert set(result.graph.tensors) == {"weight"}
    assert ("table", "is read by no operator: removed") in {(n.where, n.message) for n in result.notes}


def test_a_removed_copy_leaves_a_reshape_that_takes_any_layout() -> None:
    class Head(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu().clone(memory_format=torch.contiguous_format).view(x.shape[0], -1)

    x = torch.randn(2, 3, 6, 6)
    result = apply("clean-up", trace(Head(), x))
    assert "clone" not in text(result.graph)
    assert_same(result.graph, Head(), x.to(memory_format=torch.channels_last), tolerance=0)


def test_training_stays_what_it_was() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(self.first(x).clone() * 1)
            return self.last(h.sin()) + self.last(h.sin()).detach()

    torch.manual_seed(0)
    model = Net()
    eager = copy.deepcopy(model)
    result = apply("clean-up", trace(model, torch.randn(5, 3)))
    assert result.changed
    module = result.graph.module.train()
    data = torch.randn(6, 3)
    for trained in (module, eager):
        trained(data).square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    for name, buffer in eager.named_buffers():
        if "num_batches" not in name:
            torch.testing.assert_close(dict(module.named_buffers())[name], buffer)


def test_dynamic_batch_slices() -> None:
    model = Program(lambda m, x: x[: x.shape[0]].reshape(x.shape).relu())
    result = apply("clean-up", trace(model, torch.randn(2, 3), dynamic_batch=True))
    assert text(result.graph).count(" = ") == 1
    assert_same(result.graph, model, torch.randn(5, 3), tolerance=0)


STEPS: list[Any] = [
    lambda v: v * 1, lambda v: v + 0, lambda v: v.clone(), lambda v: v.view(v.shape), lambda v: v.sin(),
    lambda v: v.t().contiguous().t(), lambda v: v.flip(0), lambda v: v.permute(0, 1), lambda v: v[:, :],
    lambda v: v + v.sin(), lambda v: v.reshape(3, 2).reshape(2, 3), lambda v: torch.cat([v]),
    lambda v: v * 1.5, lambda v: v.contiguous().view(2, 3) - v.cos(),
]  # fmt: skip


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, len(STEPS) - 1), min_size=1, max_size=6))
def test_random_programs(chosen: list[int]) -> None:
    def program(m: Any, x: torch.Tensor) -> torch.Tensor:
        for index in chosen:
            x = STEPS[index](x)
        return x

    model, x = Program(program), torch.randn(2, 3)
    graph = trace(model, x)
    result = apply("clean-up", graph)
    assert_same(result.graph, model, x, tolerance=0)
    assert not apply("clean-up", result.graph).changed, "a second time there must be nothing left"


def test_textual_form() -> None:
    assert str(Pipeline.parse("clean-up")) == "clean-up"
