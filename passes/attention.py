"""Where a graph attends, and which of its axes are heads, kv groups and widths of heads.

Heads need no pass that knows the layer they are written in: with every dimension typed they are the atoms
of three values of

    context = softmax(Q Kᵀ) V        Q […, heads, l, width of keys],  context […, heads, l, width of values]

found as ``scaled_dot_product_attention`` or as a product with what comes out of a softmax. Where several
query heads share a key and value (Ainslie et al., *GQA*, 2023), the heads of the query are
``Product(groups, queries)``: a group goes with all its queries; a place among the queries goes in every
group.

>>> import torch, graphprune
>>> layer = torch.nn.TransformerEncoderLayer(12, 4, 16, batch_first=True, norm_first=True).eval()
>>> [found] = attentions(graphprune.trace(layer, torch.zeros(2, 5, 12)))
>>> [str(axis) for axis in found.heads], found.count
(['self_attn.in_proj_weight[0].1: 4 positions, exact'], 4)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from graphprune.axes.axis import Axis
from graphprune.axes.terms import Atom, Term, leaves
from graphprune.graph import Graph

aten = torch.ops.aten

_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.einsum.default}
# What may stand between a softmax and the product with the value, or between the value's projection and the
# attention: elements move or are masked, and none is summed up.
_MOVES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default,
    aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default,
    aten.contiguous.default, aten.repeat.default, aten.repeat_interleave.self_int, aten.flatten.using_ints,
    aten.mT.default, aten.numpy_T.default, aten.unflatten.int,
}  # fmt: skip
_MASKS = {
    aten.dropout.default, aten.mul.Tensor, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
    aten.where.self, aten.nan_to_num.default, aten.to.dtype, aten._to_copy.default,
}  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """One attention layer, at every place it is called.

    Attributes:
        where: a place a reader can open.
        contexts: values heads come out of, before the output projection.
        queries: operands that hold the width of the keys.
        heads: axes whose positions are heads, or kv groups where key and value are shared.
        shared: axes of the queries inside each group.
        key_width, value_width: axes inside each head.
        frozen: axes of heads that cannot go without changing more than their head.
    """

    where: str
    contexts: tuple[fx.Node, ...]
    queries: tuple[fx.Node, ...]
    heads: tuple[Axis, ...]
    shared: tuple[Axis, ...]
    key_width: tuple[Axis, ...]
    value_width: tuple[Axis, ...]
    frozen: tuple[Axis, ...] = ()

    @property
    def count(self) -> int:
        """How many heads of queries there are."""
        return self.kept({})

    def kept(self, sizes: Mapping[Atom, int]) -> int:
        """How many heads of queries there are when each axis has ``sizes[axis.atom]`` positions."""
        return prod(sizes.get(a.atom, a.size) for a in (*self.heads, *self.shared, *self.frozen))


@dataclass(frozen=True)
class _Site:
    context: fx.Node
    query: fx.Node | None
    value: fx.Node
    heads: tuple[Term, ...]
    widths: tuple[Term, ...]


def attentions(graph: Graph) -> list[Attention]:
    """The attention layers in execution order; calls that share their heads are one layer."""
    groups: list[list[_Site]] = []
    known: dict[Atom, list[_Site]] = {}
    for site in _sites(graph):
        atoms = _atoms(site.heads, graph)
        group = next((known[a] for a in atoms if a in known), None)
        if group is None:
            groups.append(group := [])
        group.append(site)
        known.update(dict.fromkeys(atoms, group))
    return [_layer(graph, sites) for sites in groups]


def _layer(graph: Graph, sites: list[_Site]) -> Attention:
    heads = [
        axis
        for axis in _axes(graph, (a for site in sites for a in _atoms(site.heads, graph)))
        if any(member.tensor in graph.parameters for member in axis.members)  # not a mask's windows
    ]
    own = {a for site in sites for a in _atoms(_projection(graph, site.value), graph)}
    grouped = [axis for axis in heads if axis.atom in own]
    free = [axis for axis in heads if axis.kind == "exact"]
    # With one key for all queries there is no axis of groups: then the queries are the heads.
    first = [axis for axis in free if axis.atom in own] if grouped else free
    inside = {axis.atom for axis in heads}
    keys = [
        a
        for site in sites
        if site.query is not None
        for a in _atoms(_typed(graph, site.query)[-1:], graph)
        if a not in inside
    ]
    values = [a for site in sites for a in _atoms(site.widths, graph) if a not in inside]
    return Attention(
        graph.where(sites[0].context),
        tuple(site.context for site in sites),
        tuple(site.query for site in sites if site.query is not None),
        tuple(first),
        tuple(axis for axis in free if axis not in first),
        tuple(axis for axis in _axes(graph, keys) if axis.kind == "exact"),
        tuple(axis for axis in _axes(graph, values) if axis.kind == "exact"),
        tuple(axis for axis in heads if axis.kind != "exact"),
    )


def _sites(graph: Graph) -> Iterator[_Site]:
    found: dict[fx.Node, _Site] = {}
    for node in graph.find(aten.scaled_dot_product_attention.default):
        query, value = node.args[0], node.args[2]
        dims = _typed(graph, node)
        found[node] = _Site(node, query, value, dims[:-2], dims[-1:])  # type: ignore[arg-type]
    for softmax in graph.find(*_SOFTMAX):
        for weights, product in _read_by_products(softmax):
            operands = [a for a in _operands(product) if a is not weights]
            if len(operands) == 1 and graph.constant(operands[0]) is None:
                # Heads are what weights, values and context have in common, wherever the product puts them.
                both = [_atoms(_typed(graph, n), graph) for n in (weights, operands[0])]
                heads = tuple(a for a in _atoms(_typed(graph, product), graph) if all(a in b for b in both))
                query = _query(softmax)
                found[product] = _Site(product, query, operands[0], heads, _typed(graph, product))
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    yield from (found[node] for node in sorted(found, key=order.__getitem__) if found[node].heads)


def _read_by_products(softmax: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """``(operand, product)`` for each product that reads the weights, masked or moved as they may be."""
    stack, seen = [softmax], {softmax}
    while stack:
        node = stack.pop()
        for user in node.users:
            if user.target in _PRODUCTS:
                yield node, user
            elif user.target in _MOVES | _MASKS and user not in seen:
                seen.add(user)
                stack.append(user)


def _query(softmax: fx.Node) -> fx.Node | None:
    """The left operand of the product whose result the softmax reads, ``None`` where there is none."""
    node: Any = softmax
    passed = _MOVES | _MASKS | {
        aten.softmax.int, aten._softmax.default, aten.add.Tensor, aten.div.Tensor, aten.div.Scalar,
        aten.mul.Scalar,
    }  # fmt: skip
    while isinstance(node, fx.Node):
        if node.target in _PRODUCTS or node.target is aten.baddbmm.default:
            operands = _operands(node)
            return operands[1] if node.target is aten.baddbmm.default else operands[0]
        if node.target not in passed:
            return None
        node = next((a for a in node.args if isinstance(a, fx.Node) and a.op == "call_function"), None)
    return None


def _operands(product: fx.Node) -> list[fx.Node]:
    args = product.args[1] if product.target is aten.einsum.default else product.args
    return [a for a in args if isinstance(a, fx.Node)]  # type: ignore[union-attr]


def _projection(graph: Graph, value: fx.Node) -> tuple[Term, ...]:
    """The type of a value where it was projected, before it was repeated for the queries of a group."""
    node = value
    while node.target in _MOVES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return _typed(graph, node)


def _typed(graph: Graph, node: fx.Node) -> tuple[Term, ...]:
    typed = graph.typing.dims.get(node)
    return typed if isinstance(typed, tuple) else ()


def _atoms(terms: tuple[Any, ...], graph: Graph) -> list[Atom]:
    """The atoms of terms that are axes of some parameter, each once."""
    return list(dict.fromkeys(a for t in terms for a in leaves(t) if a in graph.axes.by_atom))


def _axes(graph: Graph, atoms: Any) -> list[Axis]:
    return [graph.axes.by_atom[a] for a in dict.fromkeys(atoms)]
