"""The registry: lazy, extensible, and never silently shadowed."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from graphprune import registry
from graphprune.errors import RecipeError
from graphprune.pipeline import Pass
from graphprune.registry import Registry


def with_entry_points(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> Registry:
    found = [EntryPoint(name, value, "graphprune.passes") for name, value in points]
    monkeypatch.setattr(registry, "entry_points", lambda group: found if group == "graphprune.passes" else [])
    return Registry("pass", "graphprune.passes", {"clean-up": "graphprune.passes.clean_up:CleanUp"})


@pytest.mark.parametrize("name", registry.passes.builtin)
def test_every_builtin_loads_under_its_own_name(name: str) -> None:
    kind = registry.passes.load(name)
    assert issubclass(kind, Pass)
    assert kind.name == name
    assert kind().options() == {}
    assert kind.__doc__


def test_plugins_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = with_entry_points(monkeypatch, ("mine", "graphprune.passes.clean_up:CleanUp"))
    assert list(mine.entries) == ["clean-up", "mine"]
    assert mine.load("mine").name == "clean-up"


def test_a_clash_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = with_entry_points(monkeypatch, ("clean-up", "other.package:CleanUp"))
    with pytest.raises(RecipeError, match="two passes are called 'clean-up'"):
        mine.load("clean-up")
    two = with_entry_points(monkeypatch, ("x", "a:A"), ("x", "b:B"))
    with pytest.raises(RecipeError, match="'x': a:A and b:B; uninstall or rename one"):
        _ = two.entries


def test_the_same_entry_point_seen_twice_is_no_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "x" in with_entry_points(monkeypatch, ("x", "a:A"), ("x", "a:A")).entries


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"unknown pass 'fold-bn' \(did you mean 'fold-batch-norm'\?\)"):
        registry.passes.load("fold-bn")


@pytest.mark.parametrize("value", ["no_such_package:X", "graphprune.passes.clean_up:NoSuchPass"])
def test_what_does_not_import_says_where_from(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    mine = with_entry_points(monkeypatch, ("broken", value))
    with pytest.raises(RecipeError, match=f"pass 'broken' does not load from {value}"):
        mine.load("broken")


def test_naming_the_passes_imports_none() -> None:
    code = (
        "import sys; from graphprune.registry import passes, backends; passes.entries, backends.entries; "
        "sys.exit(any(m.startswith(('graphprune.passes.', 'graphprune.backends.')) for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
