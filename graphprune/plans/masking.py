"""The original network with a plan's positions set to zero everywhere, run operator by operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ..axes.terms import Atom, Term, leaves, mask
from ..axes.typing import SYMBOLIC, Typed
from ..errors import VerificationError
from ..graph import Graph
from .plan import Plan, keep_masks


def run_masked(graph: Graph, plan: Plan, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """Flat outputs of the original with every removed position zeroed in every parameter and value."""
    return _Masked(graph, keep_masks(graph, plan)).run_on(inputs)


class _Masked(fx.Interpreter):
    def __init__(self, graph: Graph, masks: dict[Atom, np.ndarray]):
        super().__init__(fx.GraphModule({**graph.tensors, **graph.bodies}, graph.fx))
        self._dims, self._masks = graph.typing.dims, masks
        self._full: dict[tuple[Term, int], torch.Tensor | None] = {}
        self._open = set(_open_atoms(graph))

    def run_on(self, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        with torch.no_grad():
            return self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return value if n.op == "output" else self._zeroed(value, self._dims[n])

    def _zeroed(self, value: Any, typed: Typed) -> Any:
        if isinstance(value, torch.Tensor):
            for dim, term in enumerate(typed):  # type: ignore[arg-type]
                keep = self._mask(term, value.shape[dim])
                if keep is not None:
                    shape = [1] * value.dim()
                    shape[dim] = -1
                    # where, not multiplication: what is removed may be infinite or NaN by now.
                    zero = torch.zeros((), dtype=value.dtype, device=value.device)
                    value = torch.where(keep.reshape(shape).to(value.device), value, zero)
            return value
        if isinstance(value, (tuple, list)) and typed is not None:
            return type(value)([self._zeroed(v, t) for v, t in zip(value, typed, strict=True)])
        return value

    def _mask(self, term: Term, size: int) -> torch.Tensor | None:
        if (term, size) not in self._full:
            keep = mask(term, self._masks)
            if not keep.all() and len(keep) != size:
                keep = mask(term, {**self._masks, **self._stretched(term, size)})
            self._full[term, size] = None if keep.all() else torch.from_numpy(keep)
        return self._full[term, size]

    def _stretched(self, term: Term, size: int) -> dict[Atom, np.ndarray]:
        """The open dimension in a term (batch × heads, say) at the size it has in this call."""
        found = [a for a in leaves(term) if a in self._open or a.frozen is SYMBOLIC]
        if len(found) != 1 or size * found[0].size % term.size:
            raise VerificationError(
                f"cannot mask a dimension of {size} positions that was captured with {term.size}: it joins "
                "several dimensions of open size; verify at the batch size of the example"
            )
        return {found[0]: np.ones(size * found[0].size // term.size, bool)}


def _open_atoms(graph: Graph) -> Iterator[Atom]:
    """The axes of the inputs' dimensions whose size is symbolic."""
    for node in graph.placeholders:
        for term, size in zip(graph.typing.dims[node], graph.typing.shape(node), strict=True):  # type: ignore[arg-type]
            if not isinstance(size, int):
                yield from leaves(term)
