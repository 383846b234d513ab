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
BAR_WIDTH = 24  # columns of the longest bar
_EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")


def plain(report: Report) -> str:
    """The tables as text without control codes."""
    return plain_sections(sections(report))


def plain_sections(tables: Iterable[Section]) -> str:
    """Titled tables as text without control codes, at the width of the terminal if there is one."""
    buffer = io.StringIO()
    width = None if sys.stdout.isatty() else LOG_WIDTH
    console = Console(file=buffer, force_terminal=False, color_system=None, width=width)
    console.print(_group(tables, blocks=False))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def show(report: Report, file: TextIO | None = None) -> None:
    """Write the tables to ``file``."""
    show_sections(sections(report), file)


def show_sections(tables: Iterable[Section], file: TextIO | None = None) -> None:
    """Write titled tables to ``file`` (default: standard output)."""
    file = file or sys.stdout
    console = Console(file=file, width=None if file.isatty() else LOG_WIDTH)
    if console.is_terminal:
        console.print(_group(tables, blocks=not console.options.ascii_only))
    else:
        file.write(plain_sections(tables) + "\n")


def bar(share: float, blocks: bool) -> str:
    """A bar of ``share`` (0 to 1) of :data:`BAR_WIDTH`: in block characters, to an eighth, or in ASCII.

    >>> bar(0.5, blocks=False), bar(0.5, blocks=True), bar(1 / 192, blocks=True)
    ('############', '████████████', '▏')
    """
    if not blocks:
        return "#" * round(share * BAR_WIDTH)
    whole, eighths = divmod(round(share * BAR_WIDTH * len(_EIGHTHS)), len(_EIGHTHS))
    return "█" * whole + _EIGHTHS[eighths]


def _group(tables: Iterable[Section], blocks: bool) -> Group:
    parts: list[Table | str] = []
    for section in tables:
        parts += [_table(section, blocks), ""]
    return Group(*parts)


def _table(section: Section, blocks: bool) -> Table:
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
    if section.bars:
        table.add_column("", no_wrap=True, min_width=BAR_WIDTH)
    for index, row in enumerate(section.rows):
        drawn = [bar(section.bars[index], blocks)] if section.bars else []
        table.add_row(*map(Text, [*row, *drawn]), style=_STYLES[section.tone(index)])
    return table
