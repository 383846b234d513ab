"""Runs the code of a Markdown file: every fenced `python` block, in order, in one namespace.

    python -m tests.markdown README.md

A block that prints and is followed by an indented block must print that; `...` or `…` stands for anything.
A block whose first line is a comment with a file's name, such as `# graphprune.toml`, is written to that
file in the working directory instead. Of `console` blocks, the lines `$ graphprune …` are run, and what
stands below them is compared in the same way.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import linecache
import re
import shlex
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n(?:\n((?:(?: {4}[^\n]*)?\n)+))?", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"#\s*([\w-]+\.\w+)\s*$")
_CHECKER = doctest.OutputChecker()
_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.DONT_ACCEPT_BLANKLINE


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its code, its first line's number, and the output written below it."""

    language: str
    code: str
    line: int
    output: str

    @property
    def file(self) -> str:
        """The name of the file it shows, or nothing."""
        match = _FILE.match(self.code.partition("\n")[0])
        return match[1] if match else ""


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text.

    >>> [block] = blocks("a\\n```python\\nprint(1)\\n```\\n\\n    1\\n")
    >>> block.language, block.code, block.line, block.output
    ('python', 'print(1)\\n', 3, '1\\n')
    """
    for match in _FENCE.finditer(text):
        output = textwrap.dedent(match[3] or "").strip("\n")
        line = text.count("\n", 0, match.start()) + 2
        yield Block(match[1], match[2], line, output + "\n" if output else "")


def run(path: Path) -> None:
    """Run what the module says; raises AssertionError with the line where an output differs."""
    module = types.ModuleType(f"markdown_{path.stem.replace('-', '_').lower()}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    for block in blocks(path.read_text()):
        where = f"{path.name}:{block.line}"
        if block.file:
            Path(block.file).write_text(block.code)
        elif block.language == "python":
            name = f"<{where}>"
            linecache.cache[name] = (len(block.code), None, block.code.splitlines(True), name)
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block.code, name, "exec"), vars(module))
            if block.output:
                _compare(where, block.output, printed.getvalue())
        elif block.language == "console":
            _console(where, block.code)


def _console(where: str, code: str) -> None:
    for part in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
        command, _, wanted = part.partition("\n")
        if not command.startswith("graphprune "):
            continue
        program = str(Path(sys.executable).with_name("graphprune"))
        done = subprocess.run(
            [program, *shlex.split(command)[1:]], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise AssertionError(f"{where}: $ {command}\nended with {done.returncode}: {done.stderr}")
        if wanted.strip():
            _compare(f"{where}: $ {command}", wanted, done.stdout)


def _compare(where: str, wanted: str, printed: str) -> None:
    wanted = wanted.replace("…", "...")
    if not _CHECKER.check_output(wanted, printed, _OPTIONS):
        example = doctest.Example("", wanted)
        raise AssertionError(f"{where}\n{_CHECKER.output_difference(example, printed, _OPTIONS)}")


if __name__ == "__main__":
    run(Path(sys.argv[1]).resolve())
