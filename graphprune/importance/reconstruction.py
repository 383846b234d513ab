r"""Second-order importance: what removing a position costs after the best repair.

An operator ``z = W x`` that loses input channels ``P`` can make up for them with the channels that stay. With
``H = E[x x']`` (means taken off: a bias takes them in) the least error that is left is

    tr(B_P' [(H^-1)_PP]^-1 B_P),            B = W' G^(1/2)

(Hassibi and Stork, *Optimal Brain Surgeon*, 1993, eq. 5, for a block of weights and every output at once, as
Frantar and Alistarh, *Optimal Brain Compression*, 2022, and Kurtic et al., *ZipLM*, 2023). ``G = E[g g']`` is
the second moment of the output's gradient at ``z`` (Martens and Grosse, *K-FAC*, 2015), which turns an
error of ``z`` into one of the network's output: the costs of different layers are in one unit, the squared
change of the output relative to the output, and can be added.

Positions go greedily, cheapest first, and ``H^-1`` and ``B`` follow each removal: of two channels that say
the same one is free, the second is not. An axis that several operators read costs the sum of what it costs
in each. Kernel taps count as outputs of their own, so that the matrices are as wide as the axis, whatever
the kernel. From few samples ``H`` says that channels can stand in for each other which only seem to; it is
shrunk towards a multiple of the identity by as much as their number asks for (:func:`shrinkage`).

An axis that nothing reads linearly (the width of queries and keys) costs the squared first-order
change of the output when its positions are zeroed, one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from ..axes.axis import Axis
from ..axes.terms import Atom, placements
from .probe import gradients
from .ranking import Ranking
from .readers import Linear, linears, owners

if TYPE_CHECKING:
    from ..graph import Graph

RIDGE = 1e-3  # of the mean variance, at least
ROUNDS = 128  # an axis is taken apart in at most so many rounds


def rankings(
    graph: Graph,
    axes: Sequence[Axis],
    calls: Sequence[Sequence[torch.Tensor]],
    *,
    probes: int = 1,
    seed: int = 0,
) -> dict[str, Ranking]:
    """Axis name → the order in which its positions go and what each costs.

    Args:
        graph: the network.
        axes: prunable axes.
        calls: flat inputs of each call.
        probes: random projections of the output, a call.
        seed: of the projections.
    """
    moments = {linear.node: Moments(linear) for linear in linears(graph)}
    mixed: dict[Atom, list[Moments]] = {}
    zeroed: dict[Atom, Zeroed] = {}
    for axis in axes:
        readers = [m for m in moments.values() if m.linear.mixes(axis.atom)]
        if readers:
            mixed[axis.atom] = readers
        else:
            zeroed[axis.atom] = Zeroed.of(graph, axis, list(moments.values()))
    extra = [node for sums in zeroed.values() for node in sums.nodes if node not in moments]
    nodes = list(dict.fromkeys([*moments, *extra]))

    def look(node: fx.Node, args: Sequence[Any], value: Any) -> None:
        if node in moments:
            moments[node].read(args[moments[node].linear.operand])

    samples = 0
    for found in gradients(graph, calls, nodes, look=look, probes=probes, seed=seed):
        samples += 1
        at = dict(zip(nodes, found, strict=True))
        for node, entry in moments.items():
            entry.differentiated(at[node][1])
        for sums in zeroed.values():
            sums.add(at)
    return {
        axis.name: _eliminated(axis, mixed[axis.atom])
        if axis.atom in mixed
        else Ranking.of(zeroed[axis.atom].scores(samples))
        for axis in axes
    }


class Moments:
    """``sum x x'`` of an operator's input and ``mean g g'`` of the gradient at its output, in float64."""

    def __init__(self, linear: Linear):
        self.linear = linear
        self._xx: torch.Tensor | None = None
        self._gg: torch.Tensor | None = None
        self._x: torch.Tensor
        self._rows = self._gradients = self._calls = 0
        self._independent = 0.0

    def read(self, value: torch.Tensor) -> None:
        """Take in what the operator reads."""
        x = self.linear.rows(value).double()
        if self._xx is None:
            self._xx, self._x = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1])
        self._xx.addmm_(x.T, x)
        self._x += x.sum(0)
        self._rows += len(x)
        self._calls += 1
        # Places of one image say less than as many images would; between one and all of them, the root.
        self._independent += (len(x) * value.shape[0]) ** 0.5 if value.dim() > 1 else 1

    def differentiated(self, gradient: torch.Tensor) -> None:
        """Take in the gradient at the operator's output."""
        g = self.linear.rows(gradient).double()
        if self._gg is None:
            self._gg = g.new_zeros(g.shape[1], g.shape[1])
        self._gg.addmm_(g.T, g)
        self._gradients += len(g)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``H^-1`` of one call's rows together and ``B B'``, both ``[inputs, inputs]``."""
        assert self._xx is not None
        assert self._gg is not None
        mean = self._x / self._rows
        covariance = (self._xx - self._rows * torch.outer(mean, mean)) / self._calls
        gg = self._gg / self._gradients
        groups, (outs, ins, _) = self.linear.groups, (blocks := self.linear.blocks()).shape[1:]
        weighted = torch.zeros_like(covariance)
        inside = torch.zeros_like(covariance, dtype=torch.bool)
        for group, block in enumerate(blocks):
            rows, columns = slice(group * outs, (group + 1) * outs), slice(group * ins, (group + 1) * ins)
            weighted[columns, columns] = torch.einsum("oit,op,pjt->ij", block, gg[rows, rows], block)
            inside[columns, columns] = True
        if groups > 1:
            covariance = covariance * inside
        ridge = max(RIDGE, shrinkage(covariance, self._independent))
        covariance.diagonal().add_(ridge * covariance.diagonal().mean().clamp_min(1e-30))
        return torch.cholesky_inverse(torch.linalg.cholesky(covariance)), weighted


def shrinkage(covariance: torch.Tensor, samples: float) -> float:
    """How much of the mean variance to add to the diagonal of a covariance ``[p, p]`` of so many samples.

    The oracle approximating shrinkage ``rho`` of Chen et al., *Shrinkage Algorithms for MMSE Covariance
    Estimation*, 2010, eq. 23, as ``rho / (1 - rho)``: a factor of the whole sum changes no order.
    """
    width = len(covariance)
    total, squares = float(covariance.trace()) ** 2, float(covariance.square().sum())
    spread = (samples + 1 - 2 / width) * (squares - total / width)
    share = ((1 - 2 / width) * squares + total) / spread if spread > 0 else 1.0
    share = min(share, 0.5)
    return share / (1 - share)


def _eliminated(axis: Axis, readers: Sequence[Moments]) -> Ranking:
    """All positions, greedily."""
    size = axis.size
    parts = [_Elimination(reader, axis) for reader in readers]
    left = torch.arange(size)
    order: list[int] = []
    costs: list[float] = []
    step = -(-size // ROUNDS)
    while len(left):
        each = torch.stack([part.costs() for part in parts]).sum(0)
        chosen = each.argsort(stable=True)[:step]
        joint = sum(part.remove(chosen) for part in parts)
        order += left[chosen].tolist()
        costs += [max(0.0, joint) / len(chosen)] * len(chosen)
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[chosen] = False
        left = left[stays]
    return Ranking(tuple(order), tuple(costs))


class _Elimination:
    """``H^-1`` and ``B B'`` of one reader as positions go, and where the positions left are in them."""

    def __init__(self, reader: Moments, axis: Axis):
        self._inverse, self._weighted = reader.matrices()
        self._columns = torch.from_numpy(np.stack(reader.linear.columns(axis.atom)))  # [positions, each]
        self._dropped = self._columns.new_empty(0)

    def costs(self) -> torch.Tensor:
        """What removing each position alone costs, ``[positions left]``."""
        if self._columns.shape[1] == 1:
            at = self._columns[:, 0]
            return self._weighted[at, at] / self._inverse[at, at].clamp_min(1e-300)
        rows, across = self._columns.unsqueeze(2), self._columns.unsqueeze(1)
        scale = _inverted(self._inverse[rows, across])
        return (self._weighted[rows, across] * scale).sum((1, 2))

    def remove(self, chosen: torch.Tensor) -> float:
        """Take positions out; what all of them together cost."""
        gone = self._columns[chosen].flatten()
        within = self._weighted[gone][:, gone]
        scale = _inverted(self._inverse[gone][:, gone])
        moved = self._inverse[:, gone] @ scale  # [columns, gone]
        rest = self._weighted[gone] - within @ moved.T / 2
        self._inverse.addmm_(moved, self._inverse[gone], alpha=-1)
        self._weighted.addmm_(moved, rest, alpha=-1).addmm_(rest.T, moved.T, alpha=-1)
        stays = torch.ones(len(self._columns), dtype=torch.bool)
        stays[chosen] = False
        self._columns = self._columns[stays]
        self._compact(gone)
        return float((within * scale).sum())

    def _compact(self, gone: torch.Tensor) -> None:
        """Forget what is gone once that is a quarter: every round walks over both matrices."""
        self._dropped = torch.cat([self._dropped, gone])
        size = len(self._inverse)
        if 4 * len(self._dropped) < size:
            return
        stays = torch.ones(size, dtype=torch.bool)
        stays[self._dropped] = False
        self._inverse, self._weighted = self._inverse[stays][:, stays], self._weighted[stays][:, stays]
        self._columns = (stays.cumsum(0) - 1)[self._columns]
        self._dropped = gone[:0]


