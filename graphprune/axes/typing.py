"""Type inference over a graph: every dimension of every value gets a term.

One pass in execution order. Parameters and buffers start as fresh atoms; each operator's rule
(:mod:`graphprune.axes.rules`) unifies what must be the same dimension and types its results. What
the caller sees (inputs, outputs) is frozen, and so is everything an operator without a rule touches:
never wrong, at worst smaller gains.

Rules also leave *derivations*: small functions that write an operator's sizes, groups or split points
again from its axes when a plan has made them smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Union

import torch
from torch import fx

from ..cost import size_hint
from ..graph import Graph
from ..graph_text import operator_name
from .terms import UNIT, Atom, Concat, Product, Reason, Term, freeze, leaves, mark_statistical
from .unification import Misfit, regroup, unify

Dims = tuple[Term, ...]
Typed = Union[Dims, list[Any], None]  # noqa: UP007 - evaluated at run time, on Python 3.10 too
Kept = Callable[[Term], int]
Derivation = Callable[[fx.Node, Kept], None]
Rule = Callable[["Typing", fx.Node], Typed]

RULES: dict[Any, Rule] = {}
"""Operator → rule. Filled by the rule files and by :func:`rule`."""


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a typing rule for operators: the way to teach graphprune an operator of your own.

    The rule gets the :class:`Typing` and the node. It reads operand types with ``t.of(argument)`` (one
    term a dimension), relates them with ``t.same``, ``t.freeze`` and ``t.statistical``, and returns the
    type of the result: a tuple of terms, a list of such tuples for several results, or ``None`` for
    what is not a tensor. ``t.derive(node, function)`` registers what must be written again when axes
    shrink. A rule replaces the one that the operator had. :mod:`graphprune.axes` has an example.
    """

    def register(function: Rule) -> Rule:
        if not (function.__module__ or "").startswith(f"{__package__}.rules"):
            _rules()  # now, or loading this package's own rules later would replace a better one
        for target in targets:
            RULES[target] = function
        return function

    return register


NAMED: dict[str, Rule] = {}
"""Qualified name (``library::operator``) → rule, for operators that exist once their library is imported."""


def named_rule(name: str) -> Callable[[Rule], Rule]:
    """Register a typing rule for an operator of a library that need not be installed."""

    def register(function: Rule) -> Rule:
        NAMED[name] = function
        return function

    return register


def aten_operators(names: str) -> list[Any]:
    """ATen overloads by name (``"relu"`` is ``relu.default``); those this torch lacks are left out."""
    found = []
    for name in names.split():
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if operator is not None:
            found.append(operator)
    return found


INPUT = "the caller passes it"
OUTPUT = "the caller sees it"


