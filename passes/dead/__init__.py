"""Remove channels, hidden units and heads that cannot change the result: unread, zero or constant.

A position ``i`` of an axis is dead when everything that sums over the axis can do without it. For a consumer

    y = sum over i of W[:, i] x[i] + b

that is so when ``W[:, i]`` is 0 for every result that itself matters (*unread*), when ``x[i]`` is 0 whatever
the input (*zero*; a ReLU whose operand is never positive *never fires*), or when ``x[i]`` is some other
number ``c``, which moves into the bias:

    b' = b + c · W[:, i]

Where a convolution pads with zeros a constant other than 0 meets fewer taps at the border, so it stays, and a
note says so. What is constant is found by interval arithmetic (:mod:`.dead.constancy`), what
matters by following the outputs backwards (:mod:`.dead.liveness`), over every axis at once: a
channel of a residual stream goes if it is dead in all that reads the stream, a head if its values or its part
of the output projection are. An axis that is dead altogether keeps one position.

Results in evaluation mode stay the same to rounding, for inputs that are finite. Training could have
brought a dead channel back to life (a batch norm's scale of 0 has a gradient); after this pass it cannot.

>>> import torch, graphprune
>>> from graphprune.pipeline import Pipeline
>>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()
>>> _ = model[2].weight.data[:, 1].zero_()
>>> print(Pipeline.parse("remove-dead-channels").run(graphprune.trace(model, torch.zeros(1, 3))).graph)
input_1: f32[1, 3]
linear: f32[1, 3] = linear(input_1, %0.weight, %0.bias)
relu: f32[1, 3] = relu(linear)
linear_1: f32[1, 2] = linear(relu, %2.weight, %2.bias)
return (linear_1,)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from graphprune.axes.axis import Axis
from graphprune.graph import Graph
from graphprune.operands import set_argument
from graphprune.pipeline import Context, Note, Pass, PassResult
from graphprune.plans.plan import make_plan

from .constancy import Constancy
from .contractions import bias_of
from .liveness import Findings, Liveness, Marks, Share

# A note names this many positions, then counts.
NAMED = 8


@dataclass(frozen=True)
class RemoveDeadChannels(Pass):
    """Positions of exact axes that are unread, zero or constant go; constants move into biases."""

    name: ClassVar[str] = "remove-dead-channels"
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Remove what is dead from a copy."""
        return remove_dead(graph, lambda: list(graph.axes.values()), "channels")


def remove_dead(graph: Graph, candidates: Callable[[], list[Axis]], what: str) -> PassResult:
    """Remove the dead positions of some axes from a copy.

    Args:
        graph: the network.
        candidates: the axes to look at; of those that are not exact only notes are made. Called once the
            weights are known to have values.
        what: what a note calls positions of these axes.
    """
    if graph.is_meta:
        return PassResult(
            graph, False, (Note("info", "", "the weights have shapes only: nothing is known to be 0"),)
        )
    axes, looked = graph.axes, candidates()
    exact = [axis for axis in looked if axis.kind == "exact"]
    values = Constancy(graph)
    live = Liveness(values)
    dead = live.suppose([axis.atom for axis in exact])
    removed: dict[str | Axis, list[int]] = {
        axis.name: _positions(dead.gone(axis.atom)) for axis in exact if dead.gone(axis.atom).any()
    }
    notes = [_changed(axes[str(name)], dead, _saturated(values)) for name in removed]
    notes += [_spared(axis) for axis in exact if axis.atom in dead.spared]
    followed = {axis.atom for axis in looked} & values.extents.atoms
    notes += _refused(looked, live.suppose(followed, lenient=True), dead)
    if not removed:
        return PassResult(graph, False, (*notes, Note("info", "", f"no dead {what} to remove")))
    moved = _with_shares(graph, dead.shares)
    small = moved.apply(make_plan(moved, removed))
    # With constants in the biases already, the network just before the cut counts them twice: what a
    # later repair is held to is what it was before, for nothing that matters was removed here.
    if graph.removal is None or small.removal.original is not graph.removal.original:  # type: ignore[union-attr]
        small.removal = None
    return PassResult(small, True, tuple(notes))


def _positions(mask: np.ndarray) -> list[int]:
    return [int(p) for p in np.flatnonzero(mask)]


