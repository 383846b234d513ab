r"""Repair without data: what the removed channels contributed on average goes into the bias.

Behind a batch norm with scale gamma and shift beta, a channel is taken to be normal, with mean beta and
standard deviation \|gamma\|; what a pointwise function ``f`` makes of it has the mean

    E f(beta + |gamma| z),   z ~ N(0, 1),

computed by quadrature for any chain of such functions (Nagel et al., "Data-Free Quantization", 2019, have
the closed form for ReLU). Means go through whatever is linear (pooling by averages, concatenation,
reshapes, sums). The weights of a removed channel times its mean is what its readers miss: it is added to
their bias, or taken off the mean of the batch norm behind them. A convolution's zero padding is not
looked at.

A channel whose distribution no batch norm tells (behind a residual sum and a ReLU, a maximum, folded
batch norms) is left alone, and a note says so. With any data at all,
:func:`graphprune.passes.repair.repair` is far better.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from graphprune.passes.affine import Refusal
from graphprune.passes.commute import describe
from torch import fx

from graphprune.cost import captured_shape, size_hint
from graphprune.graph import Graph
from graphprune.operands import LINEAR, argument, uses
from graphprune.pipeline import Note
from graphprune.plans.plan import Plan, keep_masks

from .match import Cut, refit_of, twin_of, unchanged
from .rows import form, operands
from .units import Record, new_bias, takes_bias

aten = torch.ops.aten

# Operators whose result's mean is the operator of the operands' means.
_AFFINE = frozenset({
    aten.cat.default, aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.permute.default, aten.transpose.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.unsqueeze.default, aten.slice.Tensor, aten.contiguous.default, aten.clone.default,
    aten.mean.dim, aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default,
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
    aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, operator.getitem,
    aten.add.Tensor, aten.sub.Tensor,
})  # fmt: skip
_DROPOUT = frozenset({aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default})


def compensate(
    original: Graph,
    pruned: Graph,
    plan: Plan,
    *,
    add_bias: bool = False,
    fitted: Mapping[str, torch.Tensor] | None = None,
) -> tuple[tuple[Record, ...], tuple[Note, ...], Graph]:
    """Make up for the means of removed channels, as far as batch norms tell them.

    Args:
        original: the graph before the plan.
        pruned: ``original.apply(plan)``; operators are found by their names.
        plan: what was removed.
        add_bias: whether an operator without a bias, and without a batch norm behind it, may get one.
        fitted: what earlier repairs made of tensors. Means are made up for from the first network on, so
            doing it again counts nothing twice; weights that were fitted on inputs are left.

    Returns:
        Records, notes, and the repaired graph (``pruned`` itself where nothing changed).
    """
    cut = Cut(original, keep_masks(original, plan), fitted)
    work = pruned.copy()
    records: list[Record] = []
    notes: list[Note] = []
    for node in [n for n in work.fx.nodes if n.op == "call_function" and n.target in LINEAR]:
        where = work.where(node)
        try:
            twin = twin_of(cut, node)
            shift = _missing(cut, twin)
            if shift is None or not bool(shift.count_nonzero()):
                continue
            weight, _ = refit_of(pruned, node, cut)
            if weight in cut.fitted:
                raise Refusal(f"{weight!r} was fitted on inputs before, which did this and more")
            place = _add(work, node, shift, add_bias, cut)
        except Refusal as refusal:
            notes.append(Note("refused", where, f"not compensated: {refusal}"))
        else:
            records.append(Record((node.name,), "bias", where, 0, math.nan, math.nan))
            notes.append(Note("changed", where, f"the removed channels' means went into {place}"))
    head = Note("info", "", f"no calibration: {len(records)} operators compensated from batch norms alone")
    return tuple(records), (head, *notes), work if records else pruned


def _missing(cut: Cut, twin: fx.Node) -> torch.Tensor | None:
    """What the removed inputs added to each kept output on average, ``[out]``; ``None`` where none went."""
    source, weight_node, _ = operands(twin)
    weight = cut.original.constant(weight_node)
    if weight is None:
        return None
    shape = form(twin)
    rank = weight.dim() - 2 if shape.kind in ("convolution", "transposed") else 0
    channel = len(captured_shape(source)) - 1 - rank
    dims: Any = cut.original.typing.dims
    gone = torch.from_numpy(cut.gone(dims[source][channel]))
    if not bool(gone.any()):
        return None
    mean = expected(cut.original, source).to("cpu", torch.float64)
    mean = mean.mean([d for d in range(mean.dim()) if d != channel]) * gone
    matrix = shape.matrix(weight.detach().to("cpu", torch.float64))  # [g, in/g · k, out/g]
    columns = mean.view(shape.groups, 1, -1, 1).expand(-1, 1, -1, math.prod(weight.shape[2:])).flatten(2)
    shift = (columns @ matrix).flatten()
    if shape.kind == "transposed":  # of the kernel, an output meets one part in as many as the stride
        shift = shift / math.prod(shape.stride)
    kept = ~torch.from_numpy(cut.gone(dims[twin][channel]))
    return shift[kept]


def _add(graph: Graph, node: fx.Node, shift: torch.Tensor, add_bias: bool, cut: Cut) -> str:
    """Add ``shift`` to what ``node`` gives; returns what took it."""
    _, weight, bias = operands(node)
    if bias is not None:
        return _move(graph, bias, node, shift, cut)
    follower = next(iter(node.users))
    if uses(node) == 1 and follower.target is aten.batch_norm.default and not argument(follower, "training"):
        return _move(graph, argument(follower, "running_mean"), follower, -shift, cut)
    if not (add_bias and takes_bias(node)):
        raise Refusal("it has no bias and no batch norm behind it; add_bias=True would give it one")
    if len(graph.readers(str(weight.target))) != 1:
        raise Refusal(f"its weight {weight.target!r} is shared")
    like = graph.tensor(weight)
    return repr(str(new_bias(graph, node, str(weight.target), shift.to(like.device, like.dtype)).target))


def _move(graph: Graph, attribute: fx.Node, reader: fx.Node, shift: torch.Tensor, cut: Cut) -> str:
    name = str(attribute.target)
    if graph.constant(attribute) is None:
        raise Refusal(f"{attribute.name!r}, which would take the means, is computed")
    if graph.readers(name) != [reader]:
        raise Refusal(f"{name!r}, which would take the means, is shared")
    unchanged(cut, graph, (name,))
    old = graph.tensors[name].detach()
    if name in cut.fitted:  # the means of everything removed so far are in the shift
        old = cut.tensor(name) if name in cut.original.tensors else torch.zeros_like(old)
    graph.set_tensor(name, (old.double() + shift.to(old.device)).to(old.dtype))
    return repr(name)


def expected(graph: Graph, node: fx.Node) -> Any:
    """The mean of a node's value over inputs, in its captured shape, from batch norms.

    Raises:
        Refusal: something on the way has no known distribution.
    """
    chain, source = [], node
    while _is_pointwise(source):
        if source.target not in _DROPOUT:
            chain.append(source)
        source = source.args[0]  # type: ignore[assignment]
    if source.target is aten.batch_norm.default:
        return _through(graph, source, chain[::-1])
    constant = graph.constant(source)
    if not chain and constant is not None:
        return constant.detach().double()
    if chain or source.target not in _AFFINE:
        hint = "a removed channel's mean is known behind batch norms alone"
        raise Refusal(f"its input comes through {describe(source)}; {hint}")

    def mean(operand: fx.Node) -> Any:
        value = operand.meta.get("val")
        return (
            expected(graph, operand) if isinstance(value, (torch.Tensor, list, tuple)) else size_hint(value)
        )

    args, kwargs = fx.map_arg((source.args, source.kwargs), mean)
    return source.target(*args, **kwargs)  # type: ignore[operator]


def _is_pointwise(node: fx.Node) -> bool:
    """Whether the operator is a function of one tensor's single values."""
    if node.op != "call_function" or len(node.all_input_nodes) != 1 or not isinstance(node.args[0], fx.Node):
        return False
    tags = getattr(node.target, "tags", ())
    return node.target in _DROPOUT or (torch.Tag.pointwise in tags and node.target not in _AFFINE)


def _through(graph: Graph, node: fx.Node, chain: list[fx.Node]) -> torch.Tensor:
    """The mean behind a batch norm and a chain of pointwise functions, ``[N, C, …]``."""
    if argument(node, "training"):
        raise Refusal(f"{describe(node)} normalises with the statistics of the batch")
    shape = captured_shape(node)
    beta, gamma = (_vector(graph, argument(node, n), v) for n, v in (("bias", 0.0), ("weight", 1.0)))
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-0.5 * z.square())
    values = beta.view(-1, 1) + gamma.abs().view(-1, 1) * z  # [C or 1, 4001]
    for step in chain:
        values = step.target(values, *step.args[1:], **step.kwargs)  # type: ignore[operator]
    mean = (values.double() * (density / density.sum())).sum(1)
    return mean.expand(shape[1]).view(1, -1, *[1] * (len(shape) - 2)).expand(shape)


def _vector(graph: Graph, attribute: Any, default: float) -> torch.Tensor:
    if attribute is None:
        return torch.tensor([default], dtype=torch.float64)
    value = graph.constant(attribute)
    if value is None:
        raise Refusal(f"{describe(attribute)}, of a batch norm, is computed")
    return value.detach().to("cpu", torch.float64)
