"""Repair without training: refit what reads a shrunken value, on a few inputs without labels.

After positions were removed, a convolution or linear computes from what is left of its input. Layer by
layer, in execution order, its weights are replaced by those that bring it nearest, in least squares, to
what the *original* gave at that point, from what the *pruned and so far repaired* network feeds it: the
reconstruction of Luo, Wu and Lin (ThiNet, 2017) and He, Zhang and Sun (2017), with a ridge towards the
weights at hand. Errors made earlier are in the input, so later layers make up for them, too. Running
statistics of batch norms follow what they read (:mod:`.statistics`).

Both networks run side by side, operator by operator over all batches (:mod:`.runner`): one forward
pass each in all.

>>> import torch, graphprune
>>> _ = torch.manual_seed(0)
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> graph = graphprune.trace(model, torch.zeros(64, 4))
>>> plan = graph.plan(ratio=0.5)
>>> data = [torch.randn(64, 4) for _ in range(4)]
>>> repaired = repair(graph, graph.apply(plan), plan, data)
>>> [record.nodes for record in repaired.records]
[('linear_1',)]
>>> record = repaired.records[0]
>>> record.after < record.before / 2
True
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from graphprune.calibration import read
from graphprune.errors import InputError
from graphprune.graph import Graph
from graphprune.pipeline import Context, Note, Pass, PassResult
from graphprune.plans.plan import Plan, keep_masks
from graphprune.plans.removal import Removal

from .lockstep import Lockstep
from .match import Cut, Units
from .statistics import MODES
from .units import Options, Record


@dataclass(frozen=True)
class Repair(Pass):
    """Repair what the passes before removed, on the calibration inputs of the context, or without any.

    Attributes are those of :func:`repair`; the seed is the context's.
    """

    name: ClassVar[str] = "repair"
    exact: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    ridge: float | None = None
    sweeps: int = 1
    positions: int | None = 64
    limit: int = 512
    add_bias: bool = False
    statistics: str = "corrected"
    residual: bool = True

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Fit the graph to the network it was before anything was removed."""
        removal = graph.removal
        if removal is None:
            nothing = "nothing was removed from this network, so there is nothing to repair"
            return PassResult(graph, False, (Note("info", "", nothing),))
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        result = repair(
            removal.original, graph, removal.plan, context.calibration, seed=context.seed, **options
        )
        notes = result.notes
        if removal.restarted:
            notes = (Note("info", "", f"repaired to a later network: {removal.restarted}"), *notes)
        return PassResult(result.graph, result.changed, notes)


@dataclass(frozen=True)
class RepairResult:
    """The repaired graph (the pruned one itself where nothing was to repair), and what was done.

    Attributes:
        records: one for each thing refitted, in execution order.
        notes: for the report; what could not be repaired is of kind ``refused``, with the reason.
    """

    graph: Graph
    records: tuple[Record, ...]
    notes: tuple[Note, ...]

    @property
    def changed(self) -> bool:
        """Whether anything was repaired."""
        return bool(self.records)


