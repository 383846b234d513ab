"""Which elements of a network's values its outputs depend on, and which positions of axes therefore can go.

Flowing backwards from the outputs, an element *counts* when an operator puts it into an element that
counts: a channel with weight 0 does not, nor what is multiplied by a known 0. A position is removed from an
axis when none of its elements counts in any value.

A channel that is constant need not count where it is summed up, for its share ``W c`` can go into the bias;
but only if the channel is then really removed, since nothing keeps it constant any more. So the analysis
starts by supposing that every position can go, and takes back what some element that counts stands
at, until nothing changes: the largest set of positions that can go together. It finds cycles, too: two blocks
that write only to each other's dead channels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from graphprune.axes.terms import Atom

from .constancy import Constancy
from .contractions import Contraction

Marks = dict[Atom, np.ndarray]


@dataclass(frozen=True)
class Share:
    """Constant channels that one contraction reads and that go: what they add belongs into its bias."""

    site: Contraction
    constants: torch.Tensor  # [in], 0 where nothing goes


@dataclass
class Findings:
    """What one supposition led to.

    Attributes:
        keep: axis → boolean, positions that have to stay.
        spared: axes with no position that has to; they keep their first.
        zero, constant: axis → positions that are 0 (another number) where something would read them.
        blocked: reason → axis → positions that are constant where something reads them that cannot take it.
        shares: what biases have to take.
    """

    keep: Marks
    spared: set[Atom] = field(default_factory=set)
    zero: Marks = field(default_factory=dict)
    constant: Marks = field(default_factory=dict)
    blocked: dict[str, Marks] = field(default_factory=dict)
    shares: list[Share] = field(default_factory=list)

    def gone(self, atom: Atom) -> np.ndarray:
        """Boolean: the positions of an axis that can go."""
        return ~self.keep[atom]


class Liveness:
    """The analysis of one graph; :meth:`suppose` asks it."""

    def __init__(self, values: Constancy):
        self.values = values
        self.extents = values.extents
        self.lenient = False
        self._needed: dict[fx.Node, list[torch.Tensor]] = {}
        self._findings = Findings({})

    def suppose(self, removable: Collection[Atom], *, lenient: bool = False) -> Findings:
        """The positions of ``removable`` axes that can go together.

        Args:
            removable: the axes that may lose positions.
            lenient: suppose, too, that a normalisation does not read what it takes statistics over, and
                that every constant can be taken into a bias: what could go if nothing stood in the way.
        """
        self.lenient = lenient
        keep = self._empty(self.extents.atoms)
        for atom in keep.keys() - set(removable):
            keep[atom][:] = True
        spared: set[Atom] = set()
        while True:
            findings = self._flow(keep, removable)
            if not all(np.array_equal(findings.keep[a], keep[a]) for a in removable):
                keep = {a: keep[a] | findings.keep[a] for a in keep}
                continue
            empty = [] if lenient else [a for a in removable if not keep[a].any()]
            if not empty:
                findings.spared = spared
                return findings
            for atom in empty:
                keep[atom][0] = True
                spared.add(atom)

    def _empty(self, atoms: Collection[Atom]) -> Marks:
        return {atom: np.zeros(atom.size, bool) for atom in atoms}

    def _flow(self, keep: Marks, removable: Collection[Atom]) -> Findings:
        """One walk backwards, supposing that just ``keep`` stays."""
        from . import liveness_products  # noqa: F401 - fills the table of rules
        from .liveness_rules import flow

        self._needed = {}
        self._findings = Findings({a: k.copy() for a, k in keep.items()})
        for node in reversed(self.values.graph.nodes):
            if node.op == "output":
                for source in node.all_input_nodes:
                    self.need(source)
                continue
            if node.op == "call_function" and node.is_impure(impure_random=False):
                self.need(node)  # an assertion, or what writes somewhere
            if node not in self._needed:
                continue
            for index in range(len(self.extents.types(node))):
                self.extents.project(node, index, self.needed(node, index), self._findings.keep)
            if node.op == "call_function" and any(bool(n.any()) for n in self._needed[node]):
                flow(self, node, keep)
        for atom in removable:
            for marks in (self._findings.zero, self._findings.constant):
                if atom in marks:
                    marks[atom] &= ~keep[atom]
        return self._findings

    # ---- what rules use ------------------------------------------------------------------------

    def needed(self, node: fx.Node, index: int = 0) -> torch.Tensor:
        """Boolean over an extent: which elements of a result count."""
        return self._all(node)[index]

    def need(self, node: fx.Node, elements: torch.Tensor | None = None, index: int | None = None) -> None:
        """Say that elements of a value count (default: all), broadcast against its extent."""
        for i, held in enumerate(self._all(node)):
            if index is None or index == i:
                held |= fitted(elements, held.shape) if elements is not None else True

    def _all(self, node: fx.Node) -> list[torch.Tensor]:
        if node not in self._needed:
            # What is no tensor (a number read out of one) counts or does not, as a whole.
            results = [self.extents.of(node, i) for i in range(len(self.extents.types(node)))] or [()]
            self._needed[node] = [torch.zeros(extent, dtype=torch.bool) for extent in results]
        return self._needed[node]

    def remember(self, marks: Marks, node: fx.Node, elements: torch.Tensor) -> None:
        """Set the positions of a value's elements in ``marks``."""
        for atom, positions in self._positions(node, elements).items():
            marks[atom] = marks.get(atom, np.zeros(atom.size, bool)) | positions

    def block(self, reason: str, node: fx.Node, elements: torch.Tensor) -> None:
        """Note constant elements that cannot go, and why."""
        self.remember(self._findings.blocked.setdefault(reason, {}), node, elements)

    def discharge(
        self, site: Contraction, constants: torch.Tensor, zero: torch.Tensor, other: torch.Tensor
    ) -> None:
        """Note constant elements that go: ``zero`` ones for free, ``other`` ones by their share of a bias."""
        self.remember(self._findings.zero, site.source, zero)
        self.remember(self._findings.constant, site.source, other)
        if bool(constants.any()):
            self._findings.shares.append(Share(site, constants))

    def note_zero(self, node: fx.Node, elements: torch.Tensor) -> None:
        """Note elements that are 0 and go."""
        self.remember(self._findings.zero, node, elements)

    def _positions(self, node: fx.Node, elements: torch.Tensor) -> Mapping[Atom, np.ndarray]:
        found = self._empty(self.extents.atoms) if bool(elements.any()) else {}
        self.extents.project(node, 0, fitted(elements, self.extents.of(node)), found)
        return {a: p for a, p in found.items() if p.any()}


def fitted(elements: torch.Tensor, extent: tuple[int, ...]) -> torch.Tensor:
    """A mask on an extent: spread over what it leaves out, any of what the extent takes together."""
    elements = elements.reshape((*[1] * (len(extent) - elements.dim()), *elements.shape))
    extra = elements.dim() - len(extent)
    if extra > 0:
        elements = elements.any(tuple(range(extra)))
    wide = [d for d, size in enumerate(extent) if size == 1 and elements.shape[d] > 1]
    return (elements.any(tuple(wide), keepdim=True) if wide else elements).expand(extent)
