"""When two dimensions are the same, and where a dimension may be cut: unification of terms.

:func:`unify` merges atoms, or *binds* an atom to the composite it turned out to be. A frozen atom behaves
like a constant: it is not bound, its pieces are frozen too, and whatever is unified with it freezes.

>>> from graphprune.axes.terms import Atom, product, resolve
>>> a, b = Atom(12), Atom(64)
>>> width = Atom(768)
>>> unify(width, product(a, b))              # 768 turned out to be heads x head_dim
>>> resolve(width)
Product(Atom(12), Atom(64))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import gcd

from .terms import (
    UNIT,
    Atom,
    Concat,
    Product,
    Reason,
    Term,
    concat,
    factors,
    freeze,
    leaves,
    mark_statistical,
    parts,
    product,
    resolve,
)

# Product(k, m) is spelled out as Concat(m, m, …) where a cut falls inside m; beyond this many copies the
# term would grow without use and the caller is told that it does not fit.
MAX_COPIES = 64


class Misfit(Exception):
    """Two terms cannot be the same dimension, or a term has no seam where one is needed."""


Blame = Callable[[str], "Reason"]
"""Given words for a misfit, the reason that the atoms it concerns are frozen with."""


def unify(left: Term, right: Term, blame: Blame | None = None) -> None:
    """Make two terms the same dimension.

    Where factors or parts have no common refinement, ``blame`` gives the reason that just those are
    frozen with; the rest is unified. Without it the first misfit raises.

    Raises:
        Misfit: sizes differ, or (without ``blame``) something does not line up. Atoms may already have
            been merged by then: that only constrains more, so the caller freezes both terms.
    """
    left, right = resolve(left), resolve(right)
    if left is right:
        return
    if left.size != right.size:
        raise Misfit(f"sizes {left.size} and {right.size}")
    if left.__class__ is Atom:
        _bind(left, right)  # type: ignore[arg-type]
    elif right.__class__ is Atom:
        _bind(right, left)  # type: ignore[arg-type]
    elif left.__class__ is Product and right.__class__ is Product:
        _unify_products(left, right, blame)
    else:
        if left.__class__ is not Concat:
            left, right = right, left
        pieces = parts(left)
        try:
            others = cut(right, [p.size for p in pieces])
        except Misfit as misfit:
            if blame is None:
                raise
            _freeze_all([left, right], blame(str(misfit)))
            return
        for piece, other in zip(pieces, others, strict=True):
            unify(piece, other, blame)


def _freeze_all(terms: Iterable[Term], reason: Reason) -> None:
    for term in terms:
        freeze(term, reason)


def _bind(atom: Atom, term: Term) -> None:
    if term.__class__ is Atom:
        # Two constants stay two: an interned frozen atom must not be tied to another one.
        if atom.frozen is not None and term.frozen is not None:  # type: ignore[union-attr]
            return
        if atom.frozen is not None:
            atom, term = term, atom  # type: ignore[assignment]
        if term.statistical is None:  # type: ignore[union-attr]
            term.statistical = atom.statistical  # type: ignore[union-attr]
        atom.ref = term
        return
    if atom.frozen is not None:
        freeze(term, atom.frozen)
        return
    if any(leaf is atom for leaf in leaves(term)):
        raise Misfit("a dimension cannot be a part of itself")
    if atom.statistical is not None:
        mark_statistical(term, atom.statistical)
    atom.ref = term


def _unify_products(left: Term, right: Term, blame: Blame | None) -> None:
    ours, theirs = factors(left)[::-1], factors(right)[::-1]
    while ours and theirs:
        f, g = _pop(ours), _pop(theirs)
        try:
            if f.size == g.size:
                unify(f, g, blame)
                continue
            shared = gcd(f.size, g.size)
            if shared == 1:
                raise Misfit(f"factors {f.size} and {g.size} share no row-major refinement")
            head, tail = split_factor(f, shared)
            ours.append(tail)
            other, rest = split_factor(g, shared)
            theirs.append(rest)
            unify(head, other, blame)
        except Misfit as misfit:
            if blame is None:
                raise
            _freeze_all([f, g, *ours, *theirs], blame(str(misfit)))
            return


def _pop(stack: list[Term]) -> Term:
    """The next factor; one that was bound since it was pushed is spread out first."""
    top = resolve(stack.pop())
    if top.__class__ is Product:
        stack.extend(factors(top)[::-1])
        return _pop(stack)
    return top


def split_factor(term: Term, leading: int) -> tuple[Term, Term]:
    """The term as ``Product(leading, rest)``: both factors.

    Raises:
        Misfit: ``leading`` does not divide the size, or a concatenation has no such grid.
    """
    term = resolve(term)
    rest, remainder = divmod(term.size, leading)
    if remainder:
        raise Misfit(f"{leading} does not divide {term.size}")
    if leading == 1:
        return UNIT, term
    if rest == 1:
        return term, UNIT
    if term.__class__ is Atom:
        return _in_two(term, leading, rest, Product)  # type: ignore[arg-type]
    if term.__class__ is Product:
        first, second = regroup([term], [leading, rest])
        return first, second
    pieces = parts(term)
    if all(p.size % rest == 0 for p in pieces):
        # Every part is a whole number of rows: the rows concatenate, the row is shared.
        rows = []
        row: Term | None = None
        for piece in pieces:  # type: ignore[assignment]
            head, tail = split_factor(piece, piece.size // rest)
            row = row or tail
            unify(row, tail)
            rows.append(head)
        return concat(*rows), resolve(row)  # type: ignore[arg-type]
    # Otherwise the rows themselves are concatenations: all rows are one, and no row can go alone.
    cuts = cut(term, [rest] * leading)
    for other in cuts[1:]:
        unify(cuts[0], other)
    return Atom(leading, Reason("rows of a concatenation that repeats")), resolve(cuts[0])


def _in_two(atom: Atom, first: int, second: int, whole: type[Product] | type[Concat]) -> tuple[Atom, Atom]:
    """Atoms of two sizes that the atom is the product or the concatenation of from now on."""
    if atom.frozen is not None:
        return Atom(first, atom.frozen), Atom(second, atom.frozen)
    pair = Atom(first), Atom(second)
    for piece in pair:
        piece.statistical = atom.statistical
    atom.ref = whole(pair, atom.size)
    return pair


def cut(term: Term, sizes: Sequence[int]) -> list[Term]:
    """The term as ``Concat`` of parts of the given sizes (which add up to its size; zero is allowed).

    Raises:
        Misfit: a cut falls where the term has no seam.
    """
    if sum(sizes) != term.size:
        raise Misfit(f"parts {list(sizes)} do not add up to {term.size}")
    queue = parts(term)[::-1]
    out: list[Term] = []
    for size in sizes:
        got: list[Term] = []
        missing = size
        while missing:
            piece = resolve(queue.pop())
            if piece.__class__ is Concat:
                queue.extend(parts(piece)[::-1])
                continue
            if piece.size > missing:
                piece, after = _split_at(piece, missing)
                queue.append(after)
            got.append(piece)
            missing -= piece.size
        out.append(concat(*got) if got else Atom(0, _EMPTY))
    return out


_EMPTY = Reason("empty")


def _split_at(term: Term, position: int) -> tuple[Term, Term]:
    """An atom or product as two parts, the first of size ``position``."""
    if term.__class__ is Atom:
        return _in_two(term, position, term.size - position, Concat)  # type: ignore[arg-type]
    first, *others = factors(term)
    row = product(*others)
    whole, inside = divmod(position, row.size)
    if inside == 0:
        head, tail = cut(first, [whole, first.size - whole])
        return product(head, *others), product(tail, *others)
    if first.size > MAX_COPIES:
        raise Misfit(f"a cut at {position} falls inside a row of {row.size}")
    # The cut falls inside a row: no row can go alone, and the row has a seam there.
    freeze(first, Reason("a slice falls between its blocks"))
    head, tail = cut(row, [inside, row.size - inside])
    copies = [row] * first.size
    return concat(*copies[:whole], head), concat(tail, *copies[whole + 1 :])


def regroup(terms: Iterable[Term], sizes: Sequence[int], blame: Blame | None = None) -> list[Term]:
    """Row-major reshape: the dimensions ``terms`` seen as dimensions of the given sizes.

    Factors that do not divide along the sizes are frozen with ``blame``'s reason, up to the place where
    both sides meet again; without ``blame`` they raise.

    Raises:
        Misfit: the sizes do not divide along the factors (without ``blame``), or hold other counts.
    """
    queue = [f for t in terms for f in factors(t)][::-1]
    wanted = list(sizes)
    got: list[list[Term]] = [[] for _ in wanted]
    place = 0
    while place < len(wanted):
        missing = wanted[place]
        if missing == 1:
            place += 1
            continue
        if not queue:
            raise Misfit("too few positions")
        factor = _pop(queue)
        try:
            shared = gcd(factor.size, missing)
            if shared == 1:
                raise Misfit(f"a factor of {factor.size} does not divide along {missing}")
            head, tail = split_factor(factor, shared)
        except Misfit as misfit:
            if blame is None:
                raise
            reason = blame(str(misfit))
            queue.append(factor)
            place = _regroup_frozen(queue, wanted, got, place, reason)
            continue
        if tail.size != 1:
            queue.append(tail)
        got[place].append(head)
        wanted[place] = missing // shared
    if any(resolve(f).size != 1 for f in queue):
        raise Misfit("positions left over")
    return [product(*factors_) for factors_ in got]


def _regroup_frozen(
    queue: list[Term], wanted: list[int], got: list[list[Term]], place: int, reason: Reason
) -> int:
    """Freeze factors until their product meets that of the sizes; returns the next open place."""
    ours = theirs = 1
    while True:
        if ours == theirs != 1:
            return place
        if ours <= theirs:
            factor = _pop(queue)
            freeze(factor, reason)
            ours *= factor.size
        else:
            theirs *= wanted[place]
            got[place].append(Atom(wanted[place], reason))
            wanted[place] = 1
            place += 1
