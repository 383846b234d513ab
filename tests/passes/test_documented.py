"""``docs/passes.md`` has every pass that comes with graphprune, and every option of each."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from graphprune.registry import passes

PAGE = (Path(__file__).parents[2] / "docs" / "passes.md").read_text()


@pytest.mark.parametrize("name", passes.builtin)
def test_every_pass_and_option_is_on_the_page(name: str) -> None:
    kind = passes.load(name)
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| [`{name}`]"))
    _, _, exact, trains, options, _ = (cell.strip() for cell in row.split("|"))
    assert exact == ("yes" if kind.exact else "no")
    assert trains == ("no" if "trainable" in kind.destroys else "yes")
    assert options.replace("`", "").split() == [field.name.replace("_", "-") for field in fields(kind)]
    section = PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]
    for field in fields(kind):
        assert f"`{field.name.replace('_', '-')}`" in section
