"""A network as the operators a runtime runs: each with what is fused into it, alone, at any size.

A block is an operator (a convolution, a product, a pooling …) with what follows it without another reader:
its batch norm, activation, residual sum, and changes of layout. Runtimes fuse most of that into one kernel,
so this is what can be timed on its own. :meth:`Block.graph` builds it as a network of one operator, with as
many positions on every axis as asked; :meth:`Block.text` is what two blocks must have in common to take
equally long. :mod:`graphprune.fusion` finds a network's blocks.

>>> import torch, graphprune
>>> from graphprune.fusion import blocks
>>> from torch import nn
>>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 1)).eval()
>>> first, second = blocks(graphprune.trace(net, torch.zeros(1, 3, 8, 8)))
>>> first.label, second.label
('convolution, batch-norm, relu', 'convolution')
>>> (width,) = second.variables[0]
>>> print(second.text({width: 16}))
x0: f32[1, 16, 6, 6]
p0: f32[8, 16, 1, 1]
p1: f32[8]
conv2d(x0, %p0, %p1)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from .axes.terms import Atom, kept_size
from .cost import node_macs
from .graph import Graph
from .graph_text import argument_text, operator_name, type_text
from .plans.rewrite import shrink
from .signature import Signature

Sizes = Mapping[Atom, int]

_OPERATIONS_A_MS = 40e6  # of one core, about: weighs multiply-accumulates against bytes, no more
_BYTES_A_MS = 8e6


@dataclass(frozen=True, eq=False)
class Block:
    """An operator of a network, with what is fused into it.

    Attributes:
        network: where it comes from.
        nodes: its operators, in order.
        label: their kinds.
        variables: groups of axes whose sizes decide its own. Axes that only stand side by side in one
            dimension (what a concatenation gives) are one group.
    """

    network: Graph = field(repr=False)
    nodes: tuple[fx.Node, ...]
    label: str
    variables: tuple[tuple[Atom, ...], ...] = field(repr=False)
    inputs: tuple[fx.Node, ...] = field(repr=False)
    constants: tuple[fx.Node, ...] = field(repr=False)  # nodes without an input of the caller's behind them
    symbols: Mapping[Any, int] = field(repr=False)  # symbolic size → the examples'

    @property
    def name(self) -> str:
        """The network's name of its operator."""
        return self.nodes[0].name

    def share(self, variable: tuple[Atom, ...], sizes: Sizes) -> float:
        """What is left of a group of axes, 0 to 1."""
        return sum(sizes.get(a, a.size) for a in variable) / sum(a.size for a in variable)

    def work(self, sizes: Sizes) -> float:
        """What it might take, in ms of some machine: multiply-accumulates and bytes moved, each at a rate.

        Only quotients of it mean something: how a time changes with sizes between two measured ones.
        """
        shape = self._shape(sizes)
        macs = sum(node_macs(node, shape) for node in self.nodes)
        moved = [*self.inputs, *self._tensors(), *self._results()]
        size = sum(4 * math.prod(shape(node)) for node in moved)
        return macs / _OPERATIONS_A_MS + size / _BYTES_A_MS

    def graph(self, sizes: Sizes) -> Graph:
        """The block alone, with sizes as given: a network of the block's inputs and outputs."""
        masks = {atom: np.arange(atom.size) < size for atom, size in sizes.items()}
        small, shape = shrink(self._whole, masks), self._shape(sizes)
        mode, examples = FakeTensorMode(), []
        for node, old in zip(small.placeholders, self.inputs, strict=True):
            example = _example(old, shape(old), self.network)
            node.meta["val"] = mode.from_tensor(example, static_shapes=True)
            examples.append(example)
        small.examples = tuple(examples)
        return small.propagate()

    def text(self, sizes: Sizes) -> str:
        """Operators, arguments, shapes and dtypes with no name of the network: equal texts, equal work."""
        shape, derivations = self._shape(sizes), self._whole.typing.derivations
        lines = [_line(f"x{i}", node, shape(node)) for i, node in enumerate(self.inputs)]
        lines += [_line(f"p{i}", node, shape(node)) for i, node in enumerate(self._tensors())]
        # As a rewrite would, without its tensors: a table is asked for hundreds of sizes.
        small = self._whole.copy() if derivations else self._whole
        for old, node in zip(self._whole.fx.nodes, small.fx.nodes, strict=True):
            for derivation in derivations.get(old, ()):
                derivation(node, lambda term: kept_size(term, sizes))
            if node.op == "call_function":
                arguments = [argument_text(a) for a in node.args]
                arguments += [f"{k}={argument_text(v)}" for k, v in node.kwargs.items()]
                lines.append(f"{operator_name(node)}({', '.join(arguments)})")
        return "\n".join(lines)

    # ---- building ----------------------------------------------------------------------------------

    @cached_property
    def _whole(self) -> Graph:
        """The block at full size, with names of its own."""
        made = fx.Graph()
        mapping: dict[fx.Node, Any] = {}
        for index, node in enumerate(self.inputs):
            mapping[node] = made.placeholder(f"x{index}")
            mapping[node].meta = {"val": node.meta["val"]}
        tensors: dict[str, torch.Tensor] = {}
        typing, derivations = self.network.typing, {}
        for node in (*self.constants, *self.nodes):
            if node.op == "get_attr":
                name = f"p{len(tensors)}"
                tensors[name] = self.network.tensor(node)
                mapping[node] = made.get_attr(name)
                mapping[node].meta = {"val": node.meta["val"]}
                continue
            # Named by their place: equal blocks of one network have equal texts.
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: mapping.get(n) or self._number(n))
            mapping[node] = made.create_node(node.op, node.target, args, kwargs, f"v{len(made.nodes)}")
            mapping[node].meta = dict(node.meta)
            if node in typing.derivations:
                derivations[mapping[node]] = typing.derivations[node]
        results = tuple(mapping[node] for node in self._results())
        made.output(results).meta = {"val": tuple(node.meta["val"] for node in self._results())}
        names = [f"x{index}" for index in range(len(self.inputs))]
        signature, _ = Signature.of(
            names, [torch.empty(0)] * len(names), {}, pytree.tree_structure(tuple(range(len(results))))
        )
        sources = (str(node.target) for node in self._tensors())
        dims = {name: typing.tensors[source] for name, source in zip(tensors, sources, strict=True)}
        return Graph(
            made,
            tensors,
            signature,
            (),
            persistent=frozenset(tensors),
            _typing=_Types(dims, derivations),
        )

    def _tensors(self) -> list[fx.Node]:
        return [node for node in self.constants if node.op == "get_attr"]

    def _results(self) -> list[fx.Node]:
        """What others read of it."""
        inside = set(self.nodes)
        found = [n for n in self.nodes if any(user not in inside for user in n.users)]
        return [n for n in found if isinstance(n.meta.get("val"), torch.Tensor)]

    def _shape(self, sizes: Sizes) -> Callable[[Any], tuple[int, ...]]:
        dims = self.network.typing.dims

        def shape(node: Any) -> tuple[int, ...]:
            terms, value = dims[node], node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                return ()
            if not isinstance(terms, tuple):
                return tuple(map(self._size, value.shape))
            return tuple(
                kept_size(term, sizes) if isinstance(size, int) else self._size(size)
                for term, size in zip(terms, value.shape, strict=True)
            )

        return shape

    def _size(self, size: Any) -> int:
        """A symbolic size as the examples have it."""
        return size if isinstance(size, int) else int(size.node.expr.subs(self.symbols))

    def _number(self, node: fx.Node) -> Any:
        """A size that the network computes, as a number."""
        value = node.meta["val"]
        return value if isinstance(value, bool) else self._size(value)


@dataclass(frozen=True)
class _Types:
    """As much of a :class:`~graphprune.axes.typing.Typing` as a block's rewrite looks at."""

    tensors: Mapping[str, Any]
    derivations: Mapping[fx.Node, Any]


def _line(name: str, node: fx.Node, shape: tuple[int, ...]) -> str:
    kind = type_text(node.meta["val"]).partition("[")[0]
    return f"{name}: {kind}[{', '.join(map(str, shape))}]"


def _example(node: fx.Node, shape: tuple[int, ...], network: Graph) -> torch.Tensor:
    """An input: what the network was captured with where it is the network's, else random numbers."""
    if node.op == "placeholder":
        given = network.examples[network.placeholders.index(node)]
        return given[tuple(slice(size) for size in shape)].detach().cpu().contiguous()
    dtype = node.meta["val"].dtype
    if dtype.is_floating_point:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.ones(shape, dtype=dtype) if dtype is torch.bool else torch.zeros(shape, dtype=dtype)
