"""The algebra of axis types: what a tensor dimension is made of.

A dimension's type is a term::

    Atom(n)             n independent positions
    Product(t, u, …)    row-major positions of t × u × …      (position = i_t · |u| + i_u)
    Concat(t, u, …)     the positions of t, then those of u, …

:mod:`~graphprune.axes.unification` says when two are the same, and binds an atom to the composite that it
turned out to be. Terms are flat when read: a Product holds no Product and no unit, a Concat no Concat.
Whatever stays unbound can go, position by position; a mask over the atoms gives a mask over every term
(:func:`mask`) and every size (:func:`kept_size`). A frozen atom never loses a position. No torch here.

>>> a, b = Atom(12), Atom(64)
>>> width = product(a, b)                    # heads × head_dim
>>> width
Product(Atom(12), Atom(64))
>>> keep = np.ones(12, bool); keep[3] = False
>>> kept_size(width, {a: 11}), int(mask(width, {a: keep}).sum())
(704, 704)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Union

import numpy as np


class Reason:
    """Why an atom is frozen or statistical: the node it happened at and the words for it."""

    __slots__ = ("node", "why")

    def __init__(self, why: str, node: object = None):
        self.why, self.node = why, node

    def __repr__(self) -> str:
        return f"{self.why} (at {self.node})" if self.node is not None else self.why


class Atom:
    """``size`` positions that go one by one, unless ``frozen``. ``ref`` is what it was bound to."""

    __slots__ = ("frozen", "ref", "size", "statistical")

    def __init__(self, size: int, frozen: Reason | None = None):
        self.size = size
        self.frozen = frozen
        self.statistical: Reason | None = None
        self.ref: Term | None = None

    def __repr__(self) -> str:
        if self.ref is not None:
            return repr(resolve(self))
        return f"{'Frozen' if self.frozen else 'Atom'}({self.size})"


class Product:
    """Row-major product of ``factors``; build with :func:`product`."""

    __slots__ = ("factors", "size")

    def __init__(self, factors: tuple[Term, ...], size: int):
        self.factors, self.size = factors, size

    def __repr__(self) -> str:
        return f"Product({', '.join(map(repr, self.factors))})"


class Concat:
    """``parts`` one after another; build with :func:`concat`."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: tuple[Term, ...], size: int):
        self.parts, self.size = parts, size

    def __repr__(self) -> str:
        return f"Concat({', '.join(map(repr, self.parts))})"


Term = Union[Atom, Product, Concat]  # noqa: UP007 - evaluated at run time, on Python 3.10 too

UNIT = Product((), 1)
"""The type of every dimension of size one."""


def resolve(term: Term) -> Term:
    """The term an atom was bound to, or the term itself. Chains are shortened on the way."""
    if term.__class__ is not Atom or term.ref is None:  # type: ignore[union-attr]
        return term
    end: Term = term.ref  # type: ignore[union-attr,assignment]
    while end.__class__ is Atom and end.ref is not None:  # type: ignore[union-attr]
        end = end.ref  # type: ignore[union-attr]
    while term is not end and term.__class__ is Atom:
        term.ref, term = end, term.ref  # type: ignore[union-attr,assignment]
    return end


def factors(term: Term) -> list[Term]:
    """The term as a flat product: resolved factors without units."""
    term = resolve(term)
    if term.__class__ is not Product:
        return [term] if term.size != 1 else []
    flat: list[Term] = []
    for factor in term.factors:  # type: ignore[union-attr]
        flat.extend(factors(factor))
    return flat


def parts(term: Term) -> list[Term]:
    """The term as a flat concatenation: resolved parts."""
    term = resolve(term)
    if term.__class__ is not Concat:
        return [term]
    flat: list[Term] = []
    # A stack, not recursion: cut one piece after another off an atom, and the rest nests as deep as that.
    stack = [*term.parts[::-1]]  # type: ignore[union-attr]
    while stack:
        part = resolve(stack.pop())
        if part.__class__ is Concat:
            stack.extend(part.parts[::-1])  # type: ignore[union-attr]
        else:
            flat.append(part)
    if len(flat) != len(term.parts):  # type: ignore[union-attr]
        term.parts = tuple(flat)  # type: ignore[union-attr]
    return flat


