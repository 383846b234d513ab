"""Hand the network to the caller's own training between two passes.

A pass of Python only: the textual form can name it, but not carry the function. The function gets the
network as a trainable ``nn.Module`` with the original's arguments and parameter names, in evaluation mode,
and the number of the step; it may change parameters and buffers, not shapes, and put masks in
(:class:`graphprune.train.Sparsify`). What it returns is ignored.

>>> import torch, graphprune
>>> graph = graphprune.trace(torch.nn.Linear(3, 2), torch.zeros(1, 3))
>>> def halve(module, step):
...     with torch.no_grad():
...         module.weight.mul_(0.5)
>>> trained = Train(halve, step=1).run(graph, None).graph
>>> bool(torch.equal(trained.tensors["weight"], graph.tensors["weight"] / 2))
True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphprune.errors import PassError
from graphprune.graph import Graph
from graphprune.pipeline import Context, Note, Pass, PassResult


@dataclass(frozen=True)
class Train(Pass):
    """Call a function on the network.

    Attributes:
        function: ``(module, step) -> anything``, from Python.
        step: which step it is, from 1.
    """

    name: ClassVar[str] = "train"
    exact: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({"trainable"})

    function: Callable[[Any, int], Any] | None = None
    step: int = 1

    def run(self, graph: Graph, context: Context) -> PassResult:
        """The graph with what the function made of its tensors."""
        if self.function is None:
            raise PassError(self.name, "needs a function (module, step), which only Python can give")
        trained = graph.copy()
        module = trained.module
        shapes = {name: tuple(tensor.shape) for name, tensor in trained.tensors.items()}
        module.eval()
        with torch.enable_grad():
            self.function(module, self.step)
        module.eval()
        for name, shape in shapes.items():
            value = trained.tensors[name]
            if tuple(value.shape) != shape:
                raise PassError(
                    self.name, f"the function changed the shape of {name!r} to {tuple(value.shape)}"
                )
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise PassError(self.name, f"after the function {name!r} is not finite: training diverged")
        changed = sum(
            name not in graph.tensors or not torch.equal(value.detach(), graph.tensors[name].detach())
            for name, value in trained.tensors.items()
        )
        if not changed:
            return PassResult(graph, False, (Note("info", "", "the function changed no tensor"),))
        return PassResult(trained, True, (Note("changed", "", f"{changed} tensors trained"),))
