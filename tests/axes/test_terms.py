"""The algebra of axis types: whatever a program states about dimensions holds for every removal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.axes.terms import (
    UNIT,
    Atom,
    Concat,
    Product,
    Reason,
    Term,
    concat,
    factors,
    freeze,
    kept_size,
    leaves,
    mark_statistical,
    mask,
    parts,
    placements,
    product,
    resolve,
)
from graphprune.axes.unification import Misfit, cut, regroup, split_factor, unify

from .worlds import World, programs, random_masks, run

seeds = st.integers(0, 2**31)
fast = settings(max_examples=200, deadline=None)


def holds(world: World, seed: int) -> None:
    """Every stated equation, for one random removal."""
    keep = random_masks(world.free(), seed)
    for what, equation in world.equations:
        left, right = equation(keep)
        np.testing.assert_array_equal(left, right, err_msg=what)


@fast
@given(programs, seeds, st.booleans())
def test_every_statement_holds_for_every_removal(program: list, seed: int, blame: bool) -> None:
    world = run(program, blame=blame)
    for offset in range(3):
        holds(world, seed + offset)


@fast
@given(programs)
def test_unification_is_commutative(program: list) -> None:
    one, other = run(program), run(program, swap=True)
    if one.misfits == other.misfits == 0:
        assert one.partition() == other.partition()


@fast
@given(programs)
def test_unification_is_idempotent(program: list) -> None:
    once = run(program, blame=True)
    twice = run([step for s in program for step in ([s, s] if s[0] == "same" else [s])], blame=True)
    assert once.partition() == twice.partition()


@fast
@given(programs, seeds)
def test_masks_have_the_terms_sizes(program: list, seed: int) -> None:
    world = run(program, blame=True)
    keep = random_masks(world.free(), seed)
    sizes = {atom: int(m.sum()) for atom, m in keep.items()}
    for term in world.terms:
        assert mask(term, keep).shape == (term.size,)
        assert kept_size(term, sizes) == mask(term, keep).sum()
        assert kept_size(term, {}) == term.size


@fast
@given(programs, seeds)
def test_placements_say_what_a_mask_says(program: list, seed: int) -> None:
    world = run(program, blame=True)
    keep = random_masks(world.free(), seed)
    for term in world.terms:
        expected = np.ones(term.size, bool)
        for atom, index in placements(term):
            if atom in keep:
                here = index >= 0
                expected[here] &= keep[atom][index[here]]
        np.testing.assert_array_equal(mask(term, keep), expected)


@fast
@given(programs, programs, seeds)
def test_refining_does_not_change_what_was_there(before: list, after: list, seed: int) -> None:
    """A removal that is still possible after a refinement means the same as it did before."""
    world = run(before, blame=True)
    known = [(term, placements(term)) for term in world.terms]
    for name, *arguments in after:
        getattr(world, name)(*arguments)
    keep = random_masks(world.free(), seed)
    for term, placed in known:
        expected = np.ones(term.size, bool)
        for atom, index in placed:
            here = index >= 0
            expected[here] &= mask(atom, keep)[index[here]]
        np.testing.assert_array_equal(mask(term, keep), expected)


@fast
@given(programs)
def test_terms_are_flat_and_sizes_add_up(program: list) -> None:
    for term in run(program, blame=True).terms:
        assert not any(isinstance(resolve(f), Product) for f in factors(term))
        assert not any(isinstance(resolve(p), Concat) for p in parts(term))
        assert sum(p.size for p in parts(term)) == term.size
        assert np.prod([f.size for f in factors(term)], dtype=int) == term.size
        assert all(leaf.ref is None for leaf in leaves(term))


@fast
@given(programs)
def test_what_is_frozen_stays_so(program: list) -> None:
    world = World(blame=True)
    for size in (4, 6, 12):
        world.atom(size)
    frozen: list[Term] = []
    for name, *arguments in program:
        getattr(world, name)(*arguments)
        assert all(leaf.frozen for term in frozen for leaf in leaves(term))
        frozen += [t for t in world.terms if all(leaf.frozen for leaf in leaves(t))]


# ---- what the algebra is for: precise answers -----------------------------------------------------


def atoms(*sizes: int) -> list[Atom]:
    return [Atom(s) for s in sizes]


def axis(term: Term) -> Atom:
    """The one atom that a term is."""
    (atom,) = leaves(term)
    return atom


def free_sizes(*terms: Term) -> list[int]:
    return [a.size for a in dict.fromkeys(a for t in terms for a in leaves(t)) if a.frozen is None]


def test_a_width_turns_out_to_be_heads_and_head_width() -> None:
    (width,) = atoms(768)
    heads, per_head = regroup([width], [12, 64])
    assert factors(width) == [heads, per_head]
    assert mask(width, {axis(heads): np.arange(12) != 3}).reshape(12, 64)[3].sum() == 0


def test_fused_projections_fall_apart() -> None:
    (fused,) = atoms(36)
    q, k, v = cut(fused, [12, 12, 12])
    for piece in (q, k):
        regroup([piece], [3, 4])
    unify(q, k)
    assert free_sizes(fused) == [3, 4, 12]
    assert factors(q) == factors(k)
    keep = {axis(factors(q)[0]): np.array([1, 0, 1], bool)}
    np.testing.assert_array_equal(mask(fused, keep), np.repeat([1, 0, 1, 1, 0, 1, 1, 1, 1], 4).astype(bool))
    assert mask(v, keep).all()


def test_grouped_queries_are_heads_times_repeats() -> None:
    query, key = atoms(12, 4)
    repeats = Atom(3)
    unify(query, product(key, repeats))
    np.testing.assert_array_equal(
        mask(query, {key: np.array([1, 0, 1, 1], bool)}), np.repeat([True, False, True, True], 3)
    )


def test_rotary_halves_become_one() -> None:
    a, b = atoms(4, 4)
    unify(concat(a, b), concat(b, a))
    assert resolve(a) is resolve(b)


@pytest.mark.parametrize(("first", "second"), [(3, 5), (4, 6), (1, 7), (6, 9), (8, 12)])
def test_a_rotation_terminates_at_the_greatest_common_divisor(first: int, second: int) -> None:
    """``Concat(a, b) ~ Concat(b, a)`` says that positions differing by |a| are one: gcd classes."""
    a, b = atoms(first, second)
    unify(concat(a, b), concat(b, a))
    keep = random_masks(list(leaves(a)), seed=1)
    whole = mask(concat(a, b), keep)
    np.testing.assert_array_equal(whole, np.roll(whole, first))


@pytest.mark.parametrize(("first", "second"), [(2, 3), (4, 6), (4, 4), (2, 8), (6, 15)])
def test_a_transposed_product_terminates(first: int, second: int) -> None:
    a, b = atoms(first, second)
    unify(product(a, b), product(b, a), lambda words: Reason(words))
    keep = random_masks([x for x in (*leaves(a), *leaves(b)) if not x.frozen], seed=2)
    np.testing.assert_array_equal(mask(product(a, b), keep), mask(product(b, a), keep))


def test_a_square_says_nothing_about_its_root() -> None:
    (a,) = atoms(4)
    unify(product(a, a), product(a, a))
    assert free_sizes(a) == [4]


def test_a_cut_between_rows_and_one_inside_a_row() -> None:
    rows, row = atoms(3, 4)
    head, tail = cut(product(rows, row), [4, 8])
    assert (head.size, tail.size) == (4, 8)
    assert free_sizes(head, tail) == [4, 2]  # the first row alone is a single position of its axis
    rows, row = atoms(3, 4)
    head, tail = cut(product(rows, row), [6, 6])
    assert free_sizes(rows) == []
    assert free_sizes(row) == [2, 2]


def test_pieces_of_a_product_are_its_rows_in_order() -> None:
    rows, row = atoms(4, 3)
    head, tail = cut(product(rows, row), [3, 9])
    keep = {axis(cut(rows, [1, 3])[1]): np.array([1, 0, 1], bool)}
    np.testing.assert_array_equal(mask(head, keep), [1, 1, 1])
    np.testing.assert_array_equal(mask(tail, keep), [1, 1, 1, 0, 0, 0, 1, 1, 1])


def test_rows_across_the_seams_of_a_concatenation_are_one() -> None:
    a, b = atoms(6, 6)
    rows, row = regroup([concat(a, b)], [3, 4])
    assert axis(rows).frozen is not None
    keep = {atom: np.array([1, 0], bool) for atom in leaves(row)}
    assert len(keep) == 2
    np.testing.assert_array_equal(mask(concat(a, b), keep), np.tile([1, 0], 6).astype(bool))


def test_groups_of_a_concatenation_share_their_row() -> None:
    a, b = atoms(8, 4)
    groups, within = regroup([concat(a, b)], [6, 2])
    assert free_sizes(groups) == [4, 2]
    assert free_sizes(within) == [2]


def test_many_pieces_do_not_nest_too_deep() -> None:
    (long,) = atoms(6000)
    pieces = cut(long, [1] * 6000)
    assert len(pieces) == len(parts(long)) == 6000
    assert mask(long, {}).all()
    assert kept_size(long, {}) == 6000
    freeze(long, Reason("all of them"))
    assert all(leaf.frozen for leaf in leaves(long))
    assert len(placements(concat(long, Atom(2)))) == 6001


def test_rows_of_one_position_each_have_a_reason() -> None:
    """A dimension never loses its last atom: whoever asks why it stays gets an answer."""
    a, b = atoms(4, 4)
    groups, _ = regroup([concat(a, b)], [2, 4])
    assert [leaf.frozen is not None for leaf in leaves(groups)] == [True, True]


def test_frozen_atoms_behave_as_constants() -> None:
    fixed, width = Atom(6, Reason("input")), Atom(6)
    heads, inner = regroup([fixed], [2, 3])
    assert fixed.ref is None
    assert axis(heads).frozen
    assert axis(inner).frozen
    unify(width, fixed)
    assert [str(leaf.frozen) for leaf in leaves(width)] == ["input"]
    pair = product(*atoms(2, 3))
    unify(fixed, pair)
    assert free_sizes(pair) == []


def test_two_constants_stay_two() -> None:
    one, two = Atom(4, Reason("a")), Atom(4, Reason("b"))
    unify(one, two)
    assert resolve(one) is one
    assert resolve(two) is two


def test_a_statistic_follows_into_refinements_and_merges() -> None:
    (width,) = atoms(12)
    mark_statistical(width, Reason("mean"))
    regroup([width], [3, 4])
    assert all(leaf.statistical for leaf in leaves(width))
    (other,) = atoms(12)
    cut(other, [5, 7])
    (third,) = atoms(12)
    mark_statistical(third, Reason("mean"))
    unify(third, other)
    assert all(leaf.statistical for leaf in leaves(other))


@pytest.mark.parametrize("turned", [False, True])
def test_a_statistic_follows_an_atom_into_another(turned: bool) -> None:
    a, b = atoms(4, 4)
    mark_statistical(a, Reason("mean"))
    unify(*((b, a) if turned else (a, b)))
    assert resolve(a) is resolve(b)
    assert str(axis(b).statistical) == "mean"


def test_misfits_without_blame() -> None:
    with pytest.raises(Misfit, match="sizes 4 and 6"):
        unify(Atom(4), Atom(6))
    with pytest.raises(Misfit, match="no row-major refinement"):
        unify(product(*atoms(2, 3)), product(*atoms(3, 2)))
    with pytest.raises(Misfit, match="do not add up"):
        cut(Atom(5), [2, 2])
    with pytest.raises(Misfit, match="does not divide"):
        split_factor(Atom(5), 2)
    with pytest.raises(Misfit, match="left over"):
        regroup([Atom(4)], [2])
    with pytest.raises(Misfit, match="too few"):
        regroup([Atom(4)], [4, 2])


def test_blame_freezes_only_what_does_not_line_up() -> None:
    a, b, c = atoms(5, 2, 3)
    d, e = atoms(3, 2)
    f = Atom(5)
    words: list[str] = []

    def blame(text: str) -> Reason:
        words.append(text)
        return Reason(text)

    unify(product(a, b, c), product(f, d, e), blame)
    assert len(words) == 1
    assert resolve(a) is resolve(f)
    assert free_sizes(a, b, c, d, e, f) == [5]
    got = regroup([Atom(7), Atom(6), Atom(4)], [7, 4, 6], blame)
    assert free_sizes(*got)[0] == 7


def test_units_and_empty_pieces() -> None:
    assert product() is UNIT
    assert product(UNIT, UNIT) is UNIT
    (a,) = atoms(3)
    assert product(UNIT, a, Atom(1)) is a
    empty, whole = cut(a, [0, 3])
    assert empty.size == 0
    assert whole is a
    with pytest.raises(ValueError, match="at least one"):
        concat(empty)


def test_terms_print_what_they_became() -> None:
    a, b, c = atoms(6, 2, 3)
    unify(a, product(b, c))
    freeze(c, Reason("why", "conv"))
    assert repr(a) == "Product(Atom(2), Frozen(3))"
    assert repr(concat(b, c)) == "Concat(Atom(2), Frozen(3))"
    assert repr(c.frozen) == "why (at conv)"