def product(*terms: Term) -> Term:
    """The row-major product of terms; one factor stands for itself, none is :data:`UNIT`."""
    flat = [f for t in terms for f in factors(t)]
    if len(flat) == 1:
        return flat[0]
    size = 1
    for factor in flat:
        size *= factor.size
    return Product(tuple(flat), size) if flat else UNIT


def concat(*terms: Term) -> Term:
    """The concatenation of terms; one part stands for itself. Parts of size zero are dropped.

    Raises:
        ValueError: no part has a position.
    """
    # A unit has no atom to say why it stays, so inside a concatenation a frozen single stands for it.
    flat = [p if p.__class__ is not Product or p.size != 1 else Atom(1, SINGLE)
            for t in terms for p in parts(t) if p.size]  # fmt: skip
    if not flat:
        raise ValueError("a concatenation needs at least one position")
    if len(flat) == 1:
        return flat[0]
    return Concat(tuple(flat), sum(p.size for p in flat))


SINGLE = Reason("a single position")


def leaves(term: Term) -> Iterator[Atom]:
    """The unbound atoms of a term, from left to right, repeated where they repeat."""
    term = resolve(term)
    if term.__class__ is Atom:
        yield term  # type: ignore[misc]
    else:
        for child in children(term):
            yield from leaves(child)


def children(term: Term) -> Sequence[Term]:
    """The resolved terms one level down: a flat product's factors, a concatenation's parts."""
    if term.__class__ is Atom:
        return ()
    return factors(term) if term.__class__ is Product else parts(term)


def freeze(term: Term, reason: Reason) -> None:
    """Freeze every atom of a term; the first reason is the one that stays."""
    for atom in leaves(term):
        if atom.frozen is None:
            atom.frozen = reason


def mark_statistical(term: Term, reason: Reason) -> None:
    """Say of every atom of a term that removing a position changes a statistic taken over it."""
    for atom in leaves(term):
        if atom.statistical is None:
            atom.statistical = reason


# ---- what a choice of atoms means for a term -------------------------------------------------------


def mask(term: Term, keep: Mapping[Atom, np.ndarray]) -> np.ndarray:
    """Boolean ``[term.size]``: the positions that stay when each atom keeps ``keep[atom]`` (default: all)."""
    term = resolve(term)
    if term.__class__ is Atom:
        chosen = keep.get(term)  # type: ignore[arg-type]
        return np.ones(term.size, bool) if chosen is None else chosen
    if term.__class__ is Concat:
        return np.concatenate([mask(p, keep) for p in parts(term)])
    result = np.ones(1, bool)
    for factor in factors(term):
        result = np.logical_and.outer(result, mask(factor, keep)).reshape(-1)
    return result


def kept_size(term: Term, sizes: Mapping[Atom, int]) -> int:
    """The size of a term when each atom has ``sizes[atom]`` positions (default: as many as now)."""
    term = resolve(term)
    if term.__class__ is Atom:
        return sizes.get(term, term.size)  # type: ignore[arg-type]
    if term.__class__ is Concat:
        return sum(kept_size(p, sizes) for p in parts(term))
    total = 1
    for factor in factors(term):
        total *= kept_size(factor, sizes)
    return total


def placements(term: Term) -> list[tuple[Atom, np.ndarray]]:
    """How atoms sit in a term: ``(atom, index)`` for each occurrence, left to right.

    ``index`` is an integer ``[term.size]``: which of the atom's positions each position belongs to, -1
    for none. An atom that occurs twice gives two entries.
    """
    term = resolve(term)
    if term.__class__ is Atom:
        return [(term, np.arange(term.size))]  # type: ignore[list-item]
    found: list[tuple[Atom, np.ndarray]] = []
    if term.__class__ is Concat:
        offset = 0
        for part in parts(term):
            for atom, inner in placements(part):
                index = np.full(term.size, -1)
                index[offset : offset + part.size] = inner
                found.append((atom, index))
            offset += part.size
        return found
    outer, inner_size = 1, term.size
    for factor in factors(term):
        inner_size //= factor.size
        for atom, index in placements(factor):
            found.append((atom, np.tile(np.repeat(index, inner_size), outer)))
        outer *= factor.size
    return found