def repair(
    original: Graph,
    pruned: Graph,
    plan: Plan,
    calibration: Iterable[object] | None,
    *,
    ridge: float | None = None,
    sweeps: int = 1,
    positions: int | None = 64,
    limit: int = 512,
    add_bias: bool = False,
    statistics: str = "corrected",
    residual: bool = True,
    seed: int = 0,
) -> RepairResult:
    """Fit what is left of a network to what the original computed; neither graph is changed.

    Args:
        original: the graph before the plan.
        pruned: ``original.apply(plan)``, possibly cleaned up since: operators are found by their names.
        plan: what was removed.
        calibration: any iterable of inputs, a tensor, a tuple of positional or a dict of keyword arguments
            each; no labels. ``None`` for the repair without data, :func:`.data_free.compensate`.
        ridge: strength of the pull towards the weights at hand, relative to the mean variance of the input;
            ``None`` chooses it for each operator, by a fifth of the samples that are held back.
        sweeps: rounds over the network; more than one changes only weights used more than once.
        positions: how many output positions of an image, or tokens of a sequence, enter a fit; ``None``
            for all.
        limit: samples of the calibration that are read and kept in memory.
        add_bias: whether an operator without a bias may get one.
        statistics: what becomes of running statistics of batch norms: ``corrected`` by how the moments of
            their input changed, ``replaced`` by those of calibration, or ``kept``; see
            :mod:`.statistics`.
        residual: whether an operator whose result joins a shortcut is fitted to what the sum lacks, instead
            of to its own result; see :mod:`.targets`.
        seed: for the choice of positions.

    Raises:
        InputError: calibration is empty, not finite or does not fit, or an option is out of range.
        AxisError: the plan is not one for ``original``.
    """
    if ridge is not None and ridge < 0:
        raise InputError(f"ridge must not be negative, got {ridge}")
    if sweeps < 1 or (positions is not None and positions < 1):
        raise InputError(f"sweeps and positions must be at least 1, got {sweeps} and {positions}")
    if statistics not in MODES:
        raise InputError(f"statistics must be one of {', '.join(MODES)}, got {statistics!r}")
    if original.is_meta or pruned.is_meta:
        raise InputError("repair needs weights with values; these are on the meta device")
    removal = _removal(original, pruned, plan)
    if calibration is None:
        from .data_free import compensate

        records, notes, graph = compensate(original, pruned, plan, add_bias=add_bias, fitted=removal.refitted)
        return RepairResult(_remembering(graph, pruned, removal), records, notes)
    cut = Cut(original, keep_masks(original, plan), removal.refitted)
    if not plan and len(pruned.fx.nodes) == len(original.fx.nodes):
        return RepairResult(pruned, (), (Note("info", "", "nothing was removed, nothing to repair"),))
    data = read(original, calibration, limit)
    work = pruned.copy()
    options = Options(ridge, positions, add_bias, residual, seed)
    found = Units(cut, work, options, statistics)
    lockstep = Lockstep(cut, work, data.calls, found, seed)
    shared = any(len(unit.nodes) > 1 for unit in found.units)
    for _ in range(sweeps if shared else 1):
        lockstep.sweep()
    records = tuple(lockstep.records[i] for i in sorted(lockstep.records))
    changes = tuple(Note("changed", record.where, _words(record)) for record in records)
    summary = f"{len(records)} repaired, {len(found.units) - len(records) - lockstep.refused} as they were"
    notes = (Note("info", "", summary), *data.notes, *changes, *found.notes)
    return RepairResult(_remembering(work, pruned, removal) if records else pruned, records, notes)


def _removal(original: Graph, pruned: Graph, plan: Plan) -> Removal:
    """What was removed; earlier repairs count where they were held to the same network."""
    known = pruned.removal
    if known is not None and known.original.fx is original.fx:
        return replace(known, plan=plan)
    return Removal.of(original, plan)


def _remembering(graph: Graph, pruned: Graph, removal: Removal) -> Graph:
    """``graph`` with a note of which tensors are others than in ``pruned``, now that they were fitted."""
    if graph is not pruned:
        fitted = {n: value for n, value in graph.tensors.items() if value is not pruned.tensors.get(n)}
        graph.removal = removal.refit(fitted)
    return graph


def _words(record: Record) -> str:
    if record.kind == "statistics":
        return f"statistics of {record.samples} values a channel; the input was off by {record.before:.1%}"
    if record.kind == "mixing":
        how = f"too wide to fit: channels mixed as {record.samples} rows of its input say"
        return f"{how}; relative error {record.before:.2%} → {record.after:.2%}"
    strength = "" if math.isnan(record.ridge) else f", ridge {record.ridge:g}"
    errors = f"{record.before:.2%} → {record.after:.2%}"
    return f"refitted on {record.samples} rows{strength}: relative error {errors}"
