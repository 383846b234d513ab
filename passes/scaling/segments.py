"""Axes cut into segments: which values must be scaled together, what writes and reads them, why not.

Values that an operator ties together (a sum's operands and its result, what a ReLU reads and gives) are
joined; a convolution or matrix product joins nothing, it reads one segment and writes another. An operator
that is not homogeneous *blocks* what it touches, with the reason. :mod:`.rules` says which is which.

>>> import graphprune
>>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.GELU(),
...                           torch.nn.Linear(8, 2))
>>> for segment in segments(graphprune.trace(net, torch.zeros(1, 3))):
...     print(segment, "|", segment.refused or "yes")
? → linear | the caller passes it
linear → linear_1 | yes
linear_1 → ? | gelu is not positively homogeneous
? → linear_2 | gelu is not positively homogeneous
linear_2 → ? | the caller sees it
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphprune.axes.terms import Atom, leaves, placements
from graphprune.axes.typing import Typed, Typing
from graphprune.graph import Graph
from graphprune.importance.readers import Linear, linears, owners
from graphprune.notes import Note
from graphprune.operands import argument, has_argument, uses

from .members import Member, along, of_linear

Value = fx.Node | str
"""What carries numbers: an operator's result, or a parameter by its name."""
Key = tuple[Atom, Value]


@dataclass(frozen=True, eq=False)
class Segment:
    """One stretch of an axis whose positions may be scaled.

    Attributes:
        atom: the axis.
        members: every tensor that takes the factors in.
        refused: why they cannot be scaled; empty where they can.
    """

    atom: Atom
    members: tuple[Member, ...]
    refused: str = ""

    @property
    def size(self) -> int:
        """How many positions it has."""
        return self.atom.size

    def role(self, *roles: str) -> list[Member]:
        """The members of some roles, in execution order."""
        return [member for member in self.members if member.role in roles]

    def __str__(self) -> str:
        before = dict.fromkeys(m.node.name for m in self.role("writer", "gain") if m.node)
        after = dict.fromkeys(m.node.name for m in self.role("reader") if m.node)
        return f"{', '.join(before) or '?'} → {', '.join(after) or '?'}"


def segments(graph: Graph) -> list[Segment]:
    """Every segment that a convolution or matrix product writes or reads, in execution order."""
    from .rules import visit

    # Inputs and outputs freeze their axes against pruning. Here the operators at the ends block, no more:
    # a layer norm that gives an output leaves every other norm of that width free.
    walk = Walk(replace(graph, _typing=Typing(graph, closed=False), _axes=None))
    for node in graph.fx.nodes:
        if node.op == "call_function":
            visit(walk, node)
        elif node.op == "placeholder":
            walk.block(walk.keys(node), "the caller passes it")
        elif node.op == "output":
            for source in node.all_input_nodes:
                walk.block(walk.keys(source), "the caller sees it")
    return walk.found()


