r"""Penalties that make positions of axes small, so that they can go later without being missed.

============ =========================================================================================
Slimming     ``strength * sum |gamma|`` over the scales of batch norms (Liu et al., *Learning Efficient
             Convolutional Networks through Network Slimming*, ICCV 2017, eq. 1)
GroupLasso   ``strength * sum_i sqrt(n_i) ||w_i||`` over the positions of axes, ``w_i`` all ``n_i`` entries
             that a position owns (Yuan and Lin, 2006, eq. 2.1; Wen et al., *Learning Structured Sparsity in
             Deep Neural Networks*, NeurIPS 2016)
Growing      ``strength / 2 * sum w^2`` over what a plan is to remove, with a strength that grows (Wang et
             al., *Neural Pruning via Growing Regularization*, ICLR 2021, GReg-1)
============ =========================================================================================

Each is called for a scalar that is added to the loss. What belongs to a position is read from the axis types
(:mod:`.groups`), so that they work on any network that types, and follow it when it shrinks on the way.

>>> import torch, graphprune
>>> model = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 1, bias=False))
>>> for layer in model:
...     _ = torch.nn.init.ones_(layer.weight)
>>> module = graphprune.trace(model, torch.zeros(1, 2)).module
>>> penalty = GroupLasso(module, 0.1)            # three hidden units, each with two inputs and an output
>>> round(penalty().item(), 4), round(0.1 * 3 * 3**0.5 * 3**0.5, 4)
(0.9, 0.9)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import InputError
from ..module import TracedModule, require_traced
from ..plans.candidates import Limits, allowed
from ..plans.plan import Plan
from ..plans.rewrite import kept_positions
from .groups import Groups

aten = torch.ops.aten


class Slimming:
    """L1 on the scales of batch norms whose channels could go. Then prune with importance ``bn-scale``.

    Attributes:
        module: as given.
        strength: what the sum is multiplied with; 1e-4 to 1e-5 in the paper.
    """

    def __init__(
        self,
        module: TracedModule,
        strength: float = 1e-4,
        *,
        ignored: tuple[str, ...] = (),
        only: tuple[str, ...] = (),
        statistical: bool = False,
    ):
        """Arguments: a traced network, and axes by name as of ``prune-channels``.

        Raises:
            InputError: no batch norm has a channel that could go.
        """
        require_traced(module)
        self.module, self.strength = module, _checked(strength)
        self._limits = Limits(ignored=ignored, only=only, statistical=statistical)
        self._seen: tuple[fx.Graph, tuple[str, ...]] | None = None
        if not self.scales:
            raise InputError(
                "no batch norm scales channels that could go (were they folded away?); use GroupLasso, which "
                "needs none"
            )

    @property
    def scales(self) -> tuple[str, ...]:
        """The names of the scales that the sum is over."""
        if self._seen is None or self._seen[0] is not self.module.graph:
            graph = self.module.captured
            inside = {m.tensor for axis in allowed(graph, self._limits) for m in axis.members}
            found = {
                str(node.args[1].target)  # type: ignore[union-attr]
                for node in graph.find(aten.batch_norm.default)
                if graph.constant(node.args[1]) is not None
            }
            self._seen = self.module.graph, tuple(n for n in graph.parameters if n in found & inside)
        return self._seen[1]

    def __call__(self) -> Tensor:
        """The penalty, a scalar."""
        sums = [self.module.get_parameter(name).abs().sum() for name in self.scales]
        return self.strength * torch.stack(sums).sum()


class GroupLasso:
    """The norm of everything that a position owns, summed over the positions of all axes that could shrink.

    Attributes:
        module: as given.
        strength: what the sum is multiplied with.
    """

    def __init__(
        self,
        module: TracedModule,
        strength: float = 1e-4,
        *,
        ignored: tuple[str, ...] = (),
        only: tuple[str, ...] = (),
        statistical: bool = False,
    ):
        """Arguments: a traced network, and axes by name as of ``prune-channels``.

        Raises:
            InputError: there is no axis that could shrink.
        """
        self.module, self.strength = module, _checked(strength)
        self._groups = Groups(module, Limits(ignored=ignored, only=only, statistical=statistical))
        self._weights: tuple[fx.Graph, dict[str, Tensor]] | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes whose positions the sum is over."""
        return tuple(self._groups.axes)

    def norms(self) -> dict[str, Tensor]:
        """Axis → ``[size]``: the norm of every position's entries; where it is 0, so is its gradient."""
        found = {}
        for name, squares in self._groups.squares().items():
            there = squares > 0
            found[name] = torch.where(there, torch.where(there, squares, 1.0).sqrt(), 0.0)
        return found

    def __call__(self) -> Tensor:
        """The penalty, a scalar."""
        if self._weights is None or self._weights[0] is not self.module.graph:
            sizes = {name: size.sqrt() for name, size in self._groups.sizes().items()}
            self._weights = self.module.graph, sizes
        weights = self._weights[1]
        sums = [(weights[name].to(norm) * norm).sum() for name, norm in self.norms().items()]
        return self.strength * torch.stack(sums).sum()


