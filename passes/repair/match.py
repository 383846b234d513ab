"""What of a pruned graph can be repaired, and against what of the original.

Operators are matched by name, which applying a plan keeps. A weight that is not the original's any more,
cut by the plan, belongs to an operator whose result means something else by now (a batch norm was folded
into it, say): it has no target, and stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from graphprune.passes.affine import Refusal
from graphprune.passes.commute import describe
from torch import fx

from graphprune.axes.terms import Atom, Term, mask
from graphprune.cost import node_macs
from graphprune.graph import Graph
from graphprune.operands import LINEAR, argument, uses
from graphprune.pipeline import Note
from graphprune.plans.rewrite import same_tensor

from .mixing import Mix, wide
from .rows import form, operands, parameter
from .statistics import Recalibrate
from .targets import Own, Rest, Target, junction
from .units import Options, Refit, takes_bias

aten = torch.ops.aten

# The widest least-squares problem that is solved; its moments take 128 MiB. A wider one needs minutes, and
# more rows than there are: on CREPE tiny a fit of 5,800 inputs took three times as long, and did worse.
MAX_COLUMNS = 4096

Unit = Refit | Recalibrate


class Cut:
    """Values and tensors of the original, cut down to the positions that a plan keeps.

    Attributes:
        fitted: tensors that a repair fitted to the original before, with the values it gave them.
    """

    def __init__(
        self,
        original: Graph,
        masks: Mapping[Atom, np.ndarray],
        fitted: Mapping[str, torch.Tensor] | None = None,
    ):
        self.original, self.masks, self.fitted = original, masks, fitted or {}
        self.by_name = {node.name: node for node in original.fx.nodes}

    def value(self, node: fx.Node, value: torch.Tensor) -> torch.Tensor:
        """A node's value."""
        return self._cut(value, self.original.typing.dims[node])  # type: ignore[arg-type]

    def tensor(self, name: str, only: int | None = None) -> torch.Tensor:
        """A parameter or buffer, along every dimension or only one."""
        return self._cut(self.original.tensors[name].detach(), self.original.typing.tensors[name], only)

    def gone(self, term: Term) -> np.ndarray:
        """Which positions of a dimension are removed."""
        return ~mask(term, self.masks)

    def _cut(self, value: torch.Tensor, dims: Sequence[Term], only: int | None = None) -> torch.Tensor:
        for dim, term in enumerate(dims):
            if only not in (None, dim):
                continue
            keep = mask(term, self.masks)
            if not keep.all():
                value = value.index_select(dim, torch.from_numpy(np.flatnonzero(keep)).to(value.device))
        return value


def unchanged(cut: Cut, pruned: Graph, names: Sequence[str | None]) -> None:
    """Raise :class:`Refusal` unless the tensors are the original's, cut by the plan, or were fitted to it."""
    for name in names:
        if name is None:
            continue
        value, known = pruned.tensors[name], cut.fitted.get(name)
        if known is None and name in cut.original.tensors:
            known = cut.tensor(name)
        if known is None or not same_tensor(known, value):
            raise Refusal(f"{name!r} is not the original's any more, cut by the plan: the target is unknown")


def twin_of(cut: Cut, node: fx.Node) -> fx.Node:
    """The original's operator of the same name.

    Raises:
        Refusal: there is none, or it is another one.
    """
    twin = cut.by_name.get(node.name)
    if twin is None or twin.target is not node.target:
        raise Refusal(f"the original has no {describe(node)} of this name")
    return twin


