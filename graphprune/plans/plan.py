"""Which positions of which axes go: a value that can be printed, compared, saved and composed.

A plan belongs to a network: it carries a digest of the axes' names and sizes, and is refused for
any other.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..axes.axis import Axis
from ..axes.terms import Atom, Term, kept_size, leaves, resolve
from ..cost import node_macs
from ..errors import AxisError, InputError
from ..importance import Importance, scores

if TYPE_CHECKING:
    from ..graph import Graph

FORMAT = 1


@dataclass(frozen=True)
class Row:
    """What a plan does to one axis; savings are what this axis alone would save."""

    axis: str
    before: int
    after: int
    macs: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """Positions to remove, by axis name.

    Attributes:
        removed: axis name → positions that go, ascending; axes that keep everything are left out.
        network: digest of the network's axes (see :func:`network_digest`).
        rows: one for each axis in ``removed``: sizes and savings.
        before, after: totals ``{"macs", "parameters", "bytes"}`` of the whole network.
    """

    removed: Mapping[str, tuple[int, ...]]
    network: str
    rows: tuple[Row, ...] = field(compare=False, default=())
    before: Mapping[str, int] = field(compare=False, default_factory=dict)
    after: Mapping[str, int] = field(compare=False, default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.removed)

    def __str__(self) -> str:
        head = ("axis", "before", "after", "MACs saved", "parameters saved", "bytes saved")
        table = [head] + [
            (r.axis, str(r.before), str(r.after), f"{r.macs:,}", f"{r.parameters:,}", f"{r.bytes:,}")
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = [
            "  ".join(
                c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        totals = ", ".join(f"{k} {self.before[k]:,} → {self.after[k]:,}" for k in self.before)
        return "\n".join([*lines, f"whole network: {totals}" if totals else "nothing is removed"])

    def to_json(self) -> str:
        """The plan as JSON; :meth:`from_json` reads it back equal."""
        return json.dumps(
            {
                "format": FORMAT,
                "network": self.network,
                "removed": {k: list(v) for k, v in self.removed.items()},
                "rows": [vars(r) for r in self.rows],
                "before": dict(self.before),
                "after": dict(self.after),
            },
            indent=1,
        )

    @staticmethod
    def from_json(text: str) -> Plan:
        """A plan from :meth:`to_json`'s text.

        Raises:
            InputError: the text is no plan, or one of a newer format.
        """
        try:
            data = json.loads(text)
            if data["format"] > FORMAT:
                raise InputError(f"the plan has format {data['format']}, this version reads up to {FORMAT}")
            removed = {str(k): tuple(int(i) for i in v) for k, v in data["removed"].items()}
            rows = tuple(Row(**r) for r in data.get("rows", ()))
            return Plan(removed, str(data["network"]), rows, data.get("before", {}), data.get("after", {}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"this is not a plan: {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan's JSON to a file."""
        Path(path).write_text(self.to_json())

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan's JSON from a file. Raises InputError as :meth:`from_json` does."""
        return Plan.from_json(Path(path).read_text())


def network_digest(graph: Graph) -> str:
    """SHA-256 over the names, sizes and kinds of a graph's axes: the identity a plan is bound to."""
    text = "\n".join(f"{a.name} {a.size} {a.kind}" for a in graph.axes.values())
    return hashlib.sha256(text.encode()).hexdigest()


def make_plan(graph: Graph, removed: Mapping[str | Axis, Iterable[int]]) -> Plan:
    """The plan that removes the given positions.

    Raises:
        AxisError: an axis is unknown or frozen (with its reason), a position is out of range or no
            whole number, or nothing would be left of an axis.
    """
    axes = graph.axes
    chosen: dict[str, tuple[int, ...]] = {}
    for key, positions in removed.items():
        axis = axes[key]  # type: ignore[index]
        gone = _checked(axis, positions)
        if not gone:
            continue
        chosen[axis.name] = gone
    return _with_costs(graph, {k: chosen[k] for k in axes if k in chosen})


