"""The documentation is true: its code runs and prints what it says, its links and commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.pruning import readme as pruning
from benchmarks.readme import find
from benchmarks.runtime import readme as runtime
from tests import markdown

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
ELSEWHERE = {"ci.md"}  # test_ci_docs.py runs it, and goes on from what it leaves
RUN = [
    page
    for page in PAGES
    if page.name not in ELSEWHERE
    and any(b.language in ("python", "console") for b in markdown.blocks(page.read_text()))
]


def execute(page: Path, place: Path) -> subprocess.CompletedProcess[str]:
    """Run a page in a process of its own: what one registers must not be there for the next."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, "-m", "tests.markdown", str(page)],
        cwd=place, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_there_are_pages_that_run() -> None:
    assert {"README.md", "axes.md", "writing-passes.md"} <= {page.name for page in RUN}


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    done = execute(page, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```python\nprint(2)\n```\n\n    3\n", r"page\.md:2"),
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", r"page\.md:6"),
        ("```console\n$ graphprune inspect nowhere:nothing\n```\n", "ended with 3"),
        ("```console\n$ graphprune passes\nno such pass\n```\n", r"graphprune passes"),
    ],
)
def test_a_page_that_is_wrong_fails(text: str, complaint: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    done = execute(page, tmp_path)
    assert done.returncode == 1
    assert re.search(complaint, done.stderr)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_named_exist(page: Path) -> None:
    """`make x` in backquotes or a block is a target of the Makefile; modules and scripts exist."""
    text = page.read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:`|^ {4}|^\$ )make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, f"{page.name} names make {target}"
    for module in re.findall(r"python -m (benchmarks[\w.]*)", text):
        place = ROOT / module.replace(".", "/")
        assert (place / "__main__.py").is_file() or place.with_suffix(".py").is_file(), module
    for script in re.findall(r"python ((?:examples|docs)/[\w/]+\.py)", text):
        assert (ROOT / script).is_file(), f"{page.name} names {script}"


@pytest.mark.parametrize(("name", "part"), [("runtime", runtime), ("pruning", pruning)])
def test_the_figures_of_the_readme_are_those_of_the_results(name: str, part: ModuleType) -> None:
    """`python -m benchmarks.runtime --readme`, and the same of `pruning`, bring them together again."""
    found = find((ROOT / "README.md").read_text(), name)
    assert found
    assert found == part.section()
