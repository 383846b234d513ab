r"""What an operator is fitted to: its own result in the original, or what a sum behind it lacks.

Where a branch joins a shortcut, ``y = f(x) + s``, the pruned network's shortcut is off already, by errors
that earlier layers could not avoid. So the last operator of the branch is not fitted to the original's
``f(x)``, but to

    y[original] - s[pruned],

which makes up for the shortcut's error as far as the branch's input tells it; otherwise the error
of a residual stream grows from block to block. What stands between operator and sum is undone,

    y = a z + b + s   =>   z = (y - s - b) / a,

with ``a`` and ``b`` from a batch norm, a layer scale or a factor of the sum. A channel whose ``a`` is next
to 0 could reach the sum through huge weights only; it keeps its own result as target. Of two branches that
both can be fitted, the one executed last takes what the other leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphprune.graph import Graph
from graphprune.operands import argument, reads_shape_only, sizes, uses

from .units import widened

aten = torch.ops.aten

# Where |a| is below this share of the largest, the channel keeps its own target.
WEAK = 1e-2

_SAME_IN_EVALUATION = frozenset({
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default, aten.detach.default, aten.contiguous.default, aten.clone.default,
})  # fmt: skip


@dataclass(frozen=True)
class Own:
    """The original's value at one point.

    Attributes:
        before: nodes of the original that :meth:`value` takes the (cut) values of.
        after: nodes of the pruned network, likewise.
    """

    node: fx.Node

    @property
    def before(self) -> tuple[fx.Node, ...]:
        return (self.node,)

    @property
    def after(self) -> tuple[fx.Node, ...]:
        return ()

    def value(
        self, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The target, and the values that its error is relative to."""
        return before[0], before[0]


@dataclass(frozen=True)
class Rest:
    """What the sum lacks, in terms of the operator's result; see the module docstring.

    Attributes:
        own: the original's operator.
        total: the original's sum.
        shortcut: the other operand of the pruned network's sum.
        weight: its factor there.
        scale, shift: ``a`` and ``b``, broadcastable to the operator's result.
    """

    own: fx.Node
    total: fx.Node
    shortcut: fx.Node
    weight: float
    scale: torch.Tensor
    shift: torch.Tensor

    @property
    def before(self) -> tuple[fx.Node, ...]:
        return (self.total, self.own) if bool(self._weak.any()) else (self.total,)

    @property
    def after(self) -> tuple[fx.Node, ...]:
        return (self.shortcut,)

    @property
    def _weak(self) -> torch.Tensor:
        size = self.scale.abs()
        return size <= WEAK * size.max()

    def value(
        self, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The target, and the values that its error is relative to."""
        total, weak = widened(before[0]), self._weak
        scale = self.scale.masked_fill(weak, 1.0).to(total.dtype)
        rest = (total - self.weight * widened(after[0]) - self.shift.to(total.dtype)) / scale
        whole = total / scale
        if len(before) > 1:
            own = widened(before[1])
            rest, whole = torch.where(weak, own, rest), torch.where(weak, own, whole)
        return rest, whole


Target = Own | Rest


@dataclass(frozen=True)
class Junction:
    """A sum that an operator's result goes into, and nothing else does.

    Attributes:
        total: the sum; ``other`` its other operand, and ``weight`` the factor of that.
        norm: the batch norm right behind the operator, if there is one.
        scale, shift: what becomes of the result on the way, broadcastable to it.
    """

    total: fx.Node
    other: fx.Node
    weight: float
    norm: fx.Node | None
    scale: torch.Tensor
    shift: torch.Tensor


def junction(graph: Graph, node: fx.Node, base: Mapping[str, torch.Tensor]) -> Junction | None:
    """Where a shortcut joins behind ``node``, with nothing but an affine map of channels between.

    Args:
        graph: the pruned network.
        node: an operator in it.
        base: running statistics to count with instead of the graph's, by name.
    """
    scale, shift = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    value, norm = node, None
    while uses(value) == 1:
        reader = next(user for user in value.users if not reads_shape_only(user, value))
        if reader.target is aten.add.Tensor:
            mine, other, alpha = reader.args[0], reader.args[1], float(argument(reader, "alpha"))  # type: ignore[arg-type]
            times, weight = (1.0, alpha) if mine is value else (alpha, 1.0)
            other = other if mine is value else mine
            if not _alike(node, other, reader) or times == 0:
                return None
            return Junction(reader, other, weight, norm, times * scale, times * shift)  # type: ignore[arg-type]
        if reader.target is aten.batch_norm.default and value is node:
            affine = _normalisation(graph, reader, base)
            if affine is None:
                return None
            (scale, shift), norm = affine, reader
        elif reader.target is aten.mul.Tensor:
            by = next(a for a in reader.args if a is not value)
            factor = graph.constant(by) if isinstance(by, fx.Node) else torch.tensor(by)
            if factor is None or sizes(reader) != sizes(node):
                return None
            scale, shift = scale * factor.detach().double(), shift * factor.detach().double()
        elif reader.target not in _SAME_IN_EVALUATION:
            return None
        value = reader
    return None


def _alike(node: fx.Node, other: Any, total: fx.Node) -> bool:
    """Whether operator, shortcut and sum have one shape, so that nothing was broadcast."""
    if not isinstance(other, fx.Node) or other.op == "get_attr":
        return False
    if not isinstance(other.meta.get("val"), torch.Tensor):
        return False
    return sizes(node) == sizes(other) == sizes(total)


def _normalisation(
    graph: Graph, node: fx.Node, base: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A batch norm in evaluation mode as ``a``, ``b`` of its input ``[N, C, …]``."""
    if argument(node, "training"):
        return None
    shape = (1, -1, *[1] * (len(sizes(node)) - 2))

    def vector(name: str, default: float) -> torch.Tensor | None:
        attribute = argument(node, name)
        if attribute is None:
            return torch.full((), default, dtype=torch.float64)
        value = base.get(str(attribute.target), graph.constant(attribute))
        return None if value is None else value.detach().double().view(shape)

    gamma, beta = vector("weight", 1.0), vector("bias", 0.0)
    mean, variance = vector("running_mean", 0.0), vector("running_var", 1.0)
    if gamma is None or beta is None or mean is None or variance is None:
        return None
    scale = gamma / (variance + float(argument(node, "eps"))).sqrt()
    return scale, beta - mean * scale
