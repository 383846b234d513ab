"""``torch.compile`` of an optimised graph, to be called in the process that compiles it.

The same compiler as AOTInductor's, with the same settings: weights are frozen, so that oneDNN chooses their
layout and quantizers around a product become its integer kernel. Nothing is written to disk; the first call
compiles. What is compiled is one graph, without breaks.

>>> import torch, graphprune
>>> model = torch.nn.Linear(3, 2)
>>> result = graphprune.optimize(model, torch.ones(1, 3), measure=False)
>>> run = result.compiled()  # doctest: +SKIP
>>> run(torch.ones(1, 3)).shape  # doctest: +SKIP
torch.Size([1, 2])
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from graphprune.graph import Graph
from graphprune.rounding import proved
from graphprune.threads import checked, torch_threads

from .exported import tensor_outputs
from .inductor import not_compiled, placed, quiet, settings, understood


class Compiled:
    """A compiled graph, called with the original's arguments.

    Attributes:
        certificate: of its answer to the example inputs against the graph's.
        threads: of torch during a call; ``None`` leaves them.
        device: it computes on; inputs go there, results to where the inputs were.
        notes: what a reader should know of it.
    """

    def __init__(self, graph: Graph, threads: int | None = None, device: str = "cpu"):
        self.signature, self.threads, self.device = graph.signature, checked(threads), torch.device(device)
        work = graph.copy()
        kept = tensor_outputs(work)
        understood(work)
        work, self.notes = placed(work, device)
        flat = work.output.args[0]
        self._constant = {i: v for i, v in enumerate(flat) if i not in kept}  # type: ignore[arg-type]
        work.output.args = (tuple(flat[i] for i in kept),)  # type: ignore[index]
        symbolic = any(not isinstance(s, int) for n in graph.placeholders for s in n.meta["val"].shape)
        self._kept = kept
        self._seen: set[Any] = set()
        # The front half of the compiler reads them, too, which `options` of torch.compile do not reach:
        # without them weights would be inputs and nothing would be frozen.
        self._settings = partial(torch._inductor.config.patch, settings(work))
        self._run: Callable[..., Any] = torch.compile(work.callable(), fullgraph=True, dynamic=symbolic)
        what = "the compiled graph does not reproduce the graph"
        self.certificate = proved(graph, self.flat, graph.examples, what)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run once. Raises InputError when the arguments do not fit what was captured."""
        return self.signature.unflatten(self.flat(*self.signature.flatten(args, kwargs)))

    def flat(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        """The flat outputs for flat inputs.

        Raises:
            BackendError: it does not compile.
        """
        home = inputs[0].device if inputs else torch.device("cpu")
        given = [value.detach().to(self.device).contiguous() for value in inputs]
        shapes = tuple((value.shape, value.dtype) for value in given)
        # Setting them takes a millisecond, and what is compiled stays so.
        compiles: AbstractContextManager[Any] = nullcontext() if shapes in self._seen else self._settings()
        try:
            with quiet(), torch.no_grad(), torch_threads(self.threads), compiles:
                found = iter(self._run(*given))
        except Exception as error:
            raise not_compiled(error) from error
        self._seen.add(shapes)
        count = len(self._kept) + len(self._constant)
        return tuple(self._constant[i] if i in self._constant else next(found).to(home) for i in range(count))
