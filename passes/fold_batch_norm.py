"""Fold batch norms into the linear operators around them.

With the statistics of training fixed, batch norm is an affine map per channel:

    y = gamma (x - mean) / sqrt(var + eps) + beta = s x + t
    s = gamma / sqrt(var + eps),   t = beta - s mean

A convolution or linear whose result goes nowhere else takes it into its weights (*behind*); failing
that, the operators that read the batch norm do, if every one of them can (*before*); the algebra is in
:mod:`graphprune.passes.absorb`. In between may stand whatever commutes with the map
(:mod:`graphprune.passes.commute`), and behind, sums and concatenations: ``s (a + b) + t = (s a + t) + s b``.

A batch norm that neither side can take stays, and a note says why.

>>> import torch, graphprune
>>> from graphprune.pipeline import Pipeline
>>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.BatchNorm2d(4)).eval()
>>> _ = torch.nn.init.normal_(model[1].bias)
>>> graph = graphprune.trace(model, torch.zeros(1, 3, 2, 2))
>>> print(Pipeline.parse("fold-batch-norm").run(graph).graph)
input_1: f32[1, 3, 2, 2]
conv2d: f32[1, 4, 2, 2] = conv2d(input_1, %0.weight, %0.bias)
return (conv2d,)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphprune.graph import Graph
from graphprune.graph_text import operator_name
from graphprune.operands import argument, reads_shape_only, sizes, uses
from graphprune.pipeline import Context, Note, Pass, PassResult

from .absorb import Edit, absorb_before, absorb_behind
from .affine import Affine, Refusal
from .commute import carry, describe

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Batch norms in inference mode become part of the convolution or linear before or behind them."""

    name: ClassVar[str] = "fold-batch-norm"
    ensures: ClassVar[frozenset[str]] = frozenset({"folded-batch-norm"})
    destroys: ClassVar[frozenset[str]] = frozenset({"batch-norm", "trainable"})

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Fold until no batch norm is left that can be."""
        result = graph.copy()
        notes: list[Note] = []
        folded, before = 0, -1
        refused: list[Note] = []
        while folded != before:  # one that is gone may have stood in another's way
            before, refused = folded, []
            for node in list(result.find(aten.batch_norm.default)):
                where, place = result.where(node), result.place(node)
                try:
                    into = _fold(result, node)
                except Refusal as refusal:
                    refused.append(Note("refused", where, str(refusal)))
                else:
                    folded += 1
                    notes.append(Note("changed", place, f"folded into {into}"))
        if not folded:
            nothing = "no batch norm to fold" if not refused else f"none of {len(refused)} batch norms folds"
            return PassResult(graph, False, (Note("info", "", nothing), *refused))
        result.sweep()
        summary = Note("info", "", f"{folded} batch norms folded, {len(refused)} left")
        return PassResult(result, True, (summary, *notes, *refused))


def _fold(graph: Graph, node: fx.Node) -> str:
    """Fold one batch norm; returns what took it.

    Raises:
        Refusal: neither side takes it.
    """
    affine = batch_norm_map(graph, node)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    try:
        edits = _pull(graph, source, affine)
    except Refusal as behind:
        try:
            edits = _push(graph, node, affine)
        except Refusal as ahead:
            raise Refusal(f"{behind}; {ahead}") from None
    touched = [name for edit in edits for name in edit.replaced]
    if len(set(touched)) < len(touched):
        raise Refusal("the same weights would take it twice")
    node.replace_all_uses_with(source)
    graph.fx.erase_node(node)
    for edit in edits:
        edit.apply(graph)
    return ", ".join(dict.fromkeys(operator_name(edit.node) for edit in edits))


def batch_norm_map(graph: Graph, node: fx.Node) -> Affine:
    """A batch norm's ``(s, t)``, shaped ``[1, C, 1, …]``.

    Raises:
        Refusal: it computes its statistics from the batch, or they are not constants.
    """
    mean, variance = argument(node, "running_mean"), argument(node, "running_var")
    if argument(node, "training") or mean is None or variance is None:
        raise Refusal("it normalises with the statistics of the batch")

    def value(given: Any, what: str) -> torch.Tensor:
        tensor = graph.constant(given)
        if tensor is None:
            raise Refusal(f"its {what} is computed, by {describe(given)}; fold-parameters may help")
        return tensor.detach().to(torch.float64)

    s = torch.rsqrt(value(variance, "variance") + argument(node, "eps"))
    t = torch.zeros_like(s)
    if argument(node, "weight") is not None:
        s = s * value(argument(node, "weight"), "weight")
    if argument(node, "bias") is not None:
        t = t + value(argument(node, "bias"), "bias")
    t = t - s * value(mean, "mean")
    if not s.is_meta and not bool((torch.isfinite(s) & torch.isfinite(t)).all()):
        raise Refusal("its scale is not finite: a variance is zero or negative")
    shape = [1, -1, *[1] * (len(sizes(node)) - 2)]
    return Affine(s.view(shape), t.view(shape))


def _pull(graph: Graph, node: fx.Node, affine: Affine) -> list[Edit]:
    """The edits that make ``node`` compute ``affine(node)``, for its one reader."""
    if uses(node) != 1:
        readers = [user for user in node.users if not reads_shape_only(user, node)]
        users = [user for user in readers if user.target is not aten.batch_norm.default]
        also = describe(users[0]) if users else "several operators"
        raise Refusal(f"{describe(node)} is also read by {also}")
    edit = absorb_behind(graph, node, affine)
    if edit is not None:
        return [edit]
    if node.target is aten.cat.default:
        return _pull_concat(graph, node, affine)
    if node.target is aten.add.Tensor and isinstance(node.args[1], fx.Node):
        edits = []
        still = Affine(affine.scale, torch.zeros_like(affine.shift))
        for operand, part in zip(node.args, (affine, still), strict=False):
            assert isinstance(operand, fx.Node)
            fitted = part.fit(sizes(operand)) if graph.constant(operand) is None else part
            edits += _pull(graph, operand, fitted)
        return edits
    carried = carry(node, affine, forward=False)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return _pull(graph, source, carried)


def _pull_concat(graph: Graph, node: fx.Node, affine: Affine) -> list[Edit]:
    dim = argument(node, "dim") % len(sizes(node))
    edits, start = [], 0
    for operand in argument(node, "tensors"):
        part, width = affine, sizes(operand)[dim]
        if affine.scale.shape[dim] != 1:
            part = affine.map(lambda v, s=start, w=width: v.narrow(dim, s, w))  # type: ignore[misc]
            start += width
        try:
            edits += _pull(graph, operand, part.compress())
        except Refusal as refusal:
            raise Refusal(f"reads a concat, where {refusal}") from None
    return edits


def _push(graph: Graph, node: fx.Node, affine: Affine) -> list[Edit]:
    """The edits that make every reader compute on ``node`` what it did on ``affine(node)``."""
    edits: list[Edit] = []
    for user in node.users:
        if reads_shape_only(user, node):
            continue
        if user.op == "output":
            raise Refusal("is an output of the network")
        edit = absorb_before(graph, user, node, affine)
        if edit is not None:
            edits.append(edit)
        elif user.target is aten.cat.default:
            edits += _push(graph, user, _into_concat(user, node, affine))
        elif user.args[0] is node:
            edits += _push(graph, user, carry(user, affine, forward=True))
        else:
            raise Refusal(f"feeds {describe(user)}")
    return edits


def _into_concat(node: fx.Node, source: fx.Node, affine: Affine) -> Affine:
    """The map of a concat of which ``source`` is one part: the identity everywhere else."""
    dim = argument(node, "dim") % len(sizes(node))
    one = affine.scale.new_ones(()), affine.shift.new_zeros(())
    scales, shifts = [], []
    for operand in argument(node, "tensors"):
        shape = list(affine.scale.shape)
        shape[dim] = sizes(operand)[dim]
        if not isinstance(shape[dim], int):
            raise Refusal(f"feeds {describe(node)} along a dimension of symbolic size")
        scale, shift = (affine.scale, affine.shift) if operand is source else one
        scales.append(scale.expand(shape))
        shifts.append(shift.expand(shape))
    return Affine(torch.cat(scales, dim), torch.cat(shifts, dim)).compress()