def _with_shares(graph: Graph, shares: list[Share]) -> Graph:
    """A copy whose biases have taken up what the constants add; the graph itself where nothing does."""
    if not shares:
        return graph
    copy = graph.copy()
    nodes = {node.name: node for node in copy.nodes}
    for share in shares:
        node = nodes[share.site.node.name]
        added = share.site.share(share.constants)
        bias = bias_of(node)
        if bias is not None:
            old = graph.tensors[str(bias.target)]
            moved = (old.detach().to(torch.float64) + added.to(old.device)).to(old.dtype)
            copy.set_tensor(str(bias.target), moved.contiguous())
        else:
            like = node.args[1].meta["val"]  # type: ignore[union-attr]
            _give_bias(copy, node, added.to(like.device, like.dtype))
    if graph.removal is not None:
        taken = {name: value for name, value in copy.tensors.items() if value is not graph.tensors.get(name)}
        copy.removal = graph.removal.refit(taken)
    return copy


def _give_bias(graph: Graph, node: fx.Node, value: torch.Tensor) -> None:
    weight = node.args[1]
    owner = str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else node.name
    trained = isinstance(graph.tensors.get(owner), torch.nn.Parameter)
    name = owner.rpartition(".")[0] + ".bias" if "." in owner else "bias"
    set_argument(node, "bias", graph.add_tensor(name, value, before=node, trainable=trained))


# ---- what is said of it --------------------------------------------------------------------------


def _saturated(values: Constancy) -> Marks:
    """Axis → positions where a clamping operator gives a constant for whatever it reads."""
    found: Marks = {}
    for node, elements in values.saturated.items():
        if bool(elements.any()):
            marks = {atom: np.zeros(atom.size, bool) for atom in values.extents.atoms}
            extent = values.extents.of(node)
            values.extents.project(node, 0, elements.expand(extent), marks)
            for atom, positions in marks.items():
                if positions.any():
                    found[atom] = found.get(atom, np.zeros(atom.size, bool)) | positions
    return found


def _changed(axis: Axis, dead: Findings, saturated: Marks) -> Note:
    gone = dead.gone(axis.atom)
    none = np.zeros(axis.size, bool)
    constant = dead.constant.get(axis.atom, none)
    zero = dead.zero.get(axis.atom, none) & ~constant
    clamped = saturated.get(axis.atom, none) & zero
    counts = Counter({
        "unread": int((gone & ~constant & ~zero).sum()),
        "zero": int((gone & zero & ~clamped).sum()),
        "never fires": int((gone & clamped).sum()),
        "constant, taken into the bias behind it": int((gone & constant).sum()),
    })  # fmt: skip
    reasons = ", ".join(f"{count} {why}" for why, count in counts.items() if count)
    return Note("changed", axis.name, f"{int(gone.sum())} of {axis.size} removed ({_named(gone)}): {reasons}")


def _named(mask: np.ndarray) -> str:
    positions = _positions(mask)
    more = f" and {len(positions) - NAMED} more" if len(positions) > NAMED else ""
    return "position" + "s" * (len(positions) > 1) + " " + ", ".join(map(str, positions[:NAMED])) + more


def _spared(axis: Axis) -> Note:
    return Note("refused", axis.name, "every position is dead; one stays, for an axis cannot be empty")


def _refused(axes: Iterable[Axis], could: Findings, dead: Findings) -> list[Note]:
    """Positions that could go if nothing stood in the way, and what does."""
    notes = []
    for axis in axes:
        if axis.atom not in could.keep or axis.atom in dead.spared:
            continue
        left = could.gone(axis.atom) & dead.keep[axis.atom]
        if not left.any():
            continue
        if axis.kind != "exact":
            reason = f"the axis is {axis.kind}: {axis.reason}" + (f" (at {axis.node})" if axis.node else "")
            notes.append(Note("refused", axis.name, f"{_named(left)} could go, but {reason}"))
            continue
        for reason, marks in dead.blocked.items():
            held = marks.get(axis.atom, np.zeros(axis.size, bool)) & left
            if held.any():
                notes.append(Note("refused", axis.name, f"{_named(held)} constant, but {reason}"))
                left = left & ~held
        if left.any():
            notes.append(
                Note("refused", axis.name, f"{_named(left)} could go, but only with others that stay")
            )
    return notes
