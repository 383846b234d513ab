"""Results as files: one Markdown table for readers, the same rows as JSON, and what they were measured on."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; every column but the first is aligned right.

    >>> print(table(["name", "ms"], [["a", 1.5]]))
    | name | ms |
    |:--|--:|
    | a | 1.5 |
    """
    lines = [f"| {' | '.join(head)} |", f"|:--|{'--:|' * (len(head) - 1)}"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def conditions(packages: Sequence[str] = ("torch",)) -> dict[str, str]:
    """Date, host, load and versions: what a figure needs beside it to be believed."""
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "host": f"{platform.machine()}, {os.cpu_count()} cores",
        "load average over 1, 5 and 15 minutes": ", ".join(f"{v:.1f}" for v in os.getloadavg()),
        "python": platform.python_version(),
    }
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write(name: str, title: str, body: str, rows: Any, facts: dict[str, str]) -> Path:
    """:func:`page` of a module of :mod:`benchmarks.axes`; its files are ``axes-NAME``."""
    return page(RESULTS / f"axes-{name}.md", f"axes.{name}", title, body, rows, facts)


def page(path: Path, module: str, title: str, body: str, rows: Any, facts: dict[str, str]) -> Path:
    """Write the Markdown file ``path``, and the rows beside it as JSON; returns ``path``.

    Args:
        path: ``*.md``; its folder is made.
        module: of :mod:`benchmarks`, for the line that says how to write it again.
        title: of the page.
        body: Markdown behind the conditions.
        rows: anything that JSON or ``asdict`` takes.
        facts: :func:`conditions`, and what else a reader should know.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    about = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    path.write_text(
        f"# {title}\n\nWritten by `python -m benchmarks.{module}`.\n\n{about}\n\n{body.rstrip()}\n"
    )
    plain = {"conditions": facts, "rows": rows}
    path.with_suffix(".json").write_text(json.dumps(plain, indent=1, default=_plain) + "\n")
    return path


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} does not go into JSON")
