"""The textual form of pipelines: what is printed parses back, and what does not parse says why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphprune import registry
from graphprune.errors import RecipeError
from graphprune.pipeline import Pass, Pipeline


@dataclass(frozen=True)
class Options(Pass):
    """A pass with a field of every kind."""

    name: ClassVar[str] = "test-options"
    count: int = 1
    ratio: float = 0.5
    flag: bool = False
    word: str = "taylor"
    maybe: int | None = None
    some_names: tuple[str, ...] = ()
    nested: tuple[Any, ...] = ()


@pytest.fixture(autouse=True)
def _register(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {**registry.passes.entries, "test-options": f"{__name__}:Options"}
    monkeypatch.setitem(registry.passes.__dict__, "entries", entries)


words = st.text(max_size=12)
scalars = st.one_of(
    st.integers(-(10**12), 10**12), st.floats(allow_nan=False), st.booleans(), st.none(), words
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)
passes = st.builds(
    Options,
    count=st.integers(),
    ratio=st.floats(allow_nan=False),
    flag=st.booleans(),
    word=words,
    maybe=st.none() | st.integers(),
    some_names=st.lists(words, max_size=3).map(tuple),
    nested=st.lists(values, max_size=3).map(tuple),
)


@given(st.lists(passes, max_size=3))
def test_what_is_printed_parses_back(steps: list[Options]) -> None:
    pipeline = Pipeline(tuple(steps))
    parsed = Pipeline.parse(str(pipeline))
    assert parsed == pipeline
    assert [type(v) for step in parsed for v in vars(step).values()] == [
        type(v) for step in pipeline for v in vars(step).values()
    ]
    assert str(parsed) == str(pipeline)


def test_printing_leaves_defaults_out() -> None:
    assert str(Options()) == "test-options"
    assert str(Options(some_names=("a", "b c"), flag=True)) == 'test-options{flag=true some-names=[a "b c"]}'


def test_blanks_do_not_matter() -> None:
    parsed = Pipeline.parse("  clean-up ,\n test-options { ratio = 0.25  some-names = [ a b ] } ")
    assert str(parsed) == "clean-up,test-options{ratio=0.25 some-names=[a b]}"


def test_underscores_are_taken_for_dashes() -> None:
    assert Pipeline.parse("test-options{some_names=[a]}") == Pipeline((Options(some_names=("a",)),))


def test_words_that_look_like_other_values_stay_words() -> None:
    for word in ("true", "none", "1", "1e5", "nan", "inf", "", "a,b", 'say "x"', "{", "é\n"):
        (step,) = Pipeline.parse(str(Options(word=word)))
        assert isinstance(step, Options)
        assert step.word == word


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clean_upp", r"unknown pass 'clean_upp' \(did you mean 'clean-up'\?\); known: clean-up, "),
        ("test-options{ration=1}", r"has no option 'ration' \(did you mean 'ratio'\?\); it has: count,"),
        ("clean-up{x=1}", "pass 'clean-up' has no option 'x'; it has: none"),
        ("clean-up,", "ends with a comma"),
        ("clean-up clean-up", "expected ',' at position 8, found 'clean-up'"),
        ("test-options{ratio}", "expected '=' at position"),
        ("test-options{ratio=", "expected word or string at position 19, found 'the end'"),
        ("test-options{ratio=1", "expected word at position"),
        ("test-options{ratio=1 ratio=2}", "option 'ratio' of 'test-options' given twice"),
        ("test-options{word=[a}", "expected word or string"),
        ('test-options{word="a}', "cannot read"),
        ("{x=1}", "expected word at position 0"),
    ],
)  # fmt: skip
def test_errors_say_where(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Pipeline.parse(text)


def test_an_empty_text_is_an_empty_pipeline() -> None:
    assert Pipeline.parse("") == Pipeline(())
    assert str(Pipeline(())) == ""
