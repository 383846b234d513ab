"""The oracle of the typing rules: an operator on sliced operands is the slice of it on masked operands.

A :class:`Program` is a little graph whose operands are all free to lose positions and that returns
nothing, so that nothing is frozen by its surroundings. :func:`check` types it, removes random positions
from whatever the rules left free, and runs it twice: once at full size with every removed position
zeroed in every value, once on sliced operands with the arguments that the rules derived. Every value of
the second run must be the slice of the first's. What the rules claim is thus held against what the
operators do; the only part of the package in between is :func:`graphprune.plans.rewrite.shrink`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import map_arg
from torch.utils._pytree import tree_map

from graphprune.axes.terms import Atom, Term, leaves, mask
from graphprune.axes.typing import Typed, Typing
from graphprune.graph import Graph
from graphprune.plans.rewrite import shrink
from graphprune.signature import Signature

aten = torch.ops.aten
Draw = Callable[[st.SearchStrategy], Any]


class Program:
    """A graph under construction: ``program(target, *args)`` adds an operator, tensors become operands."""

    def __init__(self, draw: Draw):
        self.draw = draw
        self.fx = fx.Graph()
        self.tensors: dict[str, torch.Tensor] = {}
        self.checked: Graph | None = None
        self._mode = FakeTensorMode()
        self._random = torch.Generator().manual_seed(17)

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        args, kwargs = tree_map(
            lambda a: self.tensor_of(a) if isinstance(a, torch.Tensor) else a, (args, kwargs)
        )
        node = self.fx.call_function(target, args, kwargs)
        with self._mode:
            operands = map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta["val"] = target(*operands[0], **operands[1])
        return node

    def tensor_of(self, value: torch.Tensor) -> fx.Node:
        """A parameter (floating point and complex numbers) or a buffer (everything else) of that value."""
        name = f"t{len(self.tensors)}"
        trained = value.is_floating_point() or value.is_complex()
        self.tensors[name] = torch.nn.Parameter(value) if trained else value
        node = self.fx.get_attr(name)
        node.meta["val"] = self._mode.from_tensor(value, static_shapes=True)
        return node

    def plain(self, *shape: int) -> fx.Node:
        """A parameter: every dimension of it is one free axis."""
        return self.tensor_of(torch.randn(shape, generator=self._random, dtype=torch.float64))

    def operand(self, *shape: int) -> fx.Node:
        """A tensor of this shape: a parameter, or one whose dimensions turned out to be composite."""
        style = self.draw(st.sampled_from(("plain", "plain", "cat", "twice", "product", "part", "fixed")))
        wide = [d for d, s in enumerate(shape) if s > 1]
        if style == "plain" or not wide:
            return self.plain(*shape)
        dim = self.draw(st.sampled_from(wide))
        size, before, after = shape[dim], shape[:dim], shape[dim + 1 :]
        if style == "cat":
            at = self.draw(st.integers(1, size - 1))
            return self(aten.cat.default, [self.plain(*before, s, *after) for s in (at, size - at)], dim)
        if style == "twice" and size % 2 == 0:
            half = self.plain(*before, size // 2, *after)
            return self(aten.cat.default, [half, half], dim)
        if style == "product":
            leading = self.draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
            grid = self.plain(*before, leading, size // leading, *after)
            return self(aten.view.default, grid, list(shape))
        if style == "part":
            longer = self.plain(*before, size + 2, *after)
            return self(aten.slice.Tensor, longer, dim, 1, size + 1)
        if style == "fixed":
            table = torch.ones(shape, dtype=torch.int64)
            kept = self(aten.to.dtype, self.tensor_of(table), torch.float64)
            return self(aten.add.Tensor, kept, self.plain(*shape[:dim], 1, *after))
        return self.plain(*shape)

    def flag(self, *shape: int) -> fx.Node:
        """A boolean tensor that depends on a parameter."""
        return self(aten.gt.Scalar, self.operand(*shape), 0)

    def number(self, *shape: int) -> fx.Node:
        """An integer tensor, 1 to 3, that depends on a parameter."""
        sign = self(aten.sign.default, self.operand(*shape))
        return self(aten.to.dtype, self(aten.add.Scalar, sign, 2), torch.int64)

    def parts(self, node: fx.Node) -> list[fx.Node]:
        """The results of an operator that has several."""
        import operator

        return [self(operator.getitem, node, i) for i in range(len(node.meta["val"]))]

    def graph(self) -> Graph:
        """The graph; it returns nothing."""
        self.fx.output(())
        return Graph(self.fx, dict(self.tensors), Signature((), {}, (), None), ())  # type: ignore[arg-type]


def shapes(minimum: int = 1, maximum: int = 3, largest: int = 6) -> st.SearchStrategy[tuple[int, ...]]:
    """Small shapes; sizes with several divisors come often."""
    sizes = st.sampled_from([s for s in (1, 2, 3, 4, 4, 6, 6) if s <= largest])
    return st.lists(sizes, min_size=minimum, max_size=maximum).map(tuple)


def check(program: Program, seed: int = 0, *, values: bool = True) -> Typing:
    """Hold the rules to the operators, as the module docstring says; returns the typing.

    Exact axes are removed and every value compared; then statistical ones too, and only shapes are
    compared. ``values=False`` compares shapes only (random and uninitialised results).
    """
    graph = program.graph()
    program.checked, typing = graph, graph.typing
    nodes = [n for n in graph.fx.nodes if n.op in ("get_attr", "call_function")]
    for node in nodes:
        _same_shape(node, node.meta["val"], typing.dims[node])
    atoms = list(dict.fromkeys(a for n in nodes for t in terms(typing.dims[n]) for a in leaves(t)))
    free = [a for a in atoms if a.frozen is None and a.size > 1]
    exact = [a for a in free if a.statistical is None]
    _compare(graph, _removal(exact, seed), values)
    if len(exact) != len(free):
        _compare(graph, _removal(free, seed), False)
    return typing


def terms(typed: Typed) -> Iterator[Term]:
    """Every dimension of every tensor in a type."""
    if isinstance(typed, tuple):
        yield from typed
    else:
        for item in typed or ():
            yield from terms(item)


def _removal(atoms: list[Atom], seed: int) -> dict[Atom, np.ndarray]:
    generator = np.random.default_rng(seed)
    masks = {}
    for atom in atoms:
        if generator.random() < 0.85:
            keep = generator.random(atom.size) < generator.choice([0.0, 0.5, 0.8])
            keep[generator.integers(atom.size)] = True
            masks[atom] = keep
    return masks


def _compare(graph: Graph, masks: dict[Atom, np.ndarray], values: bool) -> None:
    dims = graph.typing.dims
    full: dict[fx.Node, Any] = {}
    for node in graph.fx.nodes:
        if node.op != "output":
            full[node] = _apply(_result(graph, node, full), dims[node], masks, _zeroed)
    small = shrink(graph, masks)
    # New constants are nodes of their own; all others stand in the order of the original's.
    added = {n for n in small.fx.nodes if n.op == "get_attr" and n.target not in graph.tensors}
    copies = [n for n in small.fx.nodes if n not in added]
    results: dict[fx.Node, Any] = {n: small.tensors[str(n.target)] for n in added}
    for node, copy in zip(graph.fx.nodes, copies, strict=True):
        if node.op == "output":
            continue
        try:
            results[copy] = _result(small, copy, results)
        except Exception as error:
            raise AssertionError(f"{node.format_node()} does not run on slices: {error}") from error
        _equal(node, results[copy], _apply(full[node], dims[node], masks, _sliced), values)


def _result(graph: Graph, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return graph.tensors[str(node.target)].detach()
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: known[n])
    torch.manual_seed(0)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _apply(value: Any, typed: Typed, masks: dict[Atom, np.ndarray], change: Callable) -> Any:
    if isinstance(value, torch.Tensor):
        for dim, term in enumerate(typed):  # type: ignore[arg-type]
            keep = mask(term, masks)
            if not keep.all():
                value = change(value, dim, torch.from_numpy(keep))
        return value
    if isinstance(value, (tuple, list)):
        return [_apply(v, t, masks, change) for v, t in zip(value, typed, strict=True)]  # type: ignore[arg-type]
    return value


def _zeroed(value: torch.Tensor, dim: int, keep: torch.Tensor) -> torch.Tensor:
    shape = [1] * value.dim()
    shape[dim] = -1
    return torch.where(keep.reshape(shape), value, torch.zeros((), dtype=value.dtype))


def _sliced(value: torch.Tensor, dim: int, keep: torch.Tensor) -> torch.Tensor:
    return value.index_select(dim, keep.nonzero().flatten())


def _same_shape(node: fx.Node, value: Any, typed: Typed) -> None:
    if isinstance(value, torch.Tensor):
        assert isinstance(typed, tuple), f"{node.format_node()} is typed {typed}"
        assert tuple(value.shape) == tuple(t.size for t in typed), f"{node.format_node()} is typed {typed}"
    elif isinstance(value, (tuple, list)):
        assert isinstance(typed, list), f"{node.format_node()} is typed {typed}"
        assert len(value) == len(typed), f"{node.format_node()} is typed {typed}"
        for v, t in zip(value, typed, strict=True):
            _same_shape(node, v, t)


def _equal(node: fx.Node, got: Any, wanted: Any, values: bool) -> None:
    if isinstance(wanted, torch.Tensor):
        assert got.shape == wanted.shape, f"{node.format_node()}: {got.shape} instead of {wanted.shape}"
        assert got.dtype == wanted.dtype
        if values:
            torch.testing.assert_close(
                got, wanted, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda m: f"{node.format_node()}: {m}"
            )
    elif isinstance(wanted, (tuple, list)):
        for ours, theirs in zip(got, wanted, strict=True):
            _equal(node, ours, theirs, values)
    else:
        assert got == wanted or (math.isnan(got) and math.isnan(wanted))


class Cases(dict[Any, Callable[[Program, Any], Any]]):
    """Operator → a function that puts one random use of it into a program."""

    def add(self, *targets: Any) -> Callable:
        """Register a function for operators; it gets the program and the operator."""

        def register(function: Callable[[Program, Any], Any]) -> Callable:
            for target in targets:
                assert target not in self, f"{target} has a case already"
                self[target] = function
            return function

        return register

    def of(self, names: str) -> Callable:
        """Register a function for ATen operators by name, as rules do."""
        from graphprune.axes.typing import aten_operators

        return self.add(*aten_operators(names))


def oracle(examples: int) -> Callable:
    """A test over random programs: it gets ``data`` to draw from and a ``seed`` for what is removed.

    The same examples every time, unshrunk: a failing one is small already, and there are hundreds of tests.
    """
    phases = (Phase.explicit, Phase.generate)
    fixed = settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=phases)
    return lambda test: fixed(given(data=st.data(), seed=st.integers(0, 1000))(test))