class Units:
    """What can be repaired, found once; the rest is said in notes.

    Attributes:
        units: in execution order of their first operators.
        twin: operator of the pruned graph → the original's.
    """

    def __init__(self, cut: Cut, work: Graph, options: Options, statistics: str):
        self._cut, self._work, self._options = cut, work, options
        self.notes: list[Note] = []
        self.twin: dict[fx.Node, fx.Node] = {}
        norms = self._statistics(statistics) if statistics != "kept" else []
        fits = self._fits({node for unit in norms for node in unit.nodes})
        fitted = {node for unit in fits if not isinstance(unit, Mix) for node in unit.nodes}
        for unit in norms:
            unit.rescale = not all(node.args[0] in fitted for node in unit.nodes)
        units: list[Unit] = [*fits, *norms]
        place = {node: i for i, node in enumerate(work.fx.nodes)}
        self.place = place
        self.units = sorted(units, key=lambda unit: place[unit.nodes[0]])
        self.of = {node: i for i, unit in enumerate(self.units) for node in unit.nodes}
        self._rests = self._joined(norms) if options.residual and statistics != "replaced" else {}

    def target(self, node: fx.Node) -> Target:
        """What an operator is fitted to, and what a batch norm is to read."""
        twin = self.twin[node]
        if twin.target is aten.batch_norm.default:
            source = node.args[0]
            return self._rests.get(source) or Own(twin.args[0])  # type: ignore[arg-type]
        return self._rests.get(node) or Own(twin)

    def _joined(self, norms: Sequence[Recalibrate]) -> dict[fx.Node, Rest]:
        """Operators whose result goes into a sum with what the pruned network has computed before."""
        base = {name: value for unit in norms for name, value in unit.base.items()}
        found = {}
        for node in [node for unit in self.units if isinstance(unit, Refit) for node in unit.nodes]:
            joint = junction(self._work, node, base)
            if joint is None or self.place[joint.other] >= self.place[node]:
                continue
            total = self._cut.by_name.get(joint.total.name)
            if total is not None and total.target is joint.total.target:
                sides = (joint.other, joint.weight, joint.scale, joint.shift)
                found[node] = Rest(self.twin[node], total, *sides)
        return found

    def refuse(self, nodes: Sequence[fx.Node], reason: object) -> None:
        """Say why operators stay as they are."""
        for node in nodes:
            self.notes.append(Note("refused", self._work.where(node), f"not repaired: {reason}"))

    def _match(self, node: fx.Node) -> None:
        self.twin[node] = twin_of(self._cut, node)

    def _statistics(self, mode: str) -> list[Recalibrate]:
        groups: dict[tuple[str, str], list[fx.Node]] = {}
        for node in self._work.find(aten.batch_norm.default):
            try:
                self._match(node)
                groups.setdefault(statistics_of(self._work, node, self._cut), []).append(node)
            except Refusal as refusal:
                self.refuse([node], refusal)
        base = {name: self._cut.tensor(name) for names in groups for name in names}
        return [Recalibrate(nodes, *names, mode, base) for names, nodes in groups.items()]

    def _fits(self, normalised: set[fx.Node]) -> list[Refit]:
        groups: dict[str, list[tuple[fx.Node, str | None]]] = {}
        for node in self._work.fx.nodes:
            if node.op != "call_function":
                continue
            if node.target not in LINEAR:
                if node_macs(node) and any(self._work.constant(s) is not None for s in node.all_input_nodes):
                    self.refuse([node], f"{describe(node)} is no convolution and no product with a matrix")
                continue
            try:
                if node.target in (aten.matmul.default, aten.mm.default) and not _has_weight(
                    self._work, node
                ):
                    continue
                weight, bias = refit_of(self._work, node, self._cut)
                self._match(node)
            except Refusal as refusal:
                self.refuse([node], refusal)
            else:
                groups.setdefault(weight, []).append((node, bias))
        fits = []
        for weight, members in groups.items():
            nodes = [node for node, _ in members]
            try:
                fits.append(self._fit(weight, nodes, {bias for _, bias in members}, normalised))
            except Refusal as refusal:
                self.refuse(nodes, refusal)
        return fits

    def _fit(
        self, weight: str, nodes: list[fx.Node], biases: set[str | None], normalised: set[fx.Node]
    ) -> Refit:
        for name in (weight, *biases):
            others = [] if name is None else [n for n in self._work.readers(name) if n not in nodes]
            if others:
                raise Refusal(f"{name!r} is also read by {describe(others[0])}")
        if len(biases) > 1 or len({(f.kind, f.groups) for f in map(form, nodes)}) > 1:
            raise Refusal(f"operators share {weight!r} but not their bias, or read it differently")
        (bias,) = biases
        absorbed = all(uses(node) == 1 and next(iter(node.users)) in normalised for node in nodes)
        added = self._options.add_bias and all(map(takes_bias, nodes))
        intercept = bias is not None or added or absorbed
        columns = form(nodes[0]).matrix(self._work.tensors[weight]).shape[1]
        if columns <= MAX_COLUMNS:
            return Refit(nodes, weight, bias, intercept, self._options)
        if len(nodes) > 1:
            raise Refusal(f"its {columns} inputs are more than the {MAX_COLUMNS} that are fitted, and shared")
        twin = self.twin[nodes[0]]
        outputs = {"transposed": 1, "product": 1}.get(form(twin).kind, 0)
        source, kept, full = wide(
            self._cut.original, twin, self._cut.gone, self._cut.tensor(weight, only=outputs)
        )
        if int(kept.sum()) > MAX_COLUMNS:
            raise Refusal(f"it has {int(kept.sum())} inputs; at most {MAX_COLUMNS} are fitted")
        return Mix(
            nodes, weight, bias, intercept, self._options, source=source, kept=kept.to(full.device), full=full
        )


def _has_weight(graph: Graph, node: fx.Node) -> bool:
    """Whether a matrix product multiplies with a parameter; otherwise it is between activations."""
    return graph.constant(node.args[1]) is not None


def refit_of(pruned: Graph, node: fx.Node, cut: Cut) -> tuple[str, str | None]:
    """Weight and bias of an operator that can be refitted.

    Raises:
        Refusal: it cannot.
    """
    _, weight_node, bias_node = operands(node)
    weight = parameter(pruned, weight_node, "weight")
    bias = None if bias_node is None else parameter(pruned, bias_node, "bias")
    shape, value = form(node), pruned.tensors[weight]
    if shape.kind in ("linear", "product") and value.dim() != 2:
        raise Refusal(f"it multiplies with a {value.dim()}-dimensional tensor, not a matrix")
    outputs = shape.matrix(value).shape[-1] * shape.groups
    if bias is not None and pruned.tensors[bias].shape != (outputs,):
        raise Refusal(f"it adds a {tuple(pruned.tensors[bias].shape)} tensor, not a bias a channel")
    unchanged(cut, pruned, (weight, bias))
    return weight, bias


def statistics_of(pruned: Graph, node: fx.Node, cut: Cut) -> tuple[str, str]:
    """Names of a batch norm's running mean and variance.

    Raises:
        Refusal: they cannot be replaced.
    """
    if argument(node, "training") or argument(node, "running_mean") is None:
        raise Refusal("it normalises with the statistics of the batch")
    mean, variance = (parameter(pruned, argument(node, f"running_{what}"), what) for what in ("mean", "var"))
    unchanged(cut, pruned, (mean, variance))
    return mean, variance
