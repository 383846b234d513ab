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
from graphprune.textual import make_pass


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


@given(st.lists(st.integers(0, 99) | st.from_regex(r"[0-9]{1,2}(\.[0-9]{1,2}){1,2}", fullmatch=True)))
def test_numbers_are_names_where_names_are_asked_for(numbers: list[int | str]) -> None:
    """Modules of an ``nn.Sequential`` are called by numbers, and ``1.10`` is not ``1.1``."""
    wanted = Options(some_names=tuple(map(str, numbers)))
    pipeline = Pipeline.parse(f"test-options{{some-names=[{' '.join(map(str, numbers))}]}}")
    assert pipeline == Pipeline((wanted,))
    assert Pipeline.parse(str(pipeline)) == pipeline
    quoted = [number if isinstance(number, int) else str(number) for number in numbers]
    assert make_pass("test-options", {"some-names": quoted}) == wanted


@pytest.mark.parametrize("name", ["0", "1.10", "true", "none", "a", "a.b"])
def test_one_name_is_a_list_of_one_and_a_word_is_a_word(name: str) -> None:
    pipeline = Pipeline.parse(f"test-options{{some-names={name} word={name}}}")
    assert pipeline == Pipeline((Options(some_names=(name,), word=name),))
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert make_pass("test-options", {"some-names": name}) == Options(some_names=(name,))


@pytest.mark.parametrize("value", [1.1, True, None])
def test_what_is_no_name(value: object) -> None:
    """Of a recipe, where ``1.10`` without quotes has become another number already."""
    for given_value in (value, [value]):
        with pytest.raises(
            RecipeError, match=r"some-names takes names, and .* is none; if it is one, quote it"
        ):
            make_pass("test-options", {"some-names": given_value})


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