class Growing:
    """L2 on what a plan is to remove, growing until nothing of it is left; then the plan goes for nothing.

    ``step()`` after every optimizer step; when :attr:`done`, ``remove(module, growing.plan, optimizer)``.

    Attributes:
        module, plan: as given.
        steps: how many optimizer steps were done.
    """

    def __init__(
        self, module: TracedModule, plan: Plan, *, rate: float = 1e-4, every: int = 10, ceiling: float = 1.0
    ):
        """Arguments: what is to go, and by how much the strength grows, every how many steps, up to what.

        Args:
            module: a traced network.
            plan: a plan for ``module.captured``: of ``graph.plan(ratio=…)``, or of a budget.
            rate: how much is added to the strength at a time.
            every: steps between two of these.
            ceiling: where the strength stops.

        Raises:
            InputError: an argument is out of range, or the plan removes nothing.
            AxisError: the plan is another network's.
        """
        require_traced(module)
        if not plan:
            raise InputError("the plan removes nothing, so that there is nothing to make small")
        if not isinstance(every, int) or every < 1:
            raise InputError(f"every is a number of steps, at least 1, got {every!r}")
        if not 0 < rate <= ceiling:
            raise InputError(
                f"the strength grows by rate up to ceiling, 0 < rate <= ceiling, got {rate}, {ceiling}"
            )
        self.module, self.plan = module, plan
        self._rate, self._every, self._ceiling = rate, every, ceiling
        self.steps = 0
        self._seen: tuple[fx.Graph, dict[str, Tensor]] | None = None
        self.removed  # noqa: B018 - a plan that does not belong is said now

    @property
    def strength(self) -> float:
        """What the sum is multiplied with by now."""
        return min(self._ceiling, self._rate * (self.steps // self._every))

    @property
    def done(self) -> bool:
        """Whether the strength has stopped growing."""
        return self.strength >= self._ceiling

    @property
    def removed(self) -> dict[str, Tensor]:
        """Parameter → which of its entries the plan removes (bool, in its shape)."""
        if self._seen is None or self._seen[0] is not self.module.graph:
            graph = self.module.captured
            found = {}
            for name, kept in kept_positions(graph, self.plan).items():
                if name in graph.parameters and any(where is not None for where in kept):
                    stays = torch.ones_like(graph.tensors[name], dtype=torch.bool)
                    for dim, where in enumerate(kept):
                        if where is not None:
                            gone = torch.ones(stays.shape[dim], dtype=torch.bool, device=stays.device)
                            gone[where.to(stays.device)] = False
                            stays.index_fill_(dim, gone.nonzero()[:, 0], False)
                    found[name] = ~stays
            self._seen = self.module.graph, found
        return self._seen[1]

    def __call__(self) -> Tensor:
        """The penalty, a scalar."""
        sums = [
            self.module.get_parameter(name).square().masked_fill(~gone, 0.0).sum()
            for name, gone in self.removed.items()
        ]
        return self.strength / 2 * torch.stack(sums).sum()

    def step(self) -> None:
        """After ``optimizer.step()``."""
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """What a later process needs to go on."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another one's :meth:`state_dict`."""
        self.steps = state["steps"]


def _checked(strength: float) -> float:
    if not strength >= 0:
        raise InputError(f"the strength of a penalty is at least 0, got {strength}")
    return strength
