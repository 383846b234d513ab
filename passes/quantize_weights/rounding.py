"""Integers for every weight, in execution order, each knowing what the ones before it have become.

A copy of the network runs on the calibration inputs, operator by operator. At each weight the Gram matrix
of what the operator reads there decides the rounding, and the copy goes on with what the integers stand
for: later weights make up for errors made earlier, as far as they see them. What shares an input shares
its Gram matrix; a weight that several operators multiply with waits for the last of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graphprune.passes.grams import InputGram
from graphprune.passes.repair.rows import operands
from torch import Tensor, fx

from graphprune.calibration import Call
from graphprune.graph import Graph
from graphprune.quantization.blocks import Blocks, of_blocks, stored, to_numbers
from graphprune.quantization.rounding import error, rounded
from graphprune.runner import Runner

from .places import Place

SEARCHED = 4  # up to so many bits, ranges are shrunk to where the error is least


@dataclass(frozen=True)
class Wanted:
    """How one weight is to be kept.

    Attributes:
        bits: 2 to 8.
        size: columns of a block.
        symmetric: no zero points.
        method: of :func:`graphprune.quantization.rounding.rounded`.
    """

    bits: int
    size: int
    symmetric: bool
    method: str


@dataclass(frozen=True, eq=False)
class Rounded:
    """What became of one weight.

    Attributes:
        integers: ``[outputs, inputs]``.
        how: their scales.
        error: of what the weight is multiplied to, on calibration, relative to that; without any, of the
            weight.
        nearest: what rounding every entry by itself would have left.
        why: why it was not rounded as wanted.
    """

    integers: Tensor
    how: Blocks
    error: float
    nearest: float
    why: str = ""


def round_all(
    graph: Graph,
    places: Sequence[Place],
    wanted: Mapping[str, Wanted],
    calls: Sequence[Call],
    *,
    positions: int | None,
    seed: int,
) -> dict[str, Rounded]:
    """Integers for every place, by the weight's name; without ``calls`` all to the nearest."""
    found = {p.name: _round(p.matrix(graph), wanted[p.name]) for p in places if p.lookups or not calls}
    if not calls:
        return found
    work = graph.copy()
    twins = dict(zip(graph.fx.nodes, work.fx.nodes, strict=True))
    work.set_tensors({p.name: _dense(p, found[p.name]) for p in places if p.name in found})
    of = {node: p for p in places if p.name not in found for node in p.products}
    sums: dict[str, Tensor] = {}
    last: tuple[Any, InputGram] | None = None
    runner = Runner(work, calls)
    for node in [n for n in graph.fx.nodes if n in of]:
        place, source = of[node], operands(twins[node])[0]
        runner.advance(twins[node], inclusive=False)
        if last is None or last[0] is not source:
            last = source, _gram(twins[node], runner.values(source), positions, seed)
        gram = last[1]
        sums[place.name] = gram.matrix[0] + sums.get(place.name, torch.zeros(()))
        if node is place.products[-1]:
            result = _round(place.matrix(graph), wanted[place.name], sums.pop(place.name))
            found[place.name] = result
            work.set_tensors({place.name: _dense(place, result)})
    return found


def _gram(node: fx.Node, values: Sequence[Tensor], positions: int | None, seed: int) -> InputGram:
    gram = InputGram(node, positions, seed)
    for value in values:
        gram.add(value)
    return gram


def _round(matrix: Tensor, how: Wanted, gram: Tensor | None = None) -> Rounded:
    form, search = stored(how.bits, how.symmetric), how.bits <= SEARCHED
    method, why = how.method, ""
    if gram is not None and not bool(torch.isfinite(gram).all()):
        gram, why = None, "what it is multiplied with is not finite on calibration inputs"
    if gram is None:
        method, gram = "nearest", torch.eye(0)
    known = gram.numel() > 0
    blocks = of_blocks(matrix, form, how.size, search=search, weight=gram.diagonal() if known else None)
    nearest = rounded(matrix, blocks)
    integers = rounded(matrix, blocks, gram, method) if method != "nearest" else nearest
    if known:
        before, after = (error(matrix, q, blocks, gram) ** 0.5 for q in (nearest, integers))
    else:
        before = after = _relative(matrix, to_numbers(integers, blocks))
    return Rounded(integers, blocks, after, before, why)


def _relative(matrix: Tensor, found: Tensor) -> float:
    size = float(matrix.double().norm())
    return float((matrix.double() - found.double()).norm()) / size if size else 0.0


def _dense(place: Place, result: Rounded) -> Tensor:
    """What the integers stand for, in the weight's own layout."""
    numbers = to_numbers(result.integers, result.how)
    return numbers.T.contiguous() if place.transposed else numbers
