"""Channels that go while the network trains: structured pruning to a budget, driven by a schedule.

    shrink = Shrink(module, Cubic(final=0.5, end=1000), optimizer=optimizer, budget="macs")
    for batch in data:
        loss(batch).backward(); optimizer.step(); shrink.step(); optimizer.zero_grad()

The schedule's sparsity is the share of the budget that is gone: at 0.5 at most half of the
multiply-accumulates (or parameters, or bytes) that the module had at first are left. What goes at a due step
is what ``prune-channels`` would take. The module stays the same object and becomes smaller in place;
parameters that lose positions are new objects, for torch's autograd does not let a tensor change its shape,
and take the places of the old ones in the optimizer's groups, with what is left of their state and of their
gradients (:mod:`.optimizer_state`). Every removal is proved as in a pipeline: the smaller network must
compute what the larger one did with the removed positions at zero.

>>> import torch, graphprune
>>> from graphprune.train.schedules import Polynomial
>>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> module = graphprune.trace(model, torch.zeros(1, 3)).module
>>> optimizer = torch.optim.Adam(module.parameters())
>>> schedule = Polynomial(final=0.5, end=4, frequency=2, power=1.0)
>>> shrink = Shrink(module, schedule, optimizer=optimizer, budget="macs")
>>> for step in range(4):
...     module(torch.ones(4, 3)).square().sum().backward()
...     optimizer.step(); shrink.step(); optimizer.zero_grad()
...     print(shrink.sparsity, list(module.get_parameter("0.weight").shape))
0.0 [8, 3]
0.25 [6, 3]
0.25 [6, 3]
0.5 [4, 3]
>>> [list(optimizer.state[parameter]["exp_avg"].shape) for parameter in module.parameters()]
[[4, 3], [4], [2, 4], [2]]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from ..errors import InputError
from ..importance import Data, Importance
from ..module import TracedModule, require_traced
from ..plans.budget import solve
from ..plans.candidates import RESOURCES, Limits, Share, count_of
from ..plans.plan import CostModel, Plan
from ..plans.rewrite import kept_positions
from ..verify import mask_equivalence, require
from .optimizer_state import Cut, follow, refusal, require_held
from .schedules import Schedule


class Shrink:
    """Remove more and more channels, hidden units and heads.

    Attributes:
        module, schedule, optimizer: as given.
        whole: what the module cost at first, in the budget's unit.
        plans: what was removed, one after the other.
        steps: how many optimizer steps were done.
    """

    def __init__(
        self,
        module: TracedModule,
        schedule: Schedule,
        *,
        optimizer: Optimizer | None,
        budget: str = "macs",
        importance: Importance = "l2",
        scope: str = "global",
        minimum: Share = 0.1,
        maximum: Share = 1.0,
        align: int = 1,
        ignored: tuple[str, ...] = (),
        only: tuple[str, ...] = (),
        statistical: bool = False,
        calibration: Iterable[Any] | None = None,
        loss: Callable[[Any], Any] | None = None,
        limit: int = 512,
        seed: int = 0,
    ):
        """Check that the schedule's end can be reached; what is due at step 0 goes at once.

        Args:
            module: a traced network (``graphprune.trace(model, x).module`` or ``result.module``).
            schedule: which share of the budget is gone when.
            optimizer: the one that trains the module; ``None`` only where none does yet.
            budget: ``macs``, ``params`` or ``bytes``.
            minimum, maximum: as of ``prune-channels``, shares of what the axes have now, at the start.
            importance, scope, align, ignored, only, statistical, limit: as of ``prune-channels``.
            calibration, loss: what importances beyond the weights look at.
            seed: for random importance and projections.

        Raises:
            InputError: an option is out of range, the budget at the end cannot be reached, or the optimizer
                trains another network.
        """
        require_traced(module)
        if optimizer is not None:
            require_held(optimizer, module)
        if budget not in RESOURCES:
            raise InputError(f"unknown budget {budget!r}; known: {', '.join(RESOURCES)}")
        self.module, self.schedule, self.optimizer = module, schedule, optimizer
        self._budget, self._importance, self._scope, self._seed = budget, importance, scope, seed
        self._data = Data(calibration, loss, limit)
        self.steps, self.plans = 0, list[Plan]()
        graph = module.captured
        self.whole = CostModel(graph).totals({})[RESOURCES[budget]]
        self._limits = Limits(minimum, maximum, align, align, ignored, only, statistical)
        axes = graph.axes.prunable
        # Shares are of the axes as they are now; of what is left later they would mean less each time.
        self._least = {axis.name: count_of(axis, minimum, 0.0) for axis in axes}
        self._most = {axis.name: count_of(axis, maximum, 1.0) for axis in axes}
        if schedule.target > 0:
            # Whatever the order, the same steps are there to take: an end out of reach is said now.
            solve(graph, {budget: self._allowed(schedule.target)}, "random", scope=scope, limits=self._limits)
        if schedule.due(0):
            self._remove()

    @property
    def sparsity(self) -> float:
        """The share of the budget that is gone."""
        return 1 - CostModel(self.module.captured).totals({})[RESOURCES[self._budget]] / self.whole

    def step(self) -> None:
        """After ``optimizer.step()``: remove what is due.

        Raises:
            InputError: the optimizer's state cannot follow.
            VerificationError: the smaller network is not the larger one without the removed positions.
        """
        self.steps += 1
        if self.schedule.due(self.steps):
            self._remove()

    def state_dict(self) -> dict[str, Any]:
        """What a later process needs to go on: steps, and the plans as JSON."""
        return {"steps": self.steps, "whole": self.whole, "plans": [plan.to_json() for plan in self.plans]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Shrink a module of the first size to where another process was.

        Load the module's and the optimizer's own states afterwards: they have the smaller shapes.

        Raises:
            InputError: the module has been shrunk already, or is another one.
        """
        if self.plans:
            raise InputError("the module has shrunk already; load a state into one of the first size")
        if state["whole"] != self.whole:
            raise InputError(
                f"the state is of a network with {state['whole']:,} {self._budget} at first, this one has "
                f"{self.whole:,}"
            )
        for text in state["plans"]:
            self._apply(Plan.from_json(text))
        self.steps = state["steps"]

    def _allowed(self, share: float) -> int:
        """What may be left when a share is gone."""
        return int((1 - share) * self.whole + 1e-6)

    def _remove(self) -> None:
        graph = self.module.captured
        allowed = self._allowed(self.schedule(self.steps))
        if CostModel(graph).totals({})[RESOURCES[self._budget]] <= allowed:
            return
        bounds = {
            "minimum": {name: n for name, n in self._least.items() if name in graph.axes},
            "maximum": {name: n for name, n in self._most.items() if name in graph.axes},
        }
        limits = Limits(**{**vars(self._limits), **bounds})
        self._apply(
            solve(
                graph, {self._budget: allowed}, self._importance,
                scope=self._scope, limits=limits, seed=self._seed, data=self._data,
            )
        )  # fmt: skip

    def _apply(self, plan: Plan) -> None:
        remove(self.module, plan, self.optimizer)
        self.plans.append(plan)


