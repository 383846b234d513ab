"""The weights that can be kept as integers, and what reads each of them.

A weight qualifies when everything that reads it is a product with what the network computes (a linear,
``x @ W``, ``addmm``) or looks rows of it up (an embedding). Read by anything else it would have to stay
in float beside its integers.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar

import torch
from graphprune.passes.affine import Refusal
from graphprune.passes.repair.rows import form, operands
from torch import fx

from graphprune.errors import InputError
from graphprune.graph import Graph
from graphprune.graph_text import operator_name
from graphprune.operands import PRODUCTS, depends_on_input
from graphprune.pipeline import Note

aten = torch.ops.aten

LINEARS = PRODUCTS | {aten.linear.default}
RECURRENT = frozenset({aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input})


@dataclass(frozen=True, eq=False)
class Place:
    """One weight.

    Attributes:
        name: the tensor's.
        products: the operators that multiply with it, in execution order.
        lookups: the embeddings.
        transposed: whether it is ``[inputs, outputs]``.
    """

    name: str
    products: tuple[fx.Node, ...]
    lookups: tuple[fx.Node, ...]
    transposed: bool

    @property
    def readers(self) -> tuple[fx.Node, ...]:
        return (*self.products, *self.lookups)

    def matrix(self, graph: Graph) -> torch.Tensor:
        """The weight as ``[outputs, inputs]``, of an embedding ``[entries, width]``."""
        weight = graph.tensors[self.name].detach()
        return weight.T if self.transposed else weight


def places(graph: Graph) -> tuple[list[Place], list[Note]]:
    """The weights that qualify, in the order they are first read, and notes on those that do not."""
    found: list[Place] = []
    notes: list[Note] = []
    for name in dict.fromkeys(str(node.target) for node in graph.fx.find_nodes(op="get_attr")):
        readers = graph.readers(name) if name in graph.tensors else []
        if not any(_multiplies(graph, node, name) or _looks_up(node, name) for node in readers):
            continue
        try:
            found.append(_place(graph, name, readers))
        except Refusal as refusal:
            notes.append(Note("refused", name, f"stays in float: {refusal}"))
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    found.sort(key=lambda place: min(order[node] for node in place.readers))
    return found, notes + _computed(graph)


class Named(Protocol):
    """What can be chosen by name: a tensor's, an operator's, or that of a module around one."""

    @property
    def name(self) -> str: ...

    @property
    def readers(self) -> tuple[fx.Node, ...]: ...


Kind = TypeVar("Kind", bound=Named)


def selected(found: Sequence[Kind], only: Sequence[str], ignored: Sequence[str]) -> list[Kind]:
    """Those of ``found`` that ``only`` names, all without it, less those that ``ignored`` names.

    A name is a weight's, an operator's or the path of a module around one, or a glob.

    Raises:
        InputError: a name matches none of them.
    """
    names = {place.name: _names(place) for place in found}
    for what, patterns in (("only", only), ("ignored", ignored)):
        for pattern in patterns:
            if not any(_matches(known, str(pattern)) for known in names.values()):
                raise InputError(
                    f"{what} name {pattern!r} matches no weight that can be quantized, nor what reads one; "
                    f"they are {', '.join(list(names)[:8]) or 'none'}{' …' if len(names) > 8 else ''}"
                )
    wanted = [p for p in found if not only or any(_matches(names[p.name], str(o)) for o in only)]
    return [p for p in wanted if not any(_matches(names[p.name], str(i)) for i in ignored)]


def _place(graph: Graph, name: str, readers: Sequence[fx.Node]) -> Place:
    weight = graph.tensors[name]
    if weight.dtype != torch.float32:
        kind = str(weight.dtype).removeprefix("torch.")
        raise Refusal(f"it is {kind}, and scales are float32; convert the model with model.float()")
    if weight.dim() != 2:
        raise Refusal(f"it has {weight.dim()} dimensions, and scales belong to rows of a matrix")
    products = tuple(node for node in readers if _multiplies(graph, node, name))
    lookups = tuple(node for node in readers if _looks_up(node, name))
    others = [n for n in readers if n not in {*products, *lookups} or n.all_input_nodes.count(n) > 1]
    if others:
        at = f"{operator_name(others[0])} ({graph.place(others[0])})"
        raise Refusal(f"{at} reads it, too, and needs it in float")
    kinds = {form(node).kind for node in products}
    if len(kinds) > 1 or ("product" in kinds and lookups):
        raise Refusal("one operator reads its rows and another its columns")
    for node in products:
        if operands(node)[0].meta["val"].dim() < 2:
            raise Refusal(f"{graph.place(node)} multiplies a single vector with it")
    return Place(name, products, lookups, "product" in kinds)


def _multiplies(graph: Graph, node: fx.Node, name: str) -> bool:
    if node.target not in LINEARS:
        return False
    source, weight, bias = operands(node)
    return (
        isinstance(source, fx.Node)
        and graph.constant(source) is None
        and _is(weight, name)
        and not _is(bias, name)
        and (weight.meta["val"].dim() == 2 or node.target in PRODUCTS)
    )


def _looks_up(node: fx.Node, name: str) -> bool:
    return node.target is aten.embedding.default and _is(node.args[0], name)


def _is(argument: object, name: str) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr" and argument.target == name


def kept(graph: Graph, kinds: Mapping[str, Container[object]], why: str) -> list[Note]:
    """A note that counts the operators of some kinds, which stay in float; none where there are none."""
    counts = {kind: sum(node.target in targets for node in graph.fx.nodes) for kind, targets in kinds.items()}
    some = [f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items() if count]
    return [Note("info", "", f"{' and '.join(some)} kept in float: {why}")] if some else []


def _computed(graph: Graph) -> list[Note]:
    """Linears whose weight is no tensor, though it might be."""
    why = "stays in float: its weight is computed from others; put fold-parameters before"
    linears = graph.find(aten.linear.default)
    return [Note("refused", graph.where(node), why) for node in linears if _is_computed(graph, node)]


def _is_computed(graph: Graph, node: fx.Node) -> bool:
    weight = node.args[1]
    return isinstance(weight, fx.Node) and graph.constant(weight) is None and not depends_on_input(weight)


def _names(place: Named) -> set[str]:
    modules = {str(node.meta.get("module") or "") for node in place.readers} | {place.name}
    parts = [module.split(".") for module in modules]
    around = {".".join(p[: i + 1]) for p in parts for i in range(len(p))}
    return (around | {node.name for node in place.readers}) - {""}


def _matches(names: set[str], pattern: str) -> bool:
    return pattern in names or any(fnmatchcase(name, pattern) for name in names)
