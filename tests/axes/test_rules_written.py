"""Values written at indices, values counted, and rows shared out to experts, by the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import fx

from graphprune.axes import Typed, Typing, rule
from graphprune.axes.rules.experts import grouped_product

from .oracle import Cases, Program, check, oracle, shapes
from .test_rules_positions import positions

aten = torch.ops.aten
CASES = Cases()


@CASES.of("index_put")
def index_put(p: Program, target: Any) -> None:
    shape = p.draw(shapes(1, 4))
    chosen = p.draw(st.lists(st.booleans(), min_size=1, max_size=len(shape)).filter(any))
    count = p.draw(st.integers(1, 4))
    # Distinct positions along the first index: which of two values written to one place stays is open.
    first = chosen.index(True)
    count = min(count, shape[first])
    indices: list[Any] = []
    for place, (size, here) in enumerate(zip(shape, chosen, strict=False)):
        distinct = torch.tensor(p.draw(st.permutations(range(size)))[:count])
        indices.append((distinct if place == first else positions(p, size, count)) if here else None)
    x = p.operand(*shape)
    written = p(aten.index.Tensor, x, indices).meta["val"].shape
    values = [s if p.draw(st.booleans()) else 1 for s in written]
    result = p(target, x, indices, p.operand(*values))
    p(aten.mul.Tensor, result, p.operand(*shape))


@CASES.of("histc")
def histc(p: Program, target: Any) -> None:
    p(target, p.operand(*p.draw(shapes())), 4, -2, 2)


@pytest.mark.parametrize("target", CASES, ids=str)
@oracle(examples=16)
def test_slices(target: Any, data: st.DataObject, seed: int) -> None:
    program = Program(data.draw)
    CASES[target](program, target)
    check(program, seed)


@torch.library.custom_op("graphprune_tests::grouped_product", mutates_args=())
def grouped(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """What a library's grouped product computes, row by row."""
    expert = torch.searchsorted(offsets, torch.arange(len(x)), right=True)
    return torch.einsum("sk,skn->sn", x, weight[expert])


@grouped.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@rule(torch.ops.graphprune_tests.grouped_product.default)
def as_experts(t: Typing, node: fx.Node) -> Typed:
    """The rule that the library's operator has by its name."""
    return grouped_product(t, node)


@oracle(examples=16)
def test_experts(data: st.DataObject, seed: int) -> None:
    p = Program(data.draw)
    rows, width, out = (p.draw(st.integers(2, 6)) for _ in range(3))
    ends = sorted(p.draw(st.lists(st.integers(0, rows), min_size=2, max_size=2)))
    weight = p.operand(3, width, out)
    p(torch.ops.graphprune_tests.grouped_product.default, p.operand(rows, width), weight,
      torch.tensor([*ends, rows]))  # fmt: skip
    check(p, seed)
