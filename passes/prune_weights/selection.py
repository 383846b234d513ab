"""Scores of single entries, masks from them, and the correction of what stays, layer after layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from graphprune.passes.grams import InputGram
from graphprune.passes.repair.rows import operands
from torch import Tensor

from graphprune.calibration import Call
from graphprune.graph import Graph
from graphprune.importance.gradients import slopes_of
from graphprune.inverse_factor import inverse_factor
from graphprune.pipeline import Note
from graphprune.runner import Runner
from graphprune.sparsity.compensation import compensated, error, worths
from graphprune.sparsity.patterns import Anywhere, Blocks, NofM, Pattern, lowered, mask_among

from .masks import Weight, there_of, value_of

WIDEST = 8192  # columns; the Gram matrix of more does not fit in memory


def scores(
    graph: Graph,
    found: Sequence[Weight],
    pattern: Pattern,
    importance: str,
    calls: Sequence[Call],
    loss: Callable[[Any], Any] | None,
    seed: int,
) -> dict[str, Tensor]:
    """Weight → the score of every entry of its matrix, ``[outputs, columns]``; lowest where it is gone."""
    values = {w.name: value_of(graph, w.name) for w in found}
    if importance == "gradient":
        sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in values.items()}
        for slopes in slopes_of(graph, list(values), calls, loss, seed):
            for name, slope in slopes.items():
                sums[name] += slope.double()
        values = {name: values[name] * sums[name] for name in values}
    return {
        w.name: lowered(pattern, w.matrix(values[w.name]).abs().double(), there_of(graph, w)) for w in found
    }


def chosen(
    ranked: Mapping[str, Tensor], pattern: Pattern, scope: str, threshold: float | None
) -> dict[str, Tensor]:
    """Weight → which entries of its matrix stay."""
    if threshold is not None:
        return {name: score >= threshold for name, score in ranked.items()}
    if scope == "local":
        return {name: pattern.mask(score) for name, score in ranked.items()}
    assert isinstance(pattern, (Anywhere, Blocks))
    units = {n: pattern.means(s) if isinstance(pattern, Blocks) else s for n, s in ranked.items()}
    joined = torch.cat([unit.reshape(-1) for unit in units.values()])
    keep = Anywhere(pattern.sparsity).mask(joined)
    masks: dict[str, Tensor] = {}
    for (name, unit), own in zip(units.items(), keep.split([u.numel() for u in units.values()]), strict=True):
        mask = own.reshape(unit.shape)
        if isinstance(pattern, Blocks):
            mask = pattern.spread(mask, *ranked[name].shape)
        masks[name] = mask
    return masks


def corrected(
    graph: Graph,
    found: Sequence[Weight],
    pattern: Pattern,
    given: Mapping[str, Tensor] | None,
    calls: Sequence[Call],
    positions: int | None,
    seed: int,
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[Note]]:
    """Weight → its corrected values and mask, each layer seeing what the pruned ones before it give."""
    work = graph.copy()
    twins = dict(zip(graph.fx.nodes, work.fx.nodes, strict=True))
    runner = Runner(work, calls)
    last = {weight.readers[-1]: weight for weight in found}
    grams: dict[str, InputGram] = {}
    values: dict[str, tuple[Tensor, Tensor]] = {}
    notes = []
    owner = {reader: weight for weight in found for reader in weight.readers}
    for node in [node for node in graph.fx.nodes if node in owner]:
        weight, twin = owner[node], twins[node]
        runner.advance(twin, inclusive=False)
        own = value_of(graph, weight.name)
        wide = weight.matrix(own).shape[1] > WIDEST
        if not wide:
            gram = grams.setdefault(weight.name, InputGram(twin, positions, seed))
            for value in runner.values(operands(twin)[0]):
                gram.add(value)
        if node not in last:
            continue
        matrix, there = weight.matrix(own), there_of(graph, weight)
        mask = given[weight.name] & there if given is not None else None
        if wide or not grams[weight.name].finite:
            why = f"it has {matrix.shape[1]:,} inputs" if wide else "its inputs are not finite"
            notes.append(Note("refused", weight.name, f"what stays is not corrected: {why}"))
            mask = mask_among(pattern, matrix.abs(), there) if mask is None else mask
            result = matrix * mask
        else:
            result, mask, said = _corrected(matrix, mask, pattern, grams.pop(weight.name).matrix, there)
            notes.append(Note("info", weight.name, said))
        values[weight.name] = weight.back(result, own).contiguous(), weight.back(mask, own)
        work.set_tensors({weight.name: values[weight.name][0]})
    return values, notes


def _corrected(
    matrix: Tensor, mask: Tensor | None, pattern: Pattern, grams: Tensor, there: Tensor
) -> tuple[Tensor, Tensor, str]:
    """Group by group; what the correction was worth is said by the error relative to what was there.

    ``there`` is ``False`` where an entry went before: it must not be taken for one that makes up for
    something.
    """
    parts = []
    if mask is None and not isinstance(pattern, NofM) and (len(grams) > 1 or not bool(there.all())):
        # The share is of the whole weight, and a group of a depthwise convolution has few entries.
        groups = zip(matrix.chunk(len(grams)), grams, strict=True)
        worth = torch.cat([worths(own, inverse_factor(gram)) for own, gram in groups])
        mask = mask_among(pattern, worth, there)
    for own, left, keep, gram in zip(
        matrix.chunk(len(grams)), there.chunk(len(grams)),
        mask.chunk(len(grams)) if mask is not None else [None] * len(grams), grams, strict=True,
    ):  # fmt: skip
        result, kept = compensated(own, pattern if keep is None else keep, gram, left)
        signal = ((own.double() @ gram) * own.double()).sum()
        plain = own * (mask_among(pattern, own.abs(), left) if keep is None else keep)
        parts.append((result, kept, signal, error(own, plain, gram).sum(), error(own, result, gram).sum()))
    results, masks, signals, before, after = zip(*parts, strict=True)
    # Sums of squares; rounding can leave one that is nothing below zero, whose root would be complex.
    whole = max(float(sum(signals)), 0.0) or 1.0
    shares = [(max(float(sum(v)), 0.0) / whole) ** 0.5 for v in (before, after)]
    said = f"error of its result {shares[0]:.3f} by magnitude alone, {shares[1]:.3f} corrected"
    return torch.cat(results), torch.cat(masks), said
