"""Which operators run in integers, which values between them are quantized, and which share a scale.

A target says what its runtime fuses (:class:`graphprune.integers.Scheme`), by kind of operator. Operators of
``between`` and ``shares`` only pay among integers, so one of them that feeds a float operator (a residual
sum before a layer norm) is left out, and then those that fed it, until nothing changes: what is left is the
largest region in which every quantizer fuses.

>>> import torch, graphprune
>>> from graphprune.target import get
>>> convolutions = torch.nn.Conv2d(1, 2, 3), torch.nn.Conv2d(2, 2, 3)
>>> net = torch.nn.Sequential(convolutions[0], torch.nn.ReLU(), convolutions[1], torch.nn.GELU())
>>> graph = graphprune.trace(net, torch.zeros(1, 1, 8, 8))
>>> found = annotate(graph, get("cpu").integers)
>>> [node.name for node in found.runs], [value.name for value in found.values]
(['conv2d', 'conv2d_1'], ['input_1', 'relu', 'conv2d_1'])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from graphprune.graph import Graph
from graphprune.integers import Scheme
from graphprune.kinds import kind
from graphprune.operands import argument, has_argument, reads_shape_only

aten = torch.ops.aten

# The operand that holds the weight, by kind.
_WEIGHT = {"convolution": "weight", "transposed-convolution": "weight", "linear": "weight"}


@dataclass
class Annotation:
    """What :func:`annotate` found.

    Attributes:
        runs: operators in integers → their role in the scheme, in execution order.
        values: quantized value → the value whose scale it has (itself, unless it shares).
        settled: values whose producer gives integers, so that float readers, too, read them dequantized.
        ends: operator → the last of the activations behind it that its quantizer may absorb.
        floats: operators of a kind that the scheme knows which stay in float → why.
    """

    graph: Graph
    scheme: Scheme
    runs: dict[fx.Node, str] = field(default_factory=dict)
    values: dict[fx.Node, fx.Node] = field(default_factory=dict)
    settled: set[fx.Node] = field(default_factory=set)
    ends: dict[fx.Node, fx.Node] = field(default_factory=dict)
    floats: dict[fx.Node, str] = field(default_factory=dict)

    def reads(self, node: fx.Node) -> Iterator[fx.Node]:
        """The values that an operator in integers reads, without its weight and bias."""
        for operand in operands(node):
            yield self.through(operand)

    @property
    def centred(self) -> dict[fx.Node, bool]:
        """Values that give others their scale and whose zero point has to be 0 → whether to be signed."""
        found: dict[fx.Node, bool] = {}
        for node in self.runs:
            if kind(node) not in self.scheme.centred:
                continue
            for place, value in enumerate(node.args[:2]):
                chief = self._chief(value) if isinstance(value, fx.Node) else None
                if chief is not None:
                    found[chief] = found.get(chief, False) or place == 1
        return found

    def _chief(self, operand: fx.Node) -> fx.Node | None:
        """The value whose zero point an operand has."""
        value = self.through(operand)
        while value in self.runs and kind(value) == "rescale":
            value = next(self.reads(value))
        return self.values.get(value)

    def through(self, operand: fx.Node) -> fx.Node:
        """The value that is quantized for an operand: what stands before padding that the reader takes in."""
        while kind(operand) in self.scheme.joined and isinstance(operand.args[0], fx.Node):
            operand = operand.args[0]
        return operand


def weight_of(node: fx.Node) -> fx.Node | None:
    """The node of a convolution's or linear's weight; ``None`` for other operators."""
    if node.target is aten.addmm.default:
        found = node.args[2]
    else:
        name = _WEIGHT.get(kind(node))
        found = argument(node, name) if name else None
    return found if isinstance(found, fx.Node) else None


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensors an operator computes with, without weight and bias."""
    if kind(node) in _WEIGHT:
        first = node.args[1] if node.target is aten.addmm.default else node.args[0]
        return [first] if isinstance(first, fx.Node) else []
    if kind(node) == "concat":
        return [n for n in node.args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]
    return [n for n in node.args[:2] if isinstance(n, fx.Node) and _is_float(n)]


def annotate(graph: Graph, scheme: Scheme, skipped: Callable[[fx.Node], str] | None = None) -> Annotation:
    """Find what runs in integers.

    Args:
        graph: a float graph, batch norms folded.
        scheme: of the target.
        skipped: why an operator should stay in float, empty where it should not.
    """
    found = Annotation(graph, scheme)
    for node in graph.fx.nodes:
        if node.op != "call_function":
            continue
        role = _role(node, scheme)
        if not role:
            continue
        reason = _unfit(graph, node) or (skipped(node) if skipped else "")
        if reason:
            found.floats[node] = reason
        else:
            found.runs[node] = role
    _shrink(found)
    _settle(found)
    return found