class Typing:
    """The types of a graph's values, and what a rewrite needs to know besides.

    Args:
        graph: the network.
        closed: freeze what the caller passes and sees. Who asks what belongs together, and not what may
            go, leaves it open: a frozen dimension is not told apart from another one of its kind.

    Attributes:
        dims: node → its type.
        tensors: parameter or buffer name → its type.
        derivations: node → functions that re-derive its arguments.
        unruled: operator name → nodes that had no rule and froze what they touch.
        misfits: ``(node, message)`` for unifications that did not fit and froze both sides.
    """

    def __init__(self, graph: Graph, *, closed: bool = True):
        self.graph = graph
        self.closed = closed
        self.dims: dict[fx.Node, Typed] = {}
        self.tensors: dict[str, Dims] = {}
        self.derivations: dict[fx.Node, list[Derivation]] = {}
        self.unruled: dict[str, list[fx.Node]] = {}
        self.misfits: list[tuple[fx.Node, str]] = []
        self._fixed: dict[tuple[int, Reason], Atom] = {}
        self._infer()

    # ---- what rules use ------------------------------------------------------------------------

    def of(self, argument: Any) -> Dims:
        """The type of an operand; a Python number is a tensor without dimensions."""
        return self.dims[argument] if argument.__class__ is fx.Node else ()  # type: ignore[return-value]

    def same(self, left: Term, right: Term, node: fx.Node) -> None:
        """Both terms are one dimension; where they do not fit, both are frozen and it is noted."""
        if left is right:
            return
        try:
            unify(left, right, lambda words: self.blame(node, words))
        except Misfit as misfit:
            self.misfit(node, misfit, left, right)

    def regroup(self, node: fx.Node, terms: Iterable[Term], sizes: Sequence[int]) -> list[Term]:
        """``terms`` row-major as dimensions of the given sizes; what does not divide along is frozen."""
        return regroup(terms, sizes, lambda words: self.blame(node, words))

    def blame(self, node: fx.Node, words: str) -> Reason:
        """Note a misfit; the reason its atoms are frozen with."""
        self.misfits.append((node, words))
        return Reason(f"dimensions do not line up: {words}", node)

    def misfit(self, node: fx.Node, misfit: Misfit, *terms: Term) -> None:
        """Freeze terms that an operator needs to line up and that do not."""
        reason = self.blame(node, str(misfit))
        for term in terms:
            freeze(term, reason)

    def freeze(self, terms: Term | Iterable[Term], why: str, node: fx.Node) -> None:
        """No position of these terms may go."""
        reason = Reason(why, node)
        for term in (terms,) if isinstance(terms, _TERMS) else terms:
            if term.size != 1:
                freeze(term, reason)

    def statistical(self, terms: Term | Iterable[Term], why: str, node: fx.Node) -> None:
        """A statistic runs over these terms: removing a position changes it."""
        reason = Reason(why, node)
        for term in (terms,) if isinstance(terms, _TERMS) else terms:
            if term.size != 1:
                mark_statistical(term, reason)

    def fixed(self, size: Any, reason: Reason) -> Term:
        """A frozen dimension; those of one size and reason are one object."""
        if size.__class__ is not int:
            size, reason = size_hint(size), SYMBOLIC
        if size == 1 and reason is not SYMBOLIC:
            return UNIT
        key = (size, reason)
        atom = self._fixed.get(key)
        if atom is None:
            atom = self._fixed[key] = Atom(size, reason)
        return atom

    def fresh(self, size: Any, node: fx.Node) -> Term:
        """A new axis that nothing restricts yet."""
        if size.__class__ is not int:
            return self.fixed(size, SYMBOLIC)
        return Atom(size) if size != 1 else UNIT

    def shape(self, node: fx.Node) -> Sequence[Any]:
        """The result's shape as captured (symbolic sizes as they are)."""
        return node.meta["val"].shape

    def fixed_like(self, value: Any, reason: Reason) -> Typed:
        """A frozen type for a value: tensors by their shapes, tuples item by item."""
        if isinstance(value, torch.Tensor):
            return tuple([self.fixed(s, reason) for s in value.shape])
        if isinstance(value, (tuple, list)):
            return [self.fixed_like(v, reason) for v in value]
        return None

    def derive(self, node: fx.Node, derivation: Derivation) -> None:
        """Have ``derivation(node, kept)`` run on the copied node whenever a plan is applied."""
        self.derivations.setdefault(node, []).append(derivation)

    def derive_argument(self, node: fx.Node, index: int, term: Term) -> None:
        """Argument ``index`` is the size of ``term``."""

        def write(copy: fx.Node, kept: Kept) -> None:
            if kept(term) != term.size:
                copy.update_arg(index, kept(term))

        self.derive(node, write)

    def derive_sizes(self, node: fx.Node, index: int, terms: Sequence[Term]) -> None:
        """Argument ``index`` is a list with one size a term; -1 and unchanged sizes stay as they are.

        A size that is computed in the graph can become -1 once; a second one freezes its term.
        """
        sizes = node.args[index]
        free = not any(s.__class__ is int and s == -1 for s in sizes)  # type: ignore[union-attr]
        for size, term in zip(sizes, terms, strict=True):  # type: ignore[arg-type]
            if size.__class__ is not int and any(leaf.frozen is None for leaf in leaves(term)):
                if not free or node.target not in _INFERS_SIZE:
                    self.freeze(term, "its size is computed from another one", node)
                free = False

        def write(copy: fx.Node, kept: Kept) -> None:
            new = list(copy.args[index])  # type: ignore[arg-type]
            for i, term in enumerate(terms):
                size = kept(term)
                if size != term.size and new[i] != -1:
                    new[i] = size if isinstance(new[i], int) else -1
            copy.update_arg(index, new)

        self.derive(node, write)

    # ---- the pass ----------------------------------------------------------------------------------

    def _infer(self) -> None:
        dims = self.dims
        rules = _rules()
        for node in self.graph.fx.nodes:
            op = node.op
            if op == "call_function":
                target = node.target
                found = rules.get(target)
                if found is None:
                    found = _by_tag(target)
                if node.kwargs and _names_positions(node):
                    found = Typing.named
                try:
                    dims[node] = found(self, node)
                except Misfit as misfit:
                    self.misfit(node, misfit, *self._operand_terms(node))
                    dims[node] = self.fixed_like(node.meta.get("val"), UNFIT)
                except Exception as error:
                    error.add_note(f"while typing {self.graph.where(node)}: {operator_name(node)}")
                    raise
            elif op == "get_attr":
                name = str(node.target)
                dims[node] = None if name in self.graph.bodies else self._tensor(name)
            elif op == "placeholder" and not self.closed:
                dims[node] = tuple([self.fresh(s, node) for s in self.shape(node)])
            elif op == "placeholder":
                reason = Reason(INPUT, node)
                dims[node] = tuple(
                    [
                        Atom(s, reason) if s.__class__ is int and s != 1 else self.fixed(s, reason)
                        for s in self.shape(node)
                    ]
                )
            elif op == "output" and self.closed:
                reason = Reason(OUTPUT, node)
                for source in node.all_input_nodes:
                    for term in _flat(dims[source]):
                        freeze(term, reason)

    def _tensor(self, name: str) -> Dims:
        known = self.tensors.get(name)
        if known is not None:
            return known
        tensor = self.graph.tensors[name]
        if tensor.is_floating_point() or tensor.is_complex():
            known = tuple([Atom(s) if s != 1 else UNIT for s in tensor.shape])
        else:
            known = tuple([self.fixed(s, INTEGER) for s in tensor.shape])
        self.tensors[name] = known
        return known

    def _operand_terms(self, node: fx.Node) -> list[Term]:
        return [term for source in node.all_input_nodes for term in _flat(self.dims[source])]

    def unknown(self, node: fx.Node) -> Typed:
        """The rule of an operator that has none: freeze what it touches, and list it by name."""
        name = operator_name(node)
        self.unruled.setdefault(name, []).append(node)
        self.freeze(self._operand_terms(node), f"no rule for operator {name}", node)
        return self.fixed_like(node.meta.get("val"), Reason(f"comes out of {name}, which has no rule", node))

    def named(self, node: fx.Node) -> Typed:
        """The rule of a call that names what rules read by position, which no tracer writes: all freezes."""
        self.freeze(
            self._operand_terms(node), "arguments are passed by name where a rule reads positions", node
        )
        return self.fixed_like(node.meta.get("val"), UNFIT)


def _names_positions(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    positional = {a.name for a in schema.arguments if not a.kwarg_only} if schema is not None else set()
    return not positional.isdisjoint(node.kwargs)


SYMBOLIC = Reason("symbolic size")
INTEGER = Reason("positions of an integer or boolean table carry meaning")
UNFIT = Reason("comes out of an operator whose operands do not line up")
_TERMS = (Atom, Product, Concat)
_INFERS_SIZE = {
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.unflatten.int,
}


def _flat(typed: Typed) -> list[Term]:
    if typed is None:
        return []
    if typed.__class__ is tuple:
        return [t for t in typed if t.size != 1]  # type: ignore[union-attr]
    return [term for item in typed for term in _flat(item)]  # type: ignore[arg-type]


def _rules() -> dict[Any, Rule]:
    from . import rules

    rules.load()
    return RULES


def _by_tag(target: Any) -> Rule:
    """The rule for an operator known by name, or that torch tags as pointwise; otherwise the freezing one."""
    named = NAMED.get(getattr(target, "_name", "").removesuffix(".default"))
    if named is not None:
        RULES[target] = named
        return named
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        from .rules.elementwise import elementwise

        RULES[target] = elementwise
        return elementwise
    return Typing.unknown