def _checked(axis: Axis, positions: Iterable[int]) -> tuple[int, ...]:
    """The positions, ascending and each once, if they can go from the axis."""
    found = set()
    for position in positions:
        # A mask would be read as positions 0 and 1.
        if str(getattr(position, "dtype", type(position).__name__)) in ("bool", "torch.bool"):
            raise AxisError(f"axis {axis.name!r}: give the positions to remove, not a boolean mask")
        try:
            found.add(operator.index(position))
        except TypeError:
            raise AxisError(f"axis {axis.name!r}: {position!r} is not a position") from None
    gone = tuple(sorted(found))
    if gone and axis.kind == "frozen":
        at = f" (decided at {axis.node})" if axis.node else ""
        raise AxisError(f"axis {axis.name!r} is frozen: {axis.reason}{at}")
    if gone and (gone[0] < 0 or gone[-1] >= axis.size):
        bad = gone[0] if gone[0] < 0 else gone[-1]
        raise AxisError(f"axis {axis.name!r} has positions 0 to {axis.size - 1}, not {bad}")
    if gone and len(gone) == axis.size:
        raise AxisError(f"axis {axis.name!r} would lose all {axis.size} positions; keep at least one")
    return gone


def plan_ratio(
    graph: Graph,
    ratio: float,
    importance: Importance = "l2",
    *,
    statistical: bool = False,
    align: int = 1,
    seed: int = 0,
) -> Plan:
    """The plan that removes the least important share of every exact axis.

    Args:
        ratio: share of each axis's positions to remove, in [0, 1); at least one position stays.
        importance: see :func:`graphprune.importance.scores`.
        statistical: prune axes that a statistic runs over, too.
        align: keep a multiple of this many positions where the axis has that many.
        seed: for random importance.

    Raises:
        InputError: ``ratio`` or ``align`` is out of range, or the importance is unknown.
    """
    if not 0 <= ratio < 1:
        raise InputError(f"ratio must be at least 0 and below 1, got {ratio}")
    if align < 1:
        raise InputError(f"align must be at least 1, got {align}")
    keeps: dict[str, int] = {}
    for axis in graph.axes.prunable:
        if axis.kind == "statistical" and not statistical:
            continue
        keep = max(1, axis.size - int(axis.size * ratio + 1e-9))
        if align > 1:
            keep = min(axis.size, -(-keep // align) * align)
        if keep < axis.size:
            keeps[axis.name] = keep
    ranked = scores(graph, [graph.axes[name] for name in keeps], importance, seed)
    removed: dict[str | Axis, list[int]] = {
        name: ranked[name].argsort(stable=True)[: len(ranked[name]) - keep].tolist()
        for name, keep in keeps.items()
    }
    return make_plan(graph, removed)


def keep_masks(graph: Graph, plan: Plan) -> dict[Atom, np.ndarray]:
    """Atom → boolean mask of the positions that stay.

    Raises:
        AxisError: the plan belongs to another network, or names positions that cannot go.
    """
    if plan.network != network_digest(graph):
        raise AxisError("the plan was made for another network: its axes have other names or sizes")
    masks = {}
    for name, positions in plan.removed.items():
        axis = graph.axes[name]
        masks[axis.atom] = np.ones(axis.size, bool)
        masks[axis.atom][list(_checked(axis, positions))] = False
    return masks


def _with_costs(graph: Graph, removed: dict[str, tuple[int, ...]]) -> Plan:
    sizes = {graph.axes[k].atom: graph.axes[k].size - len(v) for k, v in removed.items()}
    model = CostModel(graph)
    before = model.totals({})
    rows = []
    for name, positions in removed.items():
        axis = graph.axes[name]
        saved = model.savings(axis.atom, axis.size - len(positions))
        rows.append(Row(name, axis.size, axis.size - len(positions), *saved))
    return Plan(removed, network_digest(graph), tuple(rows), before, model.totals(sizes))


class CostModel:
    """MACs, parameters and bytes of a graph as functions of its axes' sizes."""

    def __init__(self, graph: Graph):
        typing = graph.typing
        self._dims = typing.dims
        self._nodes = [n for n in graph.fx.nodes if node_macs(n)]
        parameters = graph.parameters
        self._tensors = [
            (typing.tensors[name], name in parameters, t.element_size())
            for name, t in graph.tensors.items()
            if name in typing.tensors
        ]
        self._by_atom: dict[Atom, tuple[list[Any], list[Any]]] = {}
        atoms = _AtomsOf()
        for node in self._nodes:
            involved = [node, *node.all_input_nodes]
            for atom in atoms.of(term for n in involved for term in _tensor_dims(self._dims[n])):
                self._by_atom.setdefault(atom, ([], []))[0].append(node)
        for entry in self._tensors:
            for atom in atoms.of(entry[0]):
                self._by_atom.setdefault(atom, ([], []))[1].append(entry)

    def totals(self, sizes: Mapping[Atom, int]) -> dict[str, int]:
        """``{"macs", "parameters", "bytes"}`` when each atom has ``sizes[atom]`` positions."""
        macs, parameters, size = self._evaluate(self._nodes, self._tensors, sizes)
        return {"macs": macs, "parameters": parameters, "bytes": size}

    def savings(self, atom: Atom, size: int) -> tuple[int, int, int]:
        """MACs, parameters and bytes saved when one atom alone shrinks to ``size``."""
        nodes, tensors = self._by_atom.get(atom, ([], []))
        now = self._evaluate(nodes, tensors, {})
        then = self._evaluate(nodes, tensors, {atom: size})
        return (now[0] - then[0], now[1] - then[1], now[2] - then[2])

    def marginal(self, atom: Atom, sizes: Mapping[Atom, int]) -> dict[str, int]:
        """MACs, parameters and bytes of one position of an atom, when each has ``sizes[atom]``."""
        nodes, tensors = self._by_atom.get(atom, ([], []))
        size = sizes.get(atom, atom.size)
        more, less = (size, size - 1) if size > 1 else (size + 1, size)
        high = self._evaluate(nodes, tensors, {**sizes, atom: more})
        low = self._evaluate(nodes, tensors, {**sizes, atom: less})
        return dict(
            zip(("macs", "parameters", "bytes"), (h - w for h, w in zip(high, low, strict=True)), strict=True)
        )

    def _evaluate(self, nodes: Any, tensors: Any, sizes: Mapping[Atom, int]) -> tuple[int, int, int]:
        # One dimension stands in many places (a weight, its bias, what goes in and out): count it once.
        known: dict[Term, int] = {}

        def size(term: Term) -> int:
            if not sizes:
                return term.size
            term = resolve(term)
            count = known.get(term)
            if count is None:
                count = known[term] = kept_size(term, sizes)
            return count

        def shape(argument: Any) -> tuple[int, ...]:
            return tuple([size(term) for term in _tensor_dims(self._dims[argument])])

        macs = sum(node_macs(n, shape) for n in nodes)
        parameters = total = 0
        for dims, trained, width in tensors:
            count = 1
            for term in dims:
                count *= size(term)
            parameters += count if trained else 0
            total += count * width
        return macs, parameters, total


class _AtomsOf:
    """The atoms of terms, each term taken apart once."""

    def __init__(self) -> None:
        self._known: dict[Term, tuple[Atom, ...]] = {}

    def of(self, terms: Iterable[Term]) -> dict[Atom, None]:
        """Every atom of the terms once, in order."""
        found: dict[Atom, None] = {}
        for term in {resolve(t): None for t in terms}:
            known = self._known.get(term)
            if known is None:
                known = self._known[term] = tuple(dict.fromkeys(leaves(term)))
            found.update(dict.fromkeys(known))
        return found


def _tensor_dims(typed: Any) -> tuple[Any, ...]:
    if typed is None:
        return ()
    return typed if typed.__class__ is tuple else _tensor_dims(typed[0])