def _role(node: fx.Node, scheme: Scheme) -> str:
    what = kind(node)
    for role in ("whole", "inputs", "between", "shares"):
        if what in getattr(scheme, role):
            return role
    return ""


def _unfit(graph: Graph, node: fx.Node) -> str:
    """Why an operator of a known kind cannot run in integers, whatever stands around it."""
    if not _is_float(node):
        return "it does not compute in float32"
    weight = weight_of(node)
    if kind(node) in _WEIGHT and (weight is None or graph.constant(weight) is None):
        return "its weight is computed, not a constant"
    adaptive = kind(node) == "average-pool" and has_argument(node, "output_size")
    if adaptive and set(argument(node, "output_size")) != {1}:
        return "it pools adaptively to more than one place"
    if kind(node) in ("add", "mul") and not operands(node):
        return "it has no tensor operand"
    if kind(node) == "concat" and any(graph.constant(value) is not None for value in operands(node)):
        return "it joins a constant"
    if kind(node) == "add" and argument(node, "alpha") != 1:
        return "it adds a multiple"
    return ""


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def users(node: fx.Node) -> list[fx.Node]:
    """Operators that read a value, not only its shape."""
    return [user for user in node.users if not reads_shape_only(user, node)]


def _end(node: fx.Node, scheme: Scheme) -> fx.Node:
    """The last of the activations behind an operator that nobody else reads its result before."""
    while True:
        readers = users(node)
        if len(readers) != 1 or kind(readers[0]) not in scheme.absorbed:
            return node
        node = readers[0]


def _shrink(found: Annotation) -> None:
    """Take out what does not pay, until nothing changes."""
    runs, scheme = found.runs, found.scheme
    absorbing = {node for node, role in runs.items() if role != "shares" and kind(node) != "rescale"}
    found.ends = {node: _end(node, scheme) if node in absorbing else node for node in runs}
    changed = True
    while changed:
        changed = False
        behind = {found.ends[node] for node in runs}
        for node, role in list(runs.items()):
            if role not in ("between", "shares"):
                continue
            reason = _float_reader(found, found.ends[node])
            if not reason and role == "between":
                reason = _float_operand(found, node, behind)
            if not reason and kind(node) == "rescale" and any(runs[u] == "shares" for u in users(node)):
                reason = "what reads its result has one scale with it"
            if reason:
                del runs[node]
                changed = True
                if role == "between":
                    found.floats[node] = reason


def _float_reader(found: Annotation, value: fx.Node) -> str:
    """Why not everything that reads a value is in integers."""
    readers = users(value)
    if not readers:
        return "nobody reads its result"
    for reader in readers:
        if reader.op == "output":
            return "its result is an output of the network"
        inside = reader in found.runs
        if kind(reader) in found.scheme.joined and value is reader.args[0]:
            inside = not _float_reader(found, reader)
        if not inside:
            return f"its result is read in float, by {kind(reader)}"
    return ""


def _float_operand(found: Annotation, node: fx.Node, behind: set[fx.Node]) -> str:
    for operand in operands(node):
        value = found.through(operand)
        if found.graph.constant(value) is None and value not in behind:
            return f"what it reads is in float, from {kind(value)}"
    return ""


def _given(found: Annotation, value: fx.Node) -> bool:
    """Whether a value needs no range: a constant, or a quantized one under another scale."""
    return found.graph.constant(value) is not None or (value in found.runs and kind(value) == "rescale")


def _settle(found: Annotation) -> None:
    """Which values are quantized, and who shares a scale with whom."""
    parent: dict[fx.Node, fx.Node] = {}

    def root(value: fx.Node) -> fx.Node:
        while parent.setdefault(value, value) is not value:
            value = parent[value]
        return value

    for node, role in found.runs.items():
        read = [value for value in found.reads(node) if not _given(found, value)]
        for value in read:
            root(value)
        end = found.ends[node]
        if kind(node) == "rescale":
            continue  # what it reads, under another scale
        if role == "inputs" and _float_reader(found, end):
            found.ends[node] = node  # its activation is a float operator
            continue
        root(end)
        found.settled.add(end)
        if role == "shares":
            for value in read:
                parent[root(end)] = root(value)
    order = {node: place for place, node in enumerate(found.graph.fx.nodes)}
    found.values = {value: root(value) for value in sorted(parent, key=order.__getitem__)}
