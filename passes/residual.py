"""Residual blocks of a graph: what is added to a value that it was computed from.

In ``y = x + f(x)`` the block is ``f``: everything on the way from the shortcut ``x`` to the sum. It can be
dropped, which leaves ``y = x``, when the sum is its only exit and has the shape of both operands. Pre-norm
(``x + f(norm(x))``), post-norm (``norm(x + f(x))``, where the norm stays) and convolutional blocks with an
identity shortcut are all of this form; a block whose shortcut is a projection is not. Blocks may be nested.
Sizes that were computed (a dynamic batch) belong to no block: others read them, too.

>>> import torch, graphprune
>>> layer = torch.nn.TransformerEncoderLayer(12, 4, 16, batch_first=True, norm_first=True).eval()
>>> graph = graphprune.trace(layer, torch.zeros(2, 5, 12))
>>> [(block.add, block.shortcut) for block in residual_blocks(graph)]
[('add', 'src'), ('add_1', 'add')]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from graphprune.cost import node_macs
from graphprune.graph import Graph
from graphprune.operands import sizes

aten = torch.ops.aten


@dataclass(frozen=True)
class Block:
    """A residual block, by node names, which stay the same while others are dropped.

    Attributes:
        add: the sum.
        shortcut: what stays of it.
        nodes: the operators between the two.
        module: path of the module that adds, empty where it is not known.
        where: a place a reader can open.
    """

    add: str
    shortcut: str
    nodes: frozenset[str]
    module: str
    where: str

    @property
    def layer(self) -> str:
        """The innermost numbered module around the sum (``encoder.layer.3``), else the sum itself.

        >>> Block("add", "x", frozenset(), "encoder.layer.3.attention.output", "").layer
        'encoder.layer.3'
        """
        parts = self.module.split(".")
        while parts and not parts[-1].isdigit():
            parts.pop()
        return ".".join(parts) or self.add


def residual_blocks(graph: Graph) -> list[Block]:
    """The blocks with at least one matrix product or convolution, in execution order of their sums."""
    place = {node: i for i, node in enumerate(graph.fx.nodes)}
    found = []
    for add in graph.find(aten.add.Tensor):
        left, right = add.args[:2]
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
            continue
        pairs = [(left, right)] if add.kwargs.get("alpha", 1) != 1 else [(left, right), (right, left)]
        for shortcut, result in pairs:
            inside = _between(shortcut, result, place)
            if inside and _is_block(add, shortcut, result, inside):
                names = frozenset(node.name for node in inside)
                module = str(add.meta.get("module") or "")
                found.append(Block(add.name, shortcut.name, names, module, graph.where(add)))
    return found


def _between(start: fx.Node, end: fx.Node, place: dict[fx.Node, int]) -> set[fx.Node]:
    """The nodes on paths of tensors from ``start`` to ``end``, without the first; empty if there is none."""
    reached, stack = {end}, [end]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in reached and place[source] > place[start] and not _is_size(source):
                reached.add(source)
                stack.append(source)
    inside: set[fx.Node] = set()
    for node in sorted(reached, key=place.__getitem__):
        if any(source is start or source in inside for source in node.all_input_nodes):
            inside.add(node)
    return inside if end in inside else set()


def _is_block(add: fx.Node, shortcut: fx.Node, result: fx.Node, inside: set[fx.Node]) -> bool:
    values = [node.meta.get("val") for node in (add, shortcut, result)]
    if not all(isinstance(v, torch.Tensor) and v.dtype == values[0].dtype for v in values):  # type: ignore[union-attr]
        return False
    if sizes(shortcut) != sizes(add) or sizes(result) != sizes(add):
        return False
    if not all(_stays_inside(node, inside, add) for node in inside):
        return False
    return any(node_macs(node) for node in inside)


def _stays_inside(node: fx.Node, inside: set[fx.Node], add: fx.Node) -> bool:
    """Whether nobody outside reads a value, or a size of it."""
    return all(
        user in inside or user is add or (_is_size(user) and _stays_inside(user, inside, add))
        for user in node.users
    )


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, int, float))


def drop(graph: Graph, blocks: Iterable[Block]) -> Graph:
    """A copy without the blocks: each sum is replaced by its shortcut. Other nodes keep their names.

    Raises:
        RuntimeError: an operator behind a block cannot read the shortcut in place of the sum: it views it,
            and the memory layout is another one.
    """
    small = graph.copy()
    nodes = {node.name: node for node in small.fx.nodes}
    instead: dict[fx.Node, fx.Node] = {}
    for block in blocks:
        shortcut = nodes[block.shortcut]
        while shortcut in instead:  # of blocks in a row, one's shortcut may be the sum of one that went
            shortcut = instead[shortcut]
        add = nodes[block.add]
        add.replace_all_uses_with(shortcut)
        instead[add] = shortcut
    small.sweep()
    return small.propagate()
