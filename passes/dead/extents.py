"""How the analyses of dead channels see a value: whole along channels, one representative along the rest.

A value's *extent* has its size along every dimension that holds an axis of some parameter, and 1 along
batch, sequence and spatial dimensions, where whatever is said holds for every position. A mask over a value's
extent says something about positions of axes (:meth:`Extents.project`), and the positions that are
gone from the axes give a mask over every extent (:meth:`Extents.gone`).

>>> import torch, graphprune
>>> graph = graphprune.trace(torch.nn.Conv2d(3, 8, 1), torch.zeros(2, 3, 5, 5))
>>> Extents(graph).of(next(graph.find(torch.ops.aten.conv2d.default)))
(1, 8, 1, 1)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from graphprune.axes.terms import Atom, Term, leaves, mask, placements, resolve
from graphprune.cost import size_hint
from graphprune.graph import Graph
from graphprune.operands import depends_on_input

from .contractions import CONTRACTIONS

# A value of more elements than this is only looked at along the axes that can go.
MAX_ELEMENTS = 1 << 22

Extent = tuple[int, ...]


class Extents:
    """The extent of every value of a graph; see the module docstring."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self._dims = graph.typing.dims
        self._by_atom = graph.axes.by_atom
        self._followed: dict[Term, bool] = {}
        self._atoms = {a for a, axis in self._by_atom.items() if axis.kind != "frozen"}
        self._exclusive = frozenset(self._atoms)
        # Of frozen axes those of a layer's weight are followed, too: a note can tell what is dead there.
        for node in graph.find(*CONTRACTIONS):
            for operand in node.all_input_nodes:
                weight = operand.op == "get_attr" or (
                    operand is not node.args[0] and not depends_on_input(operand)
                )
                if weight and len(self.types(operand)[0]) > 1:
                    channels = self.types(operand)[0][:2]
                    self._atoms.update(a for term in channels for a in leaves(term) if a in self._by_atom)

    @property
    def atoms(self) -> set[Atom]:
        """The axes that are followed: those that can go, and frozen ones that values have."""
        return self._atoms

    def types(self, node: fx.Node) -> list[tuple[Term, ...]]:
        """The types of a node's results; empty for what is no tensor."""
        typed = self._dims.get(node)
        if typed is None:
            return []
        if typed.__class__ is tuple:
            return [typed]  # type: ignore[list-item]
        return [t if t.__class__ is tuple else () for t in typed]  # type: ignore[misc]

    def of(self, node: fx.Node, index: int = 0) -> Extent:
        """The extent of a node's result (its ``index``-th one)."""
        return self._extent(self.types(node)[index])

    def full(self, node: fx.Node) -> Extent:
        """The shape of a value, symbolic sizes as captured."""
        return tuple(size_hint(s) for s in node.meta["val"].shape)

    def _extent(self, dims: Sequence[Term]) -> Extent:
        extent = tuple(term.size if self._follows(term) else 1 for term in dims)
        if math.prod(extent) > MAX_ELEMENTS:
            extent = tuple(
                term.size if any(a in self._exclusive for a in leaves(term)) else 1 for term in dims
            )
        return extent

    def _follows(self, term: Term) -> bool:
        term = resolve(term)
        known = self._followed.get(term)
        if known is None:
            known = self._followed[term] = term.size > 1 and any(a in self._atoms for a in leaves(term))
        return known

    def gone(self, node: fx.Node, keep: Mapping[Atom, np.ndarray]) -> torch.Tensor:
        """Boolean over the extent of a node's (first) result: elements at a position that is not kept."""
        dims, extent = self.types(node)[0], self.of(node)
        result = torch.zeros(extent, dtype=torch.bool)
        for place, term in enumerate(dims):
            if extent[place] != 1:
                shape = [1] * len(extent)
                shape[place] = -1
                result = result | torch.from_numpy(~mask(term, keep)).view(shape)
        return result

    def project(
        self, node: fx.Node, index: int, marked: torch.Tensor, into: MutableMapping[Atom, np.ndarray]
    ) -> None:
        """Set every position in ``into`` that a marked element of the extent belongs to."""
        dims, extent = self.types(node)[index], self.of(node, index)
        for place, term in enumerate(dims):
            if extent[place] == 1:
                continue
            others = [d for d in range(len(extent)) if d != place]
            chosen = (marked.any(others) if others else marked).numpy()
            for atom, positions in placements(term):
                if atom in into:
                    into[atom][positions[chosen & (positions >= 0)]] = True


def widened(value: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """The value with dimension ``dim`` at its whole size, where one representative stood for all."""
    if value.shape[dim] == size:
        return value
    shape = list(value.shape)
    shape[dim] = size
    return value.expand(shape)


def is_float(value: Any) -> bool:
    """Whether a node's value is one real tensor, which bounds can be given for."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()
