"""A report for terminals and logs: the same aligned columns, in colour only where a terminal can show it."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .sections import Section, sections
from .values import Report

_STYLES = {"": "", "warning": "yellow", "error": "bold red"}
LOG_WIDTH = 160  # columns where nothing says how wide the reader's window is


def plain(report: Report) -> str:
    """The tables as text without control codes."""
    return plain_sections(sections(report))


def plain_sections(tables: Iterable[Section]) -> str:
    """Titled tables as text without control codes, at the width of the terminal if there is one."""
    buffer = io.StringIO()
    width = None if sys.stdout.isatty() else LOG_WIDTH
    console = Console(file=buffer, force_terminal=False, color_system=None, width=width)
    console.print(_group(tables))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def show(report: Report, file: TextIO | None = None) -> None:
    """Write the tables to ``file``."""
    show_sections(sections(report), file)


def show_sections(tables: Iterable[Section], file: TextIO | None = None) -> None:
    """Write titled tables to ``file`` (default: standard output)."""
    file = file or sys.stdout
    console = Console(file=file, width=None if file.isatty() else LOG_WIDTH)
    if console.is_terminal:
        console.print(_group(tables))
    else:
        file.write(plain_sections(tables) + "\n")


def _group(tables: Iterable[Section]) -> Group:
    parts: list[Table | str] = []
    for section in tables:
        parts += [_table(section), ""]
    return Group(*parts)


def _table(section: Section) -> Table:
    # Without a box the columns are plain ASCII, which every log and code page can hold.
    has_header = any(section.columns)
    table = Table(
        box=None, padding=(0, 2, 0, 0), show_header=has_header, header_style="bold",
        title=Text(section.title, style="bold underline"), title_justify="left",
        caption=section.caption or None, caption_justify="left",
    )  # fmt: skip
    for index, column in enumerate(section.columns):
        right = index in section.numeric
        table.add_column(Text(column), justify="right" if right else "left", no_wrap=right, overflow="fold")
    for index, row in enumerate(section.rows):
        table.add_row(*map(Text, row), style=_STYLES[section.tone(index)])
    return table
