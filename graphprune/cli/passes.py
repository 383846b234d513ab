"""``graphprune passes``: what there is to write into a pipeline."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

from .console import Debug, Json, print_json, print_tables


def passes(json: Json = False, debug: Debug = False) -> None:
    """List every pass with its options, defaults and first line of documentation."""
    found = describe_passes()
    if json:
        print_json(found)
        return
    from ..report.sections import Section

    rows = tuple(
        (
            entry["name"],
            "exact" if entry["exact"] else "approximate",
            " ".join(f"{name}={value}" for name, value in entry["options"].items()),
            entry["summary"],
        )
        for entry in found
    )
    print_tables([Section("passes", ("name", "outputs", "options", "what it does"), rows)])


def describe_passes() -> list[dict[str, Any]]:
    """Name, exactness, options with their defaults in textual form, and summary of every registered pass."""
    from ..registry import passes as registry

    found = []
    for name in registry.entries:
        kind = registry.load(name)
        found.append({
            "name": name,
            "exact": kind.exact,
            "options": {f.name.replace("_", "-"): _default(f) for f in fields(kind)},
            "summary": (kind.__doc__ or "").strip().partition("\n")[0],
        })  # fmt: skip
    return found


def _default(option: Field[Any]) -> str:
    from ..textual import print_value

    if option.default is not MISSING:
        return print_value(option.default)
    return print_value(option.default_factory()) if option.default_factory is not MISSING else "(required)"
