"""Which operators of a network a runtime computes together: its blocks (:mod:`graphprune.blocks`).

What is computed element by element, a batch norm, or a change of layout goes with the operator that it alone
reads, of several with the one that multiplies matrices; a sum that a layer norm reads goes with that.

>>> import torch, graphprune
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
>>> [block.label for block in blocks(graphprune.trace(net, torch.zeros(1, 4)))]
['linear, relu', 'linear']
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from .axes.terms import Atom, Concat, Term, leaves, resolve
from .blocks import Block
from .cost import node_macs
from .graph import Graph
from .kinds import kind

# Kinds that join the operator before them although they are not element by element.
_JOINING = frozenset({"batch-norm", "reshape", "transpose", "slice", "copy", "expand", "dropout", "getitem"})
# Kinds that take no time on their own.
_FREE = frozenset({"reshape", "getitem", "dropout", "sym_size", "identity", "detach", "alias"})
# Element by element, though torch does not tag them so.
_POINTWISE = frozenset({"hardswish", "silu", "relu", "clamp", "gelu"})


def blocks(graph: Graph) -> list[Block]:
    """The blocks of a network in order; what only reshapes is left out."""
    fed, symbols = _fed(graph), _symbols(graph)
    chains: dict[fx.Node, list[fx.Node]] = {}  # last or only operator → its chain
    made: list[list[fx.Node]] = []
    for node in graph.fx.nodes:
        if node.op != "call_function" or node not in fed:
            continue
        before = _joined(node, chains)
        if before is None:
            chains[node] = [node]
            made.append(chains[node])
        else:
            chains[node] = chains[before]
            chains[node].append(node)
    return [_block(graph, nodes, fed, symbols) for nodes in made if any(_takes_time(n) for n in nodes)]


def _symbols(graph: Graph) -> dict[Any, int]:
    """The symbols of open sizes, with what the example inputs have there."""
    return {
        size.node.expr: given
        for node, example in zip(graph.placeholders, graph.examples, strict=True)
        for size, given in zip(node.meta["val"].shape, example.shape, strict=True)
        if not isinstance(size, int)
    }


def _fed(graph: Graph) -> set[fx.Node]:
    """The operators that depend on what the caller passes, through tensors."""
    fed: set[fx.Node] = set()
    for node in graph.fx.nodes:
        tensor = isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))
        if node.op == "placeholder" or (tensor and any(n in fed for n in node.all_input_nodes)):
            fed.add(node)
    return fed


def _joined(node: fx.Node, chains: Mapping[fx.Node, list[fx.Node]]) -> fx.Node | None:
    """Which operand's block the node belongs to, or ``None`` for one of its own."""
    sources = [n for n in node.all_input_nodes if n in chains]
    if kind(node) == "getitem" and sources:
        return sources[0]
    if kind(node) == "layer-norm" and sources and _skip(sources[0]):
        return sources[0]
    if _skip(node):
        return None
    tags = getattr(node.target, "tags", ())
    if kind(node) not in _JOINING and torch.Tag.pointwise not in tags and kind(node) not in _POINTWISE:
        return None
    alone = [n for n in sources if len(n.users) == 1]
    heavy = [n for n in alone if any(node_macs(m) for m in chains[n])]
    return (heavy or alone or [None])[-1]  # type: ignore[list-item]


def _skip(node: fx.Node) -> bool:
    """Whether a layer norm reads this sum: runtimes compute it there, not where its terms come from."""
    return kind(node) == "add" and any(kind(user) == "layer-norm" for user in node.users)


def _takes_time(node: fx.Node) -> bool:
    return kind(node) not in _FREE


def _block(graph: Graph, nodes: Iterable[fx.Node], fed: set[fx.Node], symbols: Mapping[Any, int]) -> Block:
    nodes = tuple(nodes)
    inside = set(nodes)
    inputs: dict[fx.Node, None] = {}
    constants: dict[fx.Node, None] = {}
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand in fed and operand not in inside:
                inputs[operand] = None
            elif operand not in inside:
                _constant(operand, fed, constants, inputs)
    ordered = tuple(sorted(constants, key=lambda n: n.op != "get_attr"))
    kinds = list(dict.fromkeys(kind(n) for n in nodes if _takes_time(n)))
    dims = graph.typing.dims
    terms = [t for node in (*inputs, *ordered, *nodes) for t in _terms(dims.get(node))]
    return Block(graph, nodes, ", ".join(kinds), _groups(terms), tuple(inputs), ordered, symbols)


def _constant(
    node: fx.Node, fed: set[fx.Node], found: dict[fx.Node, None], inputs: dict[fx.Node, None]
) -> None:
    """Add what a constant operand is computed from, in order; numbers are written down instead."""
    if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
        return
    for operand in node.all_input_nodes:
        if operand in fed:
            inputs[operand] = None
        else:
            _constant(operand, fed, found, inputs)
    found[node] = None


def _terms(typed: Any) -> list[Term]:
    if typed is None:
        return []
    if isinstance(typed, tuple):
        return list(typed)
    return [term for item in typed for term in _terms(item)]


def _groups(terms: Iterable[Term]) -> tuple[tuple[Atom, ...], ...]:
    """Axes that may shrink; those that stand side by side in a dimension together."""
    groups: list[dict[Atom, None]] = []
    for term in dict.fromkeys(resolve(t) for t in terms):
        whole = [leaves(term)] if isinstance(term, Concat) else [[a] for a in leaves(term)]
        for members in whole:
            free = dict.fromkeys(a for a in members if a.frozen is None)
            touching = [g for g in groups if g.keys() & free.keys()]
            for group in touching:
                groups.remove(group)
                free = group | free
            if free:
                groups.append(free)
    return tuple(tuple(group) for group in groups)
