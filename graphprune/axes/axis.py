"""The axes of a graph by name: what can go, what goes with it, and why the rest stays.

An axis is an atom that no rule refined further, seen through the parameters and buffers it runs through.
Its name is the first place it stands in: ``conv1.weight[0]`` is dimension 0 of ``conv1.weight``;
``qkv.weight[0].1`` is the second piece (counting from 0) of a dimension made of several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..errors import AxisError, suggestion
from .terms import Atom, Concat, Term, children, leaves, placements, resolve
from .typing import Typing

KINDS = ("exact", "statistical", "frozen")


@dataclass(frozen=True)
class Member:
    """One place an axis stands in: a tensor's dimension, and how it sits there.

    ``placement`` shows the dimension with the axis in brackets: ``[64]`` is all of it, ``3×[12]×64`` a
    factor, ``64+[64]`` a part.
    """

    tensor: str
    dim: int
    placement: str


@dataclass(frozen=True)
class Axis:
    """Positions that can be removed together from every member, or the reason why not.

    Attributes:
        name: see the module docstring.
        size: number of positions.
        kind: ``exact`` (removing a position equals zeroing it everywhere), ``statistical`` (a
            normalisation or mean runs over it, so removal changes the result) or ``frozen``.
        members: every place the axis stands in.
        reason: why it is statistical or frozen, else empty.
        node: the operator that made it so, else empty.
    """

    name: str
    size: int
    kind: str
    members: tuple[Member, ...]
    reason: str = ""
    node: str = ""
    atom: Atom = field(repr=False, compare=False, default=None)  # type: ignore[assignment]

    @property
    def prunable(self) -> bool:
        """Whether positions of it may go at all."""
        return self.kind != "frozen"

    def __str__(self) -> str:
        return f"{self.name}: {self.size} positions, {self.kind}{f' ({self.reason})' if self.reason else ''}"


class Axes(Mapping[str, Axis]):
    """Every axis that a parameter or buffer has, by name, in parameter order.

    >>> import torch, graphprune
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> axes = graphprune.trace(model, torch.zeros(1, 3)).axes
    >>> [str(axis) for axis in axes.prunable]
    ['0.weight[0]: 8 positions, exact']
    >>> print(axes.explain("0.weight"))
    0.weight [8, 3]
      dim 0: axis 0.weight[0], 8 positions, exact; coupled with 0.bias[0] [8], 2.weight[1] [8]
      dim 1: frozen at input_1: the caller passes it
    """

    def __init__(self, typing: Typing):
        self._typing = typing
        found: dict[Atom, list[Member]] = {}
        names: dict[Atom, str] = {}
        # A weight, its bias and its statistics share a dimension; its text is written once.
        texts: dict[Term, list[tuple[Atom, str]]] = {}
        for tensor, dims in typing.tensors.items():
            for dim, term in enumerate(map(resolve, dims)):
                atoms = texts.get(term)
                if atoms is None:
                    inside = dict.fromkeys(leaves(term))
                    atoms = texts[term] = [(atom, placement_text(term, atom)) for atom in inside]
                for place, (atom, text) in enumerate(atoms):
                    whole = len(atoms) == 1
                    names.setdefault(atom, f"{tensor}[{dim}]" + ("" if whole else f".{place}"))
                    found.setdefault(atom, []).append(Member(tensor, dim, text))
        self._axes = {names[a]: _axis(names[a], a, tuple(members)) for a, members in found.items()}
        self.by_atom = {axis.atom: axis for axis in self._axes.values()}

    def __getitem__(self, name: str | Axis) -> Axis:
        """The axis of that name.

        Raises:
            AxisError: there is none; the nearest name is suggested.
        """
        if isinstance(name, Axis):
            name = name.name
        if name not in self._axes:
            raise AxisError(f"no axis is called {name!r}{suggestion(name, self._axes)}; see graph.axes")
        return self._axes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._axes

    def __iter__(self) -> Iterator[str]:
        return iter(self._axes)

    def __len__(self) -> int:
        return len(self._axes)

    @property
    def prunable(self) -> list[Axis]:
        """The axes that can lose positions, exact and statistical."""
        return [a for a in self._axes.values() if a.kind != "frozen"]

    @property
    def exact(self) -> list[Axis]:
        """The axes whose removal equals zeroing."""
        return [a for a in self._axes.values() if a.kind == "exact"]

    @property
    def statistical(self) -> list[Axis]:
        """The axes that a statistic runs over."""
        return [a for a in self._axes.values() if a.kind == "statistical"]

    @property
    def frozen(self) -> list[Axis]:
        """The axes that keep every position, each with its reason."""
        return [a for a in self._axes.values() if a.kind == "frozen"]

    @property
    def unruled(self) -> dict[str, int]:
        """Operators without a rule, by name, with how often they occur: what they touch is frozen."""
        return {name: len(nodes) for name, nodes in self._typing.unruled.items()}

    @cached_property
    def coverage(self) -> float:
        """Share of parameter elements that belong to at least one prunable axis, 0 to 1."""
        parameters = self._typing.graph.parameters
        total = sum(p.numel() for p in parameters.values())
        covered = sum(
            p.numel()
            for name, p in parameters.items()
            if any(
                leaf.frozen is None for term in self._typing.tensors.get(name, ()) for leaf in leaves(term)
            )
        )
        return covered / total if total else 1.0

    def of(self, tensor: str, dim: int) -> list[tuple[Axis, np.ndarray]]:
        """The axes in one dimension of a parameter, each with an integer index ``[size of dim]``.

        The index says which of the axis's positions a place belongs to, -1 for none.
        """
        return [(self.by_atom[atom], index) for atom, index in placements(self._typing.tensors[tensor][dim])]

    def explain(self, name: str) -> str:
        """In words, what an axis, a parameter or a module is coupled with, or why it is frozen.

        Raises:
            AxisError: nothing has that name.
        """
        if name in self._axes:
            axis = self._axes[name]
            coupled = "\n".join(f"  {m.tensor} dim {m.dim}: {m.placement}" for m in axis.members)
            where = f"; decided at {axis.node}" if axis.node else ""
            return f"axis {axis}{where}\n{coupled}"
        tied = self._typing.graph.tied
        name = tied.get(name, name)
        tensors = self._typing.tensors
        if name in tensors:
            return self._explain_tensor(name)
        inside = [t for t in tensors if t.startswith(f"{name}.")]
        inside += [t for alias, t in tied.items() if alias.startswith(f"{name}.") and t not in inside]
        if not inside:
            known = {*tensors, *self._axes, *(t.rpartition(".")[0] for t in tensors)}
            raise AxisError(f"nothing in the graph is called {name!r}{suggestion(name, known)}")
        return "\n".join(map(self._explain_tensor, inside))

    def _explain_tensor(self, name: str) -> str:
        dims = self._typing.tensors[name]
        lines = [f"{name} [{', '.join(str(term.size) for term in dims)}]"]
        for dim, term in enumerate(dims):
            atoms = list(dict.fromkeys(leaves(term)))
            if not atoms:
                lines.append(f"  dim {dim}: a single position")
            for atom in atoms:
                lines.append(f"  dim {dim}: {self._explain_atom(atom, name, dim)}")
        return "\n".join(lines)

    def _explain_atom(self, atom: Atom, tensor: str, dim: int) -> str:
        axis = self.by_atom[atom]
        if axis.kind == "frozen":
            return f"frozen at {axis.node}: {axis.reason}" if axis.node else f"frozen: {axis.reason}"
        others = [
            f"{m.tensor}[{m.dim}] {m.placement}" for m in axis.members if (m.tensor, m.dim) != (tensor, dim)
        ]
        own = next(m.placement for m in axis.members if (m.tensor, m.dim) == (tensor, dim))
        place = "" if own == f"[{axis.size}]" else f", sits as {own}"
        why = f" ({axis.reason} at {axis.node})" if axis.reason else ""
        coupled = f"; coupled with {', '.join(others)}" if others else "; coupled with nothing else"
        return f"axis {axis.name}, {axis.size} positions, {axis.kind}{why}{place}{coupled}"


def placement_text(term: Term, atom: Atom) -> str:
    """A dimension's type in one line with ``atom`` in brackets: ``3×[12]×64``, ``64+[64]``."""
    term = resolve(term)
    if term.__class__ is Atom:
        return f"[{term.size}]" if term is atom else str(term.size)
    texts = []
    for child in children(term):
        text = placement_text(child, atom)
        if child.__class__ is not Atom and not isinstance(child, type(term)):
            text = f"({text})" if isinstance(child, Concat) else text
        texts.append(text)
    return ("+" if isinstance(term, Concat) else "×").join(texts)


def _axis(name: str, atom: Atom, members: tuple[Member, ...]) -> Axis:
    reason = atom.frozen or atom.statistical
    kind = "frozen" if atom.frozen is not None else "statistical" if atom.statistical is not None else "exact"
    node = getattr(reason.node, "name", "") if reason is not None and reason.node is not None else ""
    return Axis(name, atom.size, kind, members, reason.why if reason is not None else "", node, atom)
