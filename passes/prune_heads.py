"""Remove the least important attention heads, over all layers together.

Heads are axes (:mod:`graphprune.axes`), so a head really leaves the network: its rows of the query, key and
value projections, its columns of the output projection, every size that counts it. Where query heads share
keys and values, a group goes with all its queries (:mod:`.attention`).

Which heads matter is estimated once (Michel, Levy and Neubig, *Are Sixteen Heads Really Better than
One?*, NeurIPS 2019; see :mod:`.michel`), by the magnitude of their weights, or by a callable. Heads go in
that order until the number asked for is gone or a budget is met; every layer keeps ``minimum`` of them (no
axis can be empty: a whole attention goes with ``prune-layers``). With ``dimensions`` the widths of keys and
values inside the heads stand in the same queue, ordered by importance for each multiply-accumulate saved.

The rewrite is exact in the sense of certificate 1: the pruned network is the original with the heads
masked. The outputs change, and by how much is recorded.

>>> import torch, graphprune
>>> from graphprune.pipeline import Context
>>> layer = torch.nn.TransformerEncoderLayer(12, 4, 16, batch_first=True, norm_first=True).eval()
>>> _ = layer.self_attn.out_proj.weight.data[:, 3:6].zero_()  # what head 1 writes
>>> graph = graphprune.trace(layer, torch.zeros(2, 5, 12))
>>> result = PruneHeads(heads=1).run(graph, Context(calibration=[torch.randn(2, 5, 12)]))
>>> result.notes[0].message, tuple(result.graph.tensors["self_attn.in_proj_weight"].shape)
('4 → 3 heads (position 1 removed)', (27, 12))
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphprune.axes.axis import Axis
from graphprune.axes.terms import Atom
from graphprune.calibration import read
from graphprune.errors import InputError, PassError, suggestion
from graphprune.graph import Graph
from graphprune.importance import scores
from graphprune.pipeline import Context, Note, Pass, PassResult
from graphprune.plans.budget import within
from graphprune.plans.candidates import RESOURCES
from graphprune.plans.plan import CostModel, Plan, make_plan

from .attention import Attention, attentions
from .michel import batch_first, sensitivities

IMPORTANCES = ("michel", "magnitude", "random")


@dataclass(frozen=True)
class PruneHeads(Pass):
    """Prune heads to a number or a budget.

    Attributes:
        heads: how many heads of queries go, over all layers: a share of them (a float below 1) or a number.
        macs, params, bytes: budgets for the whole network, each a fraction of what it has (a float up to
            1.0) or an absolute number.
        dimensions: prune the widths of keys and values inside the heads, too, and the queries inside groups;
            needs a budget.
        minimum: heads that every layer keeps.
        importance: ``michel`` (needs calibration, or ``loss``), ``magnitude``, ``random``, or a callable
            ``(graph, axis) -> scores`` from Python.
        loss: from Python, ``loss(module)`` gives a scalar loss or an iterable of them, best one an input;
            for ``michel`` in place of calibration without labels.
        samples: how many samples of the calibration are read.
    """

    name: ClassVar[str] = "prune-heads"
    exact: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    heads: float | None = None
    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    dimensions: bool = False
    minimum: int = 1
    importance: Any = "michel"
    loss: Any = None
    samples: int = 128

    def run(self, graph: Graph, context: Context) -> PassResult:
        """A smaller graph, with the plan that led to it."""
        self._check()
        found = attentions(graph)
        layers = [layer for layer in found if layer.heads]
        refused = [_frozen(layer) for layer in found if not layer.heads and layer.frozen]
        if not layers:
            why = "; ".join(f"{note.where}: {note.message}" for note in refused)
            raise PassError(
                self.name, f"the network has no attention heads that can go{f' ({why})' * bool(why)}"
            )
        ranked, notes = self._ranked(graph, layers, context)
        plan = self._plan(graph, layers, ranked)
        if not plan:
            met = Note("info", "", "the network meets what was asked as it is")
            return PassResult(graph, False, (met, *refused))
        small = graph.apply(plan)
        changed = [note for layer in layers for note in _changed(layer, plan)]
        return PassResult(small, True, (*changed, *refused, *notes), plan=plan, pruned=small)

    def _check(self) -> None:
        budgets = {name: getattr(self, name) for name in RESOURCES if getattr(self, name) is not None}
        if self.heads is None and not budgets:
            raise PassError(
                self.name, "needs what to remove: heads (a number or a share), macs, params or bytes"
            )
        if self.heads is not None:
            share = isinstance(self.heads, float) and 0 < self.heads < 1
            number = isinstance(self.heads, int) and not isinstance(self.heads, bool) and self.heads >= 1
            if not share and not number:
                raise InputError(
                    f"heads is a number of heads to remove, at least 1, or a share between 0 and 1, "
                    f"not {self.heads!r}"
                )
        if self.dimensions and self.heads is not None:
            raise InputError(
                "dimensions cannot be counted in heads; give a budget (macs, params or bytes) instead"
            )
        if self.minimum < 1:
            raise InputError(
                f"minimum is a number of heads that every layer keeps, at least 1, not {self.minimum}"
            )
        if not callable(self.importance) and self.importance not in IMPORTANCES:
            raise InputError(
                f"unknown importance {self.importance!r}{suggestion(str(self.importance), IMPORTANCES)}; "
                f"known: {', '.join(IMPORTANCES)}, or a callable (graph, axis) -> scores"
            )
        if self.loss is not None and (self.importance != "michel" or not callable(self.loss)):
            raise InputError("loss is a function of the module, and only importance='michel' reads it")

    # ---- how much each position matters ------------------------------------------------------------

    def _ranked(
        self, graph: Graph, layers: Sequence[Attention], context: Context
    ) -> tuple[dict[str, torch.Tensor], tuple[Note, ...]]:
        """Axis name → scores, and what is to be said of the calibration."""
        if self.importance != "michel":
            importance = "l2" if self.importance == "magnitude" else self.importance
            wanted = {a.name: a for layer in layers for a in self._axes(layer)}
            return scores(graph, list(wanted.values()), importance, context.seed), ()
        if graph.is_meta:
            raise PassError(
                self.name, "importance 'michel' runs the network, and its weights have shapes only"
            )
        options: dict[str, Any] = {"widths": self.dimensions, "seed": context.seed}
        if self.loss is not None:
            return sensitivities(graph, layers, (), loss=self.loss, **options), ()
        if context.calibration is None:
            raise PassError(
                self.name,
                "importance 'michel' needs calibration inputs or a loss: pass calibration=, loss= (from "
                "Python), or take importance=magnitude",
            )
        data = read(graph, context.calibration, self.samples)
        notes = list(data.notes)
        if any(call[0].dim() and call[0].shape[0] > 1 for call in data.calls if call):
            mixed = [layer for layer in layers if not all(batch_first(graph, n) for n in layer.contexts)]
            notes += [
                Note("info", m.where, "scored for whole batches: samples are not its first dimension")
                for m in mixed
            ]
        return sensitivities(graph, layers, data.calls, **options), tuple(notes)

    def _axes(self, layer: Attention) -> tuple[Axis, ...]:
        inside = (*layer.shared, *layer.key_width, *layer.value_width)
        return (*layer.heads, *inside) if self.dimensions else layer.heads

    # ---- which go --------------------------------------------------------------------------------------

    def _plan(self, graph: Graph, layers: Sequence[Attention], ranked: Mapping[str, torch.Tensor]) -> Plan:
        model = CostModel(graph)
        now = model.totals({})
        total = sum(layer.count for layer in layers)
        wanted = {
            key: within(name, getattr(self, name), now[key])
            for name, key in RESOURCES.items()
            if getattr(self, name) is not None
        }
        if self.heads is not None:
            # The tolerance keeps 0.3 of 10 from being 2.
            gone = self.heads if isinstance(self.heads, int) else int(self.heads * total + 1e-9)
            wanted["heads"] = total - gone
        queue = self._queue(model, layers, ranked)
        atoms = {axis.name: axis for layer in layers for axis in self._axes(layer)}

        def left(count: int) -> dict[str, int]:
            sizes: dict[Atom, int] = {}
            for name, _ in queue[:count]:
                atom = atoms[name].atom
                sizes[atom] = sizes.get(atom, atom.size) - 1
            counted = {"heads": sum(layer.kept(sizes) for layer in layers)}
            return {**counted, **(model.totals(sizes) if wanted.keys() - {"heads"} else {})}

        def met(count: int) -> bool:
            found = left(count)
            return all(found[key] <= limit for key, limit in wanted.items())

        if not met(len(queue)):
            closest = left(len(queue))
            reach = ", ".join(
                f"{key} {closest[key]:,} for {limit:,.0f} asked" for key, limit in wanted.items()
            )
            raise InputError(
                f"what was asked cannot be reached: {len(layers)} layers with {total} heads keep "
                f"at least {self.minimum} each; the closest is {reach}. "
                "Lower minimum, allow dimensions, or ask for less"
            )
        least = bisect_left(range(len(queue)), True, key=met)
        removed: dict[str | Axis, list[int]] = {}
        for name, position in queue[:least]:
            removed.setdefault(name, []).append(position)
        return make_plan(graph, removed)

    def _queue(
        self, model: CostModel, layers: Sequence[Attention], ranked: Mapping[str, torch.Tensor]
    ) -> list[tuple[str, int]]:
        """``(axis name, position)``, the least important first; what has to stay is not in it."""
        entries: list[tuple[float, int, int, Axis]] = []
        owners: dict[Atom, list[Attention]] = {}
        for layer in layers:
            for axis in self._axes(layer):
                if axis.atom not in owners:
                    each = axis.size / layer.count
                    if self.dimensions:
                        each = 1 / max(1, model.savings(axis.atom, axis.size - 1)[0])
                    order = ranked[axis.name].argsort(stable=True).tolist()
                    entries += [
                        (float(ranked[axis.name][p]) * each, len(owners), rank, axis)
                        for rank, p in enumerate(order)
                    ]
                owners.setdefault(axis.atom, []).append(layer)
        sizes: dict[Atom, int] = {}
        queue = []
        for _, _, rank, axis in sorted(entries, key=lambda entry: entry[:3]):
            atom = axis.atom
            smaller = {**sizes, atom: sizes.get(atom, atom.size) - 1}
            if smaller[atom] and all(layer.kept(smaller) >= self.minimum for layer in owners[atom]):
                sizes = smaller
                queue.append((axis.name, int(ranked[axis.name].argsort(stable=True)[rank])))
        return queue


# ---- what is said of it ------------------------------------------------------------------------------


def _changed(layer: Attention, plan: Plan) -> list[Note]:
    sizes = {a.atom: a.size - len(plan.removed.get(a.name, ())) for a in (*layer.heads, *layer.shared)}
    notes = []
    if any(a.name in plan.removed for a in layer.heads):
        groups = layer.count != layer.heads[0].size
        gone = [p for a in layer.heads for p in plan.removed.get(a.name, ())]
        word = "group" if groups else "position"
        named = f"{word}{'s' * (len(gone) > 1)} {', '.join(map(str, gone))} removed"
        notes.append(Note("changed", layer.where, f"{layer.count} → {layer.kept(sizes)} heads ({named})"))
    kinds = {"queries inside groups": layer.shared, "width of keys": layer.key_width}
    for what, axes in {**kinds, "width of values": layer.value_width}.items():
        for axis in axes:
            if axis.name in plan.removed:
                left = axis.size - len(plan.removed[axis.name])
                notes.append(Note("changed", axis.name, f"{what} {axis.size} → {left}"))
    return notes


def _frozen(layer: Attention) -> Note:
    return Note("refused", layer.where, "; ".join(str(axis) for axis in layer.frozen))
