"""Weights as integers, rounded to the nearest or so that what they multiply comes out best.

Below 8 bits, rounding each number by itself costs more than it has to: GPTQ and AdaRound choose all integers
of a row together, from the Gram matrix of the operator's inputs
(:mod:`graphprune.quantization.rounding`), layer by layer, each from what the layers before it have become.
Scales then are not the largest magnitude's either, but those with the least error, weighted by how large
each input is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from graphprune.passes.grams import InputGram, rounded_weight
from graphprune.passes.repair.rows import form
from torch import Tensor, fx

from graphprune.quantization.parameters import Parameters, of_weight, to_integers, to_numbers
from graphprune.runner import Runner

from .annotate import Annotation, operands, weight_of
from .insert import channel_axis

# Shares of the largest magnitude that a scale may cover, where it is searched.
SHARES = tuple(1.0 - 0.02 * step for step in range(31))
# Sums over more numbers than this have a Gram matrix of gigabytes; their weights are rounded to the nearest.
WIDEST = 16384
POSITIONS = 256  # places of an image, or tokens, that enter a Gram matrix for each sample


def rounded(
    found: Annotation, calls: Sequence[Sequence[Tensor]], method: str, seed: int, widest: int | None = None
) -> dict[str, tuple[Tensor, Parameters]]:
    """Integers of every weight of the annotation, by its name; for other methods than ``nearest``.

    Args:
        found: of a float graph, which is not changed.
        calls: flat inputs of each batch.
        method: ``gptq`` or ``adaround``.
        seed: of the choice of places that enter a Gram matrix.
        widest: weights whose outputs sum over more numbers than this are rounded to the nearest.
    """
    work = found.graph.copy()
    twins = dict(zip(found.graph.fx.nodes, work.fx.nodes, strict=True))
    readers: dict[str, list[fx.Node]] = {}
    for node in found.runs:
        weight = weight_of(node)
        if weight is not None and width(node) <= min(WIDEST, widest or WIDEST):
            readers.setdefault(str(weight.target), []).append(node)
    last = {nodes[-1]: name for name, nodes in readers.items()}
    grams: dict[str, Tensor] = {}
    result = {}
    runner = Runner(work, calls)
    for node in [n for n in found.runs if _name(n) in readers]:
        name, twin = str(weight_of(node).target), twins[node]  # type: ignore[union-attr]
        runner.advance(twin, inclusive=False)
        gram = InputGram(twin, POSITIONS, seed)
        for value in runner.values(operands(twin)[0]):
            gram.add(value)
        grams[name] = gram.matrix + grams.get(name, torch.zeros(()))
        if node in last:
            numbers = work.tensors[name].detach()
            how = of_weight(numbers, found.scheme.weight, channel_axis(node))
            how = searched(twin, numbers, how, grams[name])
            integers = rounded_weight(twin, numbers, how, grams.pop(name), method)
            result[name] = integers, how
            work.set_tensor(name, to_numbers(integers, how))
    return result


def _name(node: fx.Node) -> str:
    weight = weight_of(node)
    return "" if weight is None else str(weight.target)


def width(node: fx.Node) -> int:
    """How many numbers an output of a convolution or linear sums over."""
    weight = weight_of(node)
    assert weight is not None
    size, axis = weight.meta["val"].numel(), channel_axis(node)
    return int(size // weight.meta["val"].shape[0 if axis is None else axis])


def searched(node: fx.Node, weight: Tensor, how: Parameters, gram: Tensor | None) -> Parameters:
    """The scales, each shrunk to where its channel's error is least, as far as inputs are uncorrelated.

    Without a Gram matrix all inputs count alike.
    """
    if how.axis is None:
        return how
    matrix = form(node).matrix
    power = torch.ones(()) if gram is None else gram.diagonal(dim1=-2, dim2=-1).float()  # [groups, columns]
    best = torch.full_like(how.scale, torch.inf)
    scale = how.scale.clone()
    for share in SHARES:
        tried = replace(how, scale=how.scale * share)
        left = matrix(to_numbers(to_integers(weight, tried), tried) - weight)  # [groups, columns, out/groups]
        errors = (left.square() * power.unsqueeze(-1)).sum(1).reshape(-1)
        if errors.shape != best.shape:
            return how
        better = errors < best
        best, scale = torch.where(better, errors, best), torch.where(better, tried.scale, scale)
    return replace(how, scale=scale)