def remove(module: TracedModule, plan: Plan, optimizer: Optimizer | None = None) -> None:
    """Take a plan's positions out of a module in place; gradients and the optimizer's state follow.

    Args:
        module: a traced network.
        plan: a plan for ``module.captured``.
        optimizer: whose groups and state hold the module's parameters.

    Raises:
        AxisError: the plan is another network's.
        InputError: the optimizer's state cannot follow, or it trains another network; nothing was changed.
        VerificationError: the smaller network is not the larger one without the positions.
    """
    require_traced(module)
    if optimizer is not None:
        require_held(optimizer, module)
    graph = module.captured
    small = graph.apply(plan)
    # Fitting to the network before makes no sense once training moves on; and it need not stay in memory.
    small.removal = None
    kept = kept_positions(graph, plan)
    cuts = []
    for name, old in module.named_parameters():
        new = small.tensors.get(name)
        if new is not old:
            cuts.append(Cut(name, old, new if isinstance(new, Parameter) else None, kept[name]))
    if optimizer is not None:
        refusal(optimizer, cuts)
    device = next((t.device for t in graph.tensors.values()), torch.device("cpu"))
    inputs = [tuple(x.to(device) for x in graph.examples)]
    require(
        mask_equivalence(graph, plan, inputs, pruned=small), "the removal took something else than its plan"
    )
    for cut in cuts:
        if cut.new is not None and cut.old.grad is not None:
            cut.new.grad = cut.of(cut.old.grad)
    module.become(small)
    if optimizer is not None:
        follow(optimizer, cuts)