def _inverted(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of symmetric positive matrices ``[…, n, n]``, also where they are singular to rounding."""
    if matrix.shape[-1] == 1:
        return 1 / matrix.clamp_min(1e-300)
    return torch.linalg.pinv(matrix, hermitian=True)


class Zeroed:
    """The squared first-order change of the output when one position is zeroed, summed over samples."""

    def __init__(self, axis: Axis, places: Sequence[tuple[fx.Node, int, np.ndarray]], batched: bool):
        self._axis, self._batched = axis, batched
        self._places = [(node, dim, torch.from_numpy(owner)) for node, dim, owner in places]
        self._sums = torch.zeros(axis.size, dtype=torch.float64)

    @staticmethod
    def of(graph: Graph, axis: Axis, moments: Sequence[Moments]) -> Zeroed:
        """At what gives the axis: linear operators, or a parameter where there are none."""
        made = [m.linear for m in moments if any(axis.atom is a for a, _ in m.linear.outputs)]
        if made:
            return Zeroed(
                axis, [(m.node, m.channels, owners(m.outputs, axis.atom)) for m in made], batched=True
            )
        member = axis.members[0]
        node = next(iter(graph.fx.find_nodes(op="get_attr", target=member.tensor)))
        term = graph.typing.tensors[member.tensor][member.dim]
        return Zeroed(axis, [(node, member.dim, owners(placements(term), axis.atom))], batched=False)

    @property
    def nodes(self) -> list[fx.Node]:
        """Where values and gradients are needed."""
        return [node for node, _, _ in self._places]

    def add(self, at: dict[fx.Node, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Take in one call."""
        for node, dim, owner in self._places:
            value, gradient = at[node]
            effect = (value.detach() * gradient).double().movedim(dim, -1)
            effect = effect.flatten(1, -2).sum(1) if self._batched and effect.dim() > 2 else effect
            effect = effect if self._batched else effect.flatten(0, -2).sum(0, keepdim=True)
            known = owner >= 0
            sums = effect.new_zeros(len(effect), self._axis.size)
            sums.index_add_(1, owner[known], effect[:, known])
            self._sums += sums.square().sum(0) / len(self._places)

    def scores(self, calls: int) -> torch.Tensor:
        """``[size]``, for one call's samples together."""
        return self._sums / max(1, calls)
