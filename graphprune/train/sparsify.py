"""Zeros that come while the network trains: masks of ``prune-weights``, driven by a schedule.

    sparsify = Sparsify(module, Cubic(final=0.9, end=1000), optimizer=optimizer)
    for batch in data:
        loss(batch).backward(); optimizer.step(); sparsify.step(); optimizer.zero_grad()

Every weight is multiplied with its mask in the graph from the start; a due step takes more entries, those of
the lowest score, and never gives one back. The parameters stay the same objects. Where an entry goes, the
parameter becomes zero and what the optimizer remembers of it, too, so that no momentum moves it.

With ``N:M`` the schedule says how many of every M are zero by then: ``sparsity * M`` rounded down, up to
``M - N``; 2:4 is 3:4 from 25 % and 2:4 from 50 % on.

>>> import torch, graphprune
>>> from graphprune.train.schedules import Polynomial
>>> module = graphprune.trace(torch.nn.Linear(4, 2), torch.zeros(1, 4)).module
>>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
>>> sparsify = Sparsify(module, Polynomial(final=0.5, end=4, frequency=2, power=1.0), optimizer=optimizer)
>>> for step in range(4):
...     module(torch.ones(3, 4)).square().sum().backward()
...     optimizer.step(); sparsify.step(); optimizer.zero_grad()
...     print(sparsify.sparsity)
0.0
0.25
0.25
0.5
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.optim import Optimizer

from ..errors import InputError
from ..graph import Graph
from ..module import TracedModule, require_traced
from ..notes import Note
from ..sparsity.patterns import NofM, Pattern
from . import optimizer_state
from .schedules import Schedule

if TYPE_CHECKING:
    from graphprune.passes.prune_weights.masks import Weight


class Sparsify:
    """Set more and more entries of linear and convolution weights to zero.

    Attributes:
        module, schedule, optimizer: as given.
        notes: which weights stay dense, and why.
        steps: how many optimizer steps were done.
    """

    def __init__(
        self,
        module: TracedModule,
        schedule: Schedule,
        *,
        optimizer: Optimizer | None = None,
        pattern: str = "anywhere",
        scope: str = "local",
        importance: str = "magnitude",
        ignored: tuple[str, ...] = (),
        only: tuple[str, ...] = (),
    ):
        """Put masks into the module's graph; what is due at step 0 goes at once.

        Args:
            module: a traced network (``graphprune.trace(model, x).module`` or ``result.module``).
            schedule: which share of the entries (with ``RxC`` of the blocks) is zero when.
            optimizer: whose state at masked entries is zeroed.
            pattern, scope, ignored, only: as of :class:`~graphprune.passes.prune_weights.PruneWeights`.
            importance: ``magnitude``, or ``gradient``: weight times the sum of its gradients since the last
                due step (read from ``.grad``, so call :meth:`step` before ``zero_grad``).

        Raises:
            InputError: an option is out of range, the schedule does not end where ``N:M`` does, there is no
                weight to prune, gradients are to decide before there are any, or the optimizer trains
                another network.
        """
        from graphprune.passes.prune_weights.masks import masked, weights

        require_traced(module)
        if optimizer is not None:
            optimizer_state.require_held(optimizer, module)
        self.module, self.schedule, self.optimizer = module, schedule, optimizer
        self._pattern, self._scope, self._importance = pattern, scope, importance
        self._select = {"ignored": ignored, "only": only}
        self.steps = 0
        if importance == "gradient" and schedule.due(0) and schedule(0):
            raise InputError("gradients decide what goes, and there are none before step 1: begin there")
        graph = module.captured
        found, notes = weights(graph, self._final(), ignored, only)
        if not found:
            why = "".join(f"; {note.where} {note.message}" for note in notes)
            raise InputError(f"there is no weight to prune{why}")
        whole = {w.name: torch.ones_like(graph.tensors[w.name], dtype=torch.bool) for w in found}
        if optimizer is not None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            notes += [
                Note("info", name, "the optimizer does not hold it: zeros come, and the rest is not trained")
                for name in whole
                if id(graph.tensors[name]) not in held
            ]
        result = masked(graph, {n: (graph.tensors[n].detach(), mask) for n, mask in whole.items()})
        _share(result, graph, whole)
        module.become(result)
        if schedule.reached < schedule.target:
            notes.append(
                Note(
                    "info", "", f"the last step that is due is {schedule.last}, where sparsity is "
                    f"{schedule.reached:.4f} of {schedule.target:.4f} asked",
                )
            )  # fmt: skip
        self.notes = tuple(notes)
        self._names = tuple(whole)
        self._seen: tuple[fx.Graph, list[Weight]] | None = None
        self._slopes: dict[str, Tensor] = {}
        if schedule.due(0):
            self._prune()

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name → its mask of ones and zeros, the module's buffer; those that are still there."""
        buffers = dict(self.module.named_buffers())
        return {name: buffers[f"{name}_mask"] for name in self._names if f"{name}_mask" in buffers}

    @property
    def sparsity(self) -> float:
        """The share of the entries of all weights with a mask that is zero; after :meth:`strip` of those
        that had one, which training may have filled."""
        parameters = dict(self.module.named_parameters())
        kept = self.masks or {name: parameters[name] != 0 for name in self._names if name in parameters}
        entries = sum(each.numel() for each in kept.values())
        return 1 - sum(float(each.sum(dtype=torch.float64)) for each in kept.values()) / max(entries, 1)

    def step(self) -> None:
        """After ``optimizer.step()``: prune if the step is due.

        Raises:
            InputError: gradients decide, and a weight has none; or the masks are gone (:meth:`strip`).
        """
        if not self.masks:
            raise InputError(
                "the masks were stripped, so that nothing holds the zeros; step before strip(), and make a "
                "new Sparsify to go on"
            )
        self.steps += 1
        if self._importance == "gradient":
            self._gather()
        if self.schedule.due(self.steps):
            self._prune()
        else:
            self._hold()

    def strip(self) -> None:
        """Make the zeros permanent: masks go, weights stay the same parameters. Training may fill them.

        A second time does nothing.
        """
        from graphprune.passes.strip_masks import StripMasks

        from ..pipeline import Context

        if not self.masks:
            return
        self._hold()
        graph = self.module.captured
        result = StripMasks().run(graph, Context()).graph
        stripped = [
            n for n in graph.parameters if f"{n}_mask" in graph.tensors.keys() - result.tensors.keys()
        ]
        values = {name: result.tensors[name].detach() for name in stripped}
        _share(result, graph, stripped)
        with torch.no_grad():
            for name, value in values.items():
                graph.tensors[name].copy_(value)
        self.module.become(result)

    def state_dict(self) -> dict[str, Any]:
        """What a later process needs besides the module's own state, which has the masks."""
        return {
            "weights": list(self._names),
            "steps": self.steps,
            "gradients": {name: slope.clone() for name, slope in self._slopes.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another one's :meth:`state_dict`; load the module's own state, too.

        Raises:
            InputError: it is of other weights.
        """
        if set(state["weights"]) != set(self._names):
            other = ", ".join(sorted(set(state["weights"]) ^ set(self._names)))
            raise InputError(f"this state has masks for other weights than the module: {other}")
        self.steps = state["steps"]
        self._slopes = {
            name: slope.to(self.module.get_parameter(name).device, copy=True)
            for name, slope in state["gradients"].items()
        }

    # ---- what goes ------------------------------------------------------------------------------

    def _asked(self, sparsity: float) -> Pattern:
        from graphprune.passes.prune_weights import PruneWeights

        own = None if ":" in self._pattern else sparsity  # N:M says itself how much goes
        return PruneWeights(
            sparsity=own, pattern=self._pattern, scope=self._scope, importance=self._importance
        ).asked()

    def _final(self) -> Pattern:
        """The pattern at the end of the schedule."""
        target = self.schedule.target
        pattern = self._asked(target)
        if isinstance(pattern, NofM) and abs(target - pattern.sparsity) > 1e-6:
            raise InputError(
                f"{self._pattern} ends with {pattern.sparsity:g} of the entries zero, and the schedule with "
                f"{target:g}; give it that as its final sparsity"
            )
        return pattern

    def _at(self, sparsity: float) -> Pattern | None:
        """The pattern at a sparsity, ``None`` where nothing is zero yet."""
        pattern = self._asked(sparsity)
        if not isinstance(pattern, NofM):
            return pattern
        zeros = min(int(sparsity * pattern.m + 1e-6), pattern.m - pattern.n)
        return NofM(pattern.m - zeros, pattern.m) if zeros else None

    @torch.no_grad()
    def _prune(self) -> None:
        """Take what the schedule asks for by now."""
        from graphprune.passes.prune_weights.selection import chosen

        pattern = self._at(self.schedule(self.steps))
        if pattern is not None:
            masks, ranked = self.masks, {}
            for weight in self._weights():
                value, mask = self.module.get_parameter(weight.name), masks[weight.name]
                wide = value if value.element_size() >= 4 else value.float()
                score = wide * self._slopes[weight.name] if self._slopes else wide
                # What went has the lowest score of all, so that it goes again, and first.
                score = score.abs().masked_fill(mask == 0, -1.0)
                ranked[weight.name] = weight.matrix(score)
            kept = chosen(ranked, pattern, self._scope, None)
            for weight in self._weights():
                mask = masks[weight.name]
                mask.mul_(weight.back(kept[weight.name], mask))
        self._slopes = {}
        self._hold(forget=True)

    def _weights(self) -> list[Weight]:
        """The weights as they stand in the module's graph now."""
        from graphprune.passes.prune_weights.masks import weights

        if self._seen is None or self._seen[0] is not self.module.graph:
            found, _ = weights(self.module.captured, self._final(), **self._select)
            self._seen = self.module.graph, [w for w in found if w.name in self._names]
        return self._seen[1]

    @torch.no_grad()
    def _hold(self, forget: bool = False) -> None:
        """Masked entries are zero in the parameter, whatever the optimizer did."""
        for name, mask in self.masks.items():
            parameter = self.module.get_parameter(name)
            parameter.mul_(mask)
            if forget and self.optimizer is not None:
                optimizer_state.forget(self.optimizer, parameter, mask)

    @torch.no_grad()
    def _gather(self) -> None:
        for name in self.masks:
            slope = self.module.get_parameter(name).grad
            if slope is None:
                raise InputError(
                    f"{name!r} has no gradient, and gradients decide what goes; call step() between "
                    "backward() and zero_grad()"
                )
            known = self._slopes.get(name)
            # A weight that lost channels meanwhile starts again: the sum was over another network.
            if known is None or known.shape != slope.shape:
                known = torch.zeros_like(slope)
            self._slopes[name] = known + slope


def _share(result: Graph, graph: Graph, names: Any) -> None:
    """Give a rewrite the parameters of the graph before it, so that an optimizer knows them."""
    result.tensors.update({name: graph.tensors[name] for name in names})
