"""An exit half-way: inputs that are easy leave there, and the rest of the network runs only for the others.

The dynamic network of Teerapittayanon, McDanel and Kung (*BranchyNet*, ICPR 2016): a classifier behind a cut
(:mod:`.exit_head`) whose confidence, the largest softmax, is compared with a threshold; where it is
reached, its answer is the network's (:mod:`.exit_branch`). Mean time falls with the share of inputs that
leave; the time of those that do not rises by the head.

The head is fitted to the network's own answers on calibration inputs. Labels do better: ``function`` gets
the module with both answers and trains it, with :class:`ExitLoss` as its loss,

    loss = w · task(exit, y) + (1 - w) · task(final, y).

The parts are there to be called by themselves: ``attach`` gives the form to train, ``branch`` the one to
deploy, for any threshold.

>>> import torch, graphprune
>>> from graphprune.pipeline import Context
>>> layers = [torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 8, 3), torch.nn.Flatten()]
>>> model = torch.nn.Sequential(*layers, torch.nn.Linear(8, 3))
>>> graph = graphprune.trace(model, torch.zeros(1, 1, 5, 5))
>>> data = Context(calibration=[torch.randn(1, 1, 5, 5) for _ in range(32)])
>>> print(EarlyExit(at="1", threshold=0.5).run(graph, data).graph.output.args[0][0].args[0].target)
cond
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils import _pytree as pytree

from graphprune.calibration import read
from graphprune.cost import cost, node_macs
from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.pipeline import Context, Note, Pass, PassResult

from .exit_branch import branch
from .exit_head import BACK, HEAD, NAME, attach, fit, place

__all__ = ["EarlyExit", "ExitLoss", "attach", "branch", "fit"]


@dataclass(frozen=True)
class EarlyExit(Pass):
    """Add an exit.

    Attributes:
        at: where: a node, or a module by its path (the last value it computes); after quantization,
            behind the quantizer of that value.
        threshold: what the exit's largest softmax has to reach, above 0 and at most 1.
        pool: how features become one vector: ``mean`` over positions, or the ``first`` token of a sequence.
        features: the dimension that holds features; by default the second, and the last of a sequence
            ``[n, tokens, d]``.
        limit: calibration samples to fit the head to.
        function: ``module -> anything``, trains the module that returns ``(exit, final)``; from Python.
    """

    name: ClassVar[str] = NAME
    exact: ClassVar[bool] = False
    destroys: ClassVar[frozenset[str]] = frozenset({"trainable", "float"})

    at: str = ""
    threshold: float = 0.9
    pool: str = "mean"
    features: int | None = None
    limit: int = 512
    function: Callable[[Any], Any] | None = None

    def run(self, graph: Graph, context: Context) -> PassResult:
        """The network with its rest in a branch."""
        if not self.at:
            raise PassError(self.name, "needs a cut: at=, a node or a module of the network")
        if context.calibration is None and self.function is None:
            raise PassError(
                self.name,
                "its head has to be fitted: pass calibration= (inputs, without labels), or from Python a "
                "function that trains it",
            )
        if graph.is_meta:
            raise PassError(self.name, "it runs the network, and the weights have shapes only")
        both = attach(graph, self.at, pool=self.pool, features=self.features)
        data = None if context.calibration is None else read(graph, context.calibration, self.limit)
        if data is not None:
            both = fit(both, data.calls)
        if self.function is not None:
            both.module.eval()
            with torch.enable_grad():
                self.function(both.module)
            both.module.eval()
            _finite(both)
        result = branch(both, self.threshold)
        notes = self._where(graph, result)
        if data is not None:
            notes += [_leaving(both, data.calls, self.threshold), *data.notes]
        return PassResult(result, True, tuple(notes))

    def _where(self, graph: Graph, result: Graph) -> list[Note]:
        whole, now = cost(result).macs, _trunk_macs(result)
        cut = place(graph, self.at)
        changed = Note(
            "changed",
            cut.name,
            f"an exit: {now:,} multiply-accumulates up to it, {whole:,} in all ({cost(graph).macs:,} "
            "before); a batch leaves when all its samples are confident",
        )
        if cut.target is not BACK or cut.name == self.at:
            return [changed]
        behind = f"the cut at {self.at!r} is behind a quantizer, so that both sides start from integers"
        return [changed, Note("info", cut.name, behind)]


@dataclass(frozen=True)
class ExitLoss:
    """A loss of ``(exit, final)`` and targets, from the task's own loss.

    Attributes:
        task: ``(logits, targets) -> loss``; gets the tensor where the network returns a structure around one.
        weight: of the exit, 0 to 1; the rest is the network's own.

    >>> loss = ExitLoss(torch.nn.functional.cross_entropy, weight=0.25)
    >>> zeros = torch.zeros(2, 4)
    >>> round(loss((zeros, zeros), torch.tensor([0, 1])).item(), 4)
    1.3863
    """

    task: Callable[[Any, Any], torch.Tensor]
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(f"the weight of the exit's loss is a share, 0 to 1, not {self.weight}")

    def __call__(self, outputs: tuple[Any, Any], targets: Any) -> torch.Tensor:
        """The weighted sum."""
        early, final = (_logits(value) for value in outputs)
        return self.weight * self.task(early, targets) + (1 - self.weight) * self.task(final, targets)


def _logits(value: Any) -> Any:
    """The tensor in what a network returns, which may be a dict with one."""
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return tensors[0] if len(tensors) == 1 else value


def _finite(graph: Graph) -> None:
    for name, value in graph.tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise PassError(NAME, f"after the function {name!r} is not finite: training diverged")


def _trunk_macs(graph: Graph) -> int:
    """What an input that leaves costs: everything outside the branch."""
    return sum(map(node_macs, graph.fx.nodes))


@torch.no_grad()
def _leaving(graph: Graph, calls: Any, threshold: float) -> Note:
    """How many calibration samples would leave, and what the network itself says of them."""
    results = [graph.run(*call) for call in calls]
    early, final = (torch.cat([r[i] for r in results]) for i in (0, 1))
    leaves = early.softmax(-1).amax(-1) >= threshold
    count = int(leaves.sum())
    same = float((early.argmax(-1) == final.argmax(-1))[leaves].double().mean()) if count else 1.0
    agree = f"; the network agrees on {same:.1%} of them" if count else ""
    return Note("info", HEAD, f"{count} of {len(leaves)} calibration samples leave{agree}")
