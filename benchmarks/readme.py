"""Tables of results that stand in the readme, each between two marks of its name.

`tests/test_docs.py` holds the readme to them, so no figure there is older than the results.
"""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def marked(name: str, content: str) -> str:
    """A section as it belongs into the readme."""
    return f"<!-- {name} -->\n{content}\n<!-- end of {name} -->\n"


def find(text: str, name: str) -> str:
    """The section of a name as it stands in a text, or nothing."""
    match = _pattern(name).search(text)
    return match[0] if match else ""


def update(name: str, section: str) -> None:
    """Put a section in place of the readme's."""
    text = README.read_text()
    if not find(text, name):
        raise ValueError(f"{README} has no line '<!-- {name} -->' with its end; add both where it belongs")
    README.write_text(_pattern(name).sub(lambda _: section, text, count=1))


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(f"<!-- {name} -->\n.*?<!-- end of {name} -->\n", re.DOTALL)
