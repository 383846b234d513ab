"""The textual form of a pipeline: ``clean-up,prune-channels{macs=0.5 importance=taylor}``.

Grammar: passes separated by commas; options in braces, separated by blanks, ``name=value``. Option
names are the dataclass fields with ``-`` for ``_``. Values are numbers, ``true``, ``false``, ``none``,
bare words, ``"quoted strings"`` or lists ``[a b c]``. Where an option takes text, a bare word is text
whatever it looks like, and where it takes names, one alone is a list: ``ignored=[0 1.10]``, ``ignored=0``.
Whatever is printed parses back to an equal pipeline.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import Field, fields
from typing import Any

from .errors import RecipeError, suggestion
from .pipeline import Pass

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<symbol>[{}=,\[\]])|(?P<word>[^\s{}=,\[\]"]+))"""
)
_WORDS = {"true": True, "false": False, "none": None}
_NAMES = ("tuple[str, ...]", tuple[str, ...])  # the type of a field, as text where annotations are text
_TEXT = ("str", str, *_NAMES)
_BARE = re.compile(r"[A-Za-z_*0-9][\w.*/:-]*")


def parse_pipeline(text: str) -> list[Pass]:
    """The passes a text names.

    Raises:
        RecipeError: with the position, or the nearest known name.
    """
    reader = _Reader(text)
    passes: list[Pass] = []
    while not reader.done:
        passes.append(_parse_pass(reader))
        if not reader.done:
            reader.expect(",")
            if reader.done:
                raise RecipeError(f"pipeline {text!r} ends with a comma; name another pass or drop it")
    return passes


def make_pass(name: str, options: dict[str, Any]) -> Pass:
    """The pass called ``name`` with options by textual name; also what recipes and flags go through."""
    from .registry import passes

    kind = passes.load(name)
    known = _options(kind)
    arguments = {}
    for option, value in options.items():
        option = option.replace("_", "-")
        if option not in known:
            raise RecipeError(
                f"pass {name!r} has no option {option!r}{suggestion(option, known)}; "
                f"it has: {', '.join(known) or 'none'}"
            )
        field = known[option]
        value = tuple(value) if isinstance(value, list) else value
        arguments[field.name] = _names(name, option, value) if field.type in _NAMES else value
    try:
        return kind(**arguments)
    except TypeError as error:
        raise RecipeError(f"pass {name!r}: {error}") from error


def _options(kind: Any) -> dict[str, Field[Any]]:
    """The fields of a pass by the names that they have as text."""
    return {field.name.replace("_", "-"): field for field in fields(kind)}


def _names(name: str, option: str, value: Any) -> tuple[Any, ...]:
    """Names, of which one may be given alone, and those of an ``nn.Sequential`` as whole numbers."""
    values = value if isinstance(value, tuple) else (value,)
    for one in values:
        if one is None or isinstance(one, (bool, float)):
            raise RecipeError(
                f"pass {name!r}: {option} takes names, and {print_value(one)} is none; if it is one, quote it"
            )
    return tuple(str(one) if isinstance(one, int) else one for one in values)


def print_pass(step: Pass) -> str:
    """The textual form of one pass, with the options that differ from their defaults."""
    options = " ".join(f"{k.replace('_', '-')}={print_value(v)}" for k, v in step.options().items())
    return f"{step.name}{{{options}}}" if options else step.name


class _Reader:
    def __init__(self, text: str):
        self.text, self.at = text, 0
        self.tokens = list(self._split())

    def _split(self) -> Iterator[tuple[str, str, int]]:
        position = 0
        end = len(self.text.rstrip())
        while position < end:
            match = _TOKEN.match(self.text, position)
            if match is None:
                raise RecipeError(f"pipeline {self.text!r}: cannot read {self.text[position:]!r}")
            yield str(match.lastgroup), match[str(match.lastgroup)], match.start()
            position = match.end()

    @property
    def done(self) -> bool:
        return self.at >= len(self.tokens)

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.at][:2] if not self.done else ("end", "")

    def take(self, *kinds: str) -> tuple[str, str]:
        kind, value = self.peek()
        if kind not in kinds:
            at = self.tokens[self.at][2] if not self.done else len(self.text)
            raise RecipeError(
                f"pipeline {self.text!r}: expected {' or '.join(kinds)} at position {at}, "
                f"found {value or 'the end'!r}"
            )
        self.at += 1
        return kind, value

    def expect(self, symbol: str) -> None:
        kind, value = self.peek()
        if value != symbol or kind != "symbol":
            at = self.tokens[self.at][2] if not self.done else len(self.text)
            raise RecipeError(
                f"pipeline {self.text!r}: expected {symbol!r} at position {at}, found {value or 'the end'!r}"
            )
        self.at += 1


def _parse_pass(reader: _Reader) -> Pass:
    from .registry import passes

    _, name = reader.take("word")
    known = _options(passes.load(name))
    options: dict[str, Any] = {}
    if reader.peek() == ("symbol", "{"):
        reader.expect("{")
        while reader.peek() != ("symbol", "}"):
            _, option = reader.take("word")
            reader.expect("=")
            if option in options:
                raise RecipeError(f"pipeline {reader.text!r}: option {option!r} of {name!r} given twice")
            field = known.get(option.replace("_", "-"))
            options[option] = _parse_value(reader, text=field is not None and field.type in _TEXT)
        reader.expect("}")
    return make_pass(name, options)


def _parse_value(reader: _Reader, text: bool) -> Any:
    """A value; ``text`` leaves bare words as they are."""
    if reader.peek() == ("symbol", "["):
        reader.expect("[")
        values = []
        while reader.peek() != ("symbol", "]"):
            values.append(_parse_value(reader, text))
        reader.expect("]")
        return tuple(values)
    kind, word = reader.take("word", "string")
    if kind == "string":
        return json.loads(word)
    if text:
        return word
    if word in _WORDS:
        return _WORDS[word]
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            continue
    return word


def print_value(value: Any) -> str:
    """The textual form of an option's value."""
    if isinstance(value, (tuple, list)):
        return f"[{' '.join(map(print_value, value))}]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        bare = _BARE.fullmatch(value) and value not in _WORDS and not _is_number(value)
        return value if bare else json.dumps(value)
    if callable(value):  # from Python only: shown, never read back, and without an address
        return f"<{getattr(value, '__qualname__', type(value).__qualname__)}>"
    return repr(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