class Walk:
    """Segments while they grow.

    Attributes:
        graph: the network.
        linears: its convolutions and products with a parameter, by node.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.linears: dict[fx.Node, Linear] = {linear.node: linear for linear in linears(graph)}
        self._parent: dict[Key, Key] = {}
        self._blocked: dict[Key, str] = {}
        self._members: list[tuple[Key, Member]] = []

    # ---- what rules use ------------------------------------------------------------------------

    def keys(self, value: Any, dims: Sequence[int] | None = None) -> list[Key]:
        """The axes of a value that may be scaled, each with the value; of some dimensions only."""
        if not isinstance(value, fx.Node):
            return []
        name: Value = str(value.target) if value.op == "get_attr" else value
        typed = self.graph.typing.dims.get(value)
        if dims is not None and isinstance(typed, tuple):
            typed = tuple(typed[d] for d in dims)
        return [(atom, name) for atom in dict.fromkeys(_atoms(typed))]

    def join(self, left: Key, right: Key) -> None:
        """Both are scaled alike; a parameter cannot be, unless it is a member."""
        for key, other in ((left, right), (right, left)):
            if isinstance(key[1], str):
                self.block([other], f"the parameter {key[1]!r} is part of it")
                return
        a, b = self.root(left), self.root(right)
        if a != b:
            self._parent[b] = a
            if b in self._blocked:
                self._blocked.setdefault(a, self._blocked[b])

    def block(self, keys: Iterable[Key], why: str) -> None:
        """None of these is scaled; the first reason is the one that stays."""
        for key in keys:
            self._blocked.setdefault(self.root(key), why)

    def blocked(self, key: Key) -> bool:
        """Whether it is known by now that it is not scaled."""
        return self.root(key) in self._blocked

    def root(self, key: Key) -> Key:
        """What stands for all that are scaled alike."""
        while (above := self._parent.get(key, key)) != key:
            key = above
        return key

    def writes(self, linear: Linear, atom: Atom) -> None:
        """A convolution or product, and its bias, take the factors of what they give."""
        key = (atom, linear.node)
        self._members.append((key, of_linear(linear, atom, writes=True)))
        bias = argument(linear.node, "bias") if has_argument(linear.node, "bias") else None
        if bias is None and linear.operand:  # addmm(bias, x, weight)
            bias = linear.node.args[0]
        if bias is not None:
            self.takes(key, bias, linear.node, "shift")

    def reads(self, linear: Linear, atom: Atom) -> None:
        """A convolution or product takes the inverse factors of what it reads."""
        self._members.append(((atom, linear.source), of_linear(linear, atom, writes=False)))

    def takes(self, key: Key, operand: Any, node: fx.Node, role: str) -> None:
        """A parameter along the axis takes the factors; anything else blocks."""
        tensor = self.graph.constant(operand)
        if tensor is None or not tensor.is_floating_point():
            self.block([key], f"{node.name} adds something computed" if role == "shift" else
                       f"the weight of {node.name} is computed; fold-parameters may help")  # fmt: skip
            return
        dims = self.graph.typing.dims[operand]
        places = [d for d, term in enumerate(dims) if key[0] in leaves(term)]  # type: ignore[arg-type]
        if len(places) != 1:
            self.block([key], f"{str(operand.target)!r} does not run along the channels")
            return
        owner = owners(placements(dims[places[0]]), key[0])  # type: ignore[index]
        member = along(str(operand.target), node, role, places[0], tensor.dim(), torch.from_numpy(owner))
        self._members.append((key, member))

    # ---- the result ------------------------------------------------------------------------------

    def found(self) -> list[Segment]:
        """What came out; members that two operators share block their segments."""
        for key, member in self._members:
            self._check_alone(key, member)
        groups: dict[Key, list[Member]] = {}
        for key, member in self._members:
            groups.setdefault(self.root(key), []).append(member)
        return [
            *(
                Segment(root[0], tuple(members), self._blocked.get(root, ""))
                for root, members in groups.items()
                if any(member.role in ("writer", "reader") for member in members)
            ),
            *self._frozen(),
        ]

    def _frozen(self) -> Iterator[Segment]:
        """Output channels that no rule could type as an axis."""
        for linear in self.linears.values():
            atoms = [atom for atom, _ in linear.outputs]
            if atoms and all(atom.frozen is not None for atom in atoms):
                member = of_linear(linear, atoms[0], writes=True)
                yield Segment(atoms[0], (member,), f"its channels are frozen: {atoms[0].frozen.why}")  # type: ignore[union-attr]

    def _check_alone(self, key: Key, member: Member) -> None:
        readers = self.graph.readers(member.tensor)
        attributes = self.graph.fx.find_nodes(op="get_attr", target=member.tensor)
        if len(readers) > 1 or sum(map(uses, attributes)) > 1:
            others = ", ".join(r.name for r in readers if r is not member.node) or "itself"
            self.block([key], f"{member.tensor!r} of {member.node} is shared with {others}")
        if self.graph.tensors[member.tensor].is_meta:
            self.block([key], f"{member.tensor!r} has no values")
        if not member.index.numel():
            self.block([key], f"{member.tensor!r} is empty")


def _atoms(typed: Typed) -> Iterator[Atom]:
    if isinstance(typed, tuple):
        for term in typed:
            yield from (atom for atom in leaves(term) if atom.frozen is None)
    elif typed is not None:
        for item in typed:
            yield from _atoms(item)


def refusals(found: Sequence[tuple[Segment, str]]) -> tuple[Note, ...]:
    """Why segments that something writes are left as they are, each reason once."""
    notes = (Note("refused", str(segment), why) for segment, why in found if why)
    return tuple(dict.fromkeys(notes))
