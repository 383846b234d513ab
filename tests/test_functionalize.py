"""In-place programs against eager: whatever aliases what, every reader sees what eager shows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.errors import CaptureError


class Program(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 4))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def check(function: Any) -> graphprune.graph.Graph:
    """Capture and compare with eager on other numbers; nothing in-place may be left."""
    generator = torch.Generator().manual_seed(0)
    example_input, x = (torch.randn(4, 4, generator=generator) for _ in range(2))
    model = Program(function).eval()
    before = example_input.clone()
    graph = graphprune.trace(model, example_input)
    assert torch.equal(example_input, before), "capture wrote into the example"
    with torch.no_grad():
        wanted = model(x.clone())
    found = graph(x.clone())
    for a, b in zip(*(torch.utils._pytree.tree_leaves(v) for v in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b)
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable, f"{node} is still in-place"
    return graph


CASES: dict[str, Any] = {
    "relu": lambda m, x: (x * 2).relu_(),
    "add, read before and after": lambda m, x: _add(x),
    "base written, view read": lambda m, x: _base_written(x),
    "view written, base read": lambda m, x: _view_written(x),
    "view of a view": lambda m, x: _view_of_view(x),
    "slice written": lambda m, x: _slice_written(x),
    "broadcast into a row": lambda m, x: _row(x),
    "column by number": lambda m, x: _fill(x),
    "index put": lambda m, x: _index_put(x),
    "masked fill": lambda m, x: (x + 1).masked_fill_(x > 0, 2.0),
    "split parts written": lambda m, x: _split(x),
    "unbind written": lambda m, x: _unbind(x),
    "transposed view written": lambda m, x: _transposed(x),
    "swap": lambda m, x: _swap(x),
    "chain": lambda m, x: (x * 1).add_(1).mul_(m.weight).sub_(x).clamp_(min=0),
    "zero": lambda m, x: _zero(x),
    "copy": lambda m, x: torch.empty_like(x).copy_(x),
    "reshape that may copy": lambda m, x: _reshape(x),
    "expanded read": lambda m, x: _expanded(x),
    "in-place in a loop": lambda m, x: _loop(x),
    "cast in copy": lambda m, x: _cast(x),
}  # fmt: skip


def _add(x: torch.Tensor) -> Any:
    y = x * 2
    before = y.sin()
    y.add_(1)
    return before, y, y.cos()


def _base_written(x: torch.Tensor) -> Any:
    y = x * 2
    view = y[1]
    y.mul_(3)
    return view + 1, y


def _view_written(x: torch.Tensor) -> Any:
    y = x * 2
    y[1].add_(5)
    return y * 1


def _view_of_view(x: torch.Tensor) -> Any:
    y = x * 2
    y[1:][:, 2:].mul_(5)
    return y + 0


def _slice_written(x: torch.Tensor) -> Any:
    y = x * 2
    y[:, 1:3] = x[:, :2]
    z = y + 1
    y[0] = 7
    return z, y


def _row(x: torch.Tensor) -> Any:
    y = torch.zeros(4, 4)
    y[2] = x[0]
    y[:, 1] = x.sum()
    return y


def _fill(x: torch.Tensor) -> Any:
    y = x + 1
    y[:, 0].fill_(3)
    return y.exp()


def _index_put(x: torch.Tensor) -> Any:
    y = x + 1
    y[torch.tensor([0, 2])] = x[torch.tensor([1, 3])]
    return y


def _split(x: torch.Tensor) -> Any:
    y = x * 2
    a, b = y.split(2, dim=1)
    a.add_(1)
    return y, b, a


def _unbind(x: torch.Tensor) -> Any:
    y = x * 2
    parts = y.unbind(0)
    parts[0].mul_(2)
    return y, parts[0]


def _transposed(x: torch.Tensor) -> Any:
    y = x * 2
    y.t()[0].add_(1)
    return y


def _swap(x: torch.Tensor) -> Any:
    y = x * 2
    kept = y[0].clone()
    y[0] = y[1]
    y[1] = kept
    return y


def _zero(x: torch.Tensor) -> Any:
    y = x * 2
    z = y.view(16)
    y.zero_()
    return z, y


def _reshape(x: torch.Tensor) -> Any:
    y = (x * 2).t()
    z = y.reshape(16)  # a copy: writing into it leaves y
    z.add_(1)
    return y, z


def _expanded(x: torch.Tensor) -> Any:
    y = x.sum(0, keepdim=True)
    wide = y.expand(4, 4)
    y.add_(1)
    return wide * x


def _loop(x: torch.Tensor) -> Any:
    out = torch.zeros(4, 4)
    for i in range(4):
        out[i] += x[i] * i
    return out


def _cast(x: torch.Tensor) -> Any:
    y = torch.zeros(4, 4, dtype=torch.float64)
    y[1:3] = x[1:3]
    return y


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    check(CASES[name])


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda m, x: x.add_(1), "input 'x'"),
        (lambda m, x: x[0].mul_(2).sum() + x, "input 'x'"),
        (lambda m, x: x.view(16).relu_(), "input 'x'"),
    ],
)
def test_writing_into_an_input_is_an_error(function: Any, what: str) -> None:
    with pytest.raises(CaptureError, match=rf"forward\(\) writes into {what} .*compute a new tensor instead"):
        graphprune.trace(Program(function), torch.randn(4, 4))


def test_writing_into_a_buffer_is_an_error() -> None:
    class Counter(nn.Module):
        seen: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            return x + self.seen

    model = Counter()
    with pytest.raises(CaptureError, match="writes into tensor 'seen'"):
        graphprune.trace(model, torch.randn(4, 4))
    assert model.seen.item() == 0, "the model is as it was"


def test_a_constant_made_in_forward_is_detached_out_of_place() -> None:
    graph = check(lambda self, x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert not list(graph.find(torch.ops.aten.detach_.default))


def test_dropout_survives_simple_in_place_programs() -> None:
    graph = check(lambda m, x: m.drop((x * 2).relu_()).add_(1))
    assert not graph.notes
    module = graph.module.train()
    x = torch.ones(4, 4)
    assert not torch.equal(module(x), module(x))


def test_a_write_through_a_view_without_inverse_says_that_dropout_was_lost() -> None:
    def program(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.drop(x) * 2
        y.as_strided((4,), (5,)).add_(1)
        return y

    graph = check(program)
    assert any("dropout" in note for note in graph.notes)


def test_a_program_from_a_file_has_forgotten_what_shares_memory(tmp_path: Any) -> None:
    model, x = Program(lambda m, x: (_view_of_view(x), _split(x), _reshape(x))).eval(), torch.randn(4, 4)
    program = torch.export.export(model, (x,), strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    graph = graphprune.trace(torch.export.load(tmp_path / "model.pt2"))
    for a, b in zip(*(torch.utils._pytree.tree_leaves(v) for v in (graph(x), model(x))), strict=True):
        torch.testing.assert_close(a, b)


# ---- random programs -------------------------------------------------------------------------------------
# A program keeps a pool of tensors; every step makes a view, computes something new, or writes in place.

VIEWS: list[Any] = [
    lambda v: v[1:], lambda v: v[0], lambda v: v[..., ::2], lambda v: v.t() if v.dim() == 2 else v,
    lambda v: v.reshape(-1), lambda v: v.unsqueeze(0), lambda v: v.view(v.shape), lambda v: v.split(2, 0)[0],
    lambda v: v.detach(), lambda v: v.contiguous(),
]  # fmt: skip
FRESH: list[Any] = [lambda v: v * 2, lambda v: v.sin(), lambda v: v.clone(), lambda v: torch.zeros_like(v)]
WRITES: list[Any] = [
    lambda v, s: v.add_(1), lambda v, s: v.mul_(s), lambda v, s: v.copy_(s), lambda v, s: v.relu_(),
    lambda v, s: v.zero_(), lambda v, s: v.__setitem__(0, s), lambda v, s: v.__setitem__(..., s),
    lambda v, s: v.__setitem__(slice(0, 1), s), lambda v, s: v.fill_(2.5),
    lambda v, s: v.masked_fill_(v > 0, 0.5), lambda v, s: v.clamp_(max=0.3),
]  # fmt: skip

step = st.tuples(
    st.sampled_from(["view", "view", "fresh", "write", "write"]), st.integers(0, 10), st.integers(0, 9)
)


def interpret(steps: list[tuple[str, int, int]], x: torch.Tensor) -> list[torch.Tensor]:
    """Run a random program; returns copies of the whole pool, so that every alias is looked at."""
    pool = [x * 1.5]
    for kind, which, where in steps:
        value = pool[where % len(pool)]
        if kind == "write":
            WRITES[which % len(WRITES)](value, value.mean().clone())
        elif value.dim() and value.numel() and value.shape[0] > 1:
            options = VIEWS if kind == "view" else FRESH
            pool.append(options[which % len(options)](value))
    return [value * 1 for value in pool]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(step, min_size=1, max_size=7))
@example([("view", 0, 0), ("write", 0, 1), ("write", 1, 0)])
@example([("view", 1, 0), ("view", 1, 0), ("write", 2, 1)])
@example([("view", 3, 0), ("view", 4, 1), ("write", 0, 2), ("write", 5, 1)])
def test_random_programs(steps: list[tuple[str, int, int]]) -> None:
    check(lambda m, x: interpret(steps, x))
