"""Random programs over terms, with every fact that a program states kept beside what the algebra made of it.

A program creates dimensions and says what they have to do with each other: this one is those two one
after another, these two are the same, those seen row-major are these. The algebra turns that into
atoms; a :class:`World` keeps each statement as an equation between masks. Whatever is then removed from
the atoms, every equation has to hold position by position: that is all that soundness means, and
nothing of it is computed by unification.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod

import numpy as np
from hypothesis import strategies as st

from graphprune.axes.terms import Atom, Reason, Term, concat, freeze, leaves, mask, product
from graphprune.axes.unification import Misfit, cut, regroup, unify

Masks = dict[Atom, np.ndarray]
MISFIT = Reason("does not line up")
LARGEST = 96


def outer(masks: Sequence[np.ndarray]) -> np.ndarray:
    """The flat mask of an array whose dimensions have these masks."""
    result = np.ones(1, bool)
    for keep in masks:
        result = (result[:, None] & keep[None, :]).reshape(-1)
    return result


@dataclass
class World:
    """Dimensions, the equations that were stated about them, and whether anything did not fit.

    ``swap`` states every equality the other way round; ``blame`` lets the algebra freeze what does not
    line up by itself, as a graph's typing does.
    """

    swap: bool = False
    blame: bool = False
    terms: list[Term] = field(default_factory=list)
    equations: list[tuple[str, Callable[[Masks], tuple[np.ndarray, np.ndarray]]]] = field(
        default_factory=list
    )
    misfits: int = 0

    def _state(self, what: str, left: Sequence[Term], right: Sequence[Term], join: Callable) -> None:
        self.equations.append(
            (what, lambda keep: (join([mask(t, keep) for t in left]), join([mask(t, keep) for t in right])))
        )

    def _blame(self, words: str) -> Reason:
        self.misfits += 1
        return MISFIT

    def _pick(self, number: int) -> Term:
        return self.terms[number % len(self.terms)]

    def atom(self, size: int) -> None:
        """A new dimension that nothing is known about."""
        self.terms.append(Atom(size))

    def product(self, a: int, b: int) -> None:
        """Two dimensions become one, row-major."""
        left, right = self._pick(a), self._pick(b)
        if left.size * right.size <= LARGEST:
            both = product(left, right)
            self._state("product", [both], [left, right], outer)
            self.terms.append(both)

    def concat(self, a: int, b: int) -> None:
        """Two dimensions one after another."""
        left, right = self._pick(a), self._pick(b)
        if left.size + right.size <= LARGEST:
            both = concat(left, right)
            self._state("concat", [both], [left, right], np.concatenate)
            self.terms.append(both)

    def cut(self, a: int, where: Sequence[int]) -> None:
        """A dimension falls into pieces: anywhere, or (numbers above 20) between rows of some size."""
        term = self._pick(a)
        rows = [d for d in range(1, term.size + 1) if term.size % d == 0]
        places = [w if w <= 20 else w * rows[w % len(rows)] for w in where]
        edges = sorted({0, term.size, *(w % term.size for w in places)})
        sizes = [high - low for low, high in pairwise(edges)]
        try:
            pieces = cut(term, sizes)
        except Misfit:
            self.misfits += 1
            freeze(term, MISFIT)
            pieces = [Atom(s, MISFIT) for s in sizes]
        self._state("cut", [term], pieces, np.concatenate)
        self.terms.extend(pieces)

    def regroup(self, numbers: Sequence[int], order: Sequence[int]) -> None:
        """Dimensions seen row-major as others: their prime factors in another grouping."""
        terms = [self._pick(n) for n in numbers]
        if prod(t.size for t in terms) > LARGEST:
            terms = terms[:1]
        primes = _primes(prod(t.size for t in terms))
        primes = [p for _, p in sorted(zip((*order, *range(len(primes))), primes, strict=False))]
        sizes = [1] * (1 + order[0] % 3)
        for i, p in enumerate(primes):
            sizes[order[i % len(order)] % len(sizes)] *= p
        try:
            result = regroup(terms, sizes, self._blame if self.blame else None)
        except Misfit:
            self.misfits += 1
            for term in terms:
                freeze(term, MISFIT)
            result = [Atom(s, MISFIT) for s in sizes]
        assert [t.size for t in result] == sizes
        self._state("regroup", terms, result, outer)
        self.terms.extend(result)

    def same(self, a: int, b: int) -> None:
        """Two dimensions of one size are one and the same."""
        left = self._pick(a)
        equal = [t for t in self.terms if t.size == left.size]
        right = equal[b % len(equal)]
        self._state("same", [left], [right], np.concatenate)
        if self.swap:
            left, right = right, left
        try:
            unify(left, right, self._blame if self.blame else None)
        except Misfit:
            self.misfits += 1
            freeze(left, MISFIT)
            freeze(right, MISFIT)

    def fix(self, a: int) -> None:
        """A dimension that keeps every position."""
        term = self._pick(a)
        freeze(term, Reason("on purpose"))
        self.equations.append(("frozen", lambda keep: (mask(term, keep), np.ones(term.size, bool))))

    def free(self) -> list[Atom]:
        """The atoms that positions can be removed from."""
        return [a for a in dict.fromkeys(a for t in self.terms for a in leaves(t)) if a.frozen is None]

    def partition(self) -> list[list[int]]:
        """For each position of each dimension what decides on it, renamed in order of appearance."""
        from graphprune.axes.terms import placements

        names: dict[frozenset, int] = {}
        found = []
        for term in self.terms:
            deciding: list[set] = [set() for _ in range(term.size)]
            for atom, index in placements(term):
                if atom.frozen is None and atom.size > 1:
                    for position in np.flatnonzero(index >= 0):
                        deciding[position].add((atom, int(index[position])))
            found.append([names.setdefault(frozenset(d), len(names)) for d in deciding])
        return found


def run(program: Sequence[tuple], *, swap: bool = False, blame: bool = False) -> World:
    """The world after a program."""
    world = World(swap, blame)
    for size in (4, 6, 12):
        world.atom(size)
    for name, *arguments in program:
        getattr(world, name)(*arguments)
    return world


def _primes(number: int) -> list[int]:
    found, p = [], 2
    while number > 1:
        while number % p == 0:
            found.append(p)
            number //= p
        p += 1
    return found


_number = st.integers(0, 11)
_numbers = st.lists(_number, min_size=1, max_size=3)
_steps = st.one_of(
    st.tuples(st.just("atom"), st.sampled_from([1, 2, 3, 4, 5, 6, 8, 12, 24])),
    st.tuples(st.just("product"), _number, _number),
    st.tuples(st.just("product"), _number, _number),
    st.tuples(st.just("concat"), _number, _number),
    st.tuples(st.just("cut"), _number, st.lists(st.integers(1, 40), min_size=1, max_size=3)),
    st.tuples(st.just("regroup"), _numbers, st.lists(_number, min_size=2, max_size=4)),
    st.tuples(st.just("same"), _number, _number),
    st.tuples(st.just("same"), _number, _number),
    st.tuples(st.just("fix"), _number),
)
programs = st.lists(_steps, max_size=14)
"""Programs: lists of steps, each a method of :class:`World` with its arguments."""


def random_masks(atoms: Sequence[Atom], seed: int) -> Masks:
    """Removes positions from some of the atoms; a single position never goes, it has no axis in a product.

    All of an atom, sometimes: a plan always leaves one, but what is stated holds for none as well.
    """
    generator = np.random.default_rng(seed)
    chosen = [a for a in atoms if a.size > 1 and generator.random() < 0.8]
    return {a: generator.random(a.size) < generator.random() for a in chosen}
