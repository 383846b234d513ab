"""The snippets of docs/ci.md run: on an artifact that holds its limits, and on one that does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tests import markdown

PAGE = Path(__file__).parents[1] / "docs" / "ci.md"
BLOCKS = list(markdown.blocks(PAGE.read_text()))
OTHER = "torch.manual_seed(1)"  # another network: it agrees with the first by chance only


def environment(**more: str) -> dict[str, str]:
    """That of a shell in which ``graphprune`` is this checkout's."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def shell(place: Path, command: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", command], cwd=place, env=environment(**more), capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project as the page's first blocks leave it: source, samples, ``good`` and ``model``."""
    place = tmp_path_factory.mktemp("ci")
    done = subprocess.run(
        [sys.executable, "-m", "tests.markdown", str(PAGE)], cwd=place, capture_output=True, text=True,
        env=environment(PYTHONPATH=str(PAGE.parents[1])), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def project(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "project"))


def spoil(project: Path) -> None:
    """Another network under the same name."""
    source = project / "nets.py"
    text = source.read_text()
    assert "torch.manual_seed(0)" in text
    source.write_text(text.replace("torch.manual_seed(0)", OTHER))


def failures(junit: Path) -> list[str]:
    cases = ElementTree.parse(junit).getroot().iter("testcase")
    return [case.attrib["name"] for case in cases if case.find("failure") is not None]


def commands(document: Any) -> list[str]:
    """The shell commands of a GitHub workflow or a GitLab file, without those that install."""
    found: list[str] = []
    if isinstance(document, dict):
        found = [command for value in document.values() for command in commands(value)]
        script = document.get("script", [])
        found += [document["run"]] if "run" in document else script
    elif isinstance(document, list):
        found = [command for value in document for command in commands(value)]
    return [command for command in found if not command.startswith("pip install")]


def test_the_yaml_files_run_the_script_and_report_what_it_writes() -> None:
    github, gitlab = (yaml.safe_load(block.code) for block in BLOCKS if block.language == "yaml")
    assert commands(github) == commands(gitlab) == ["sh check.sh"]
    [upload] = [s for s in github["jobs"]["check"]["steps"] if "upload" in s.get("uses", "")]
    [script] = [block.code for block in BLOCKS if block.file == "check.sh"]
    for report in (gitlab["check"]["artifacts"]["reports"]["junit"], "build/check.json"):
        assert report in script
        assert Path(report).match(upload["with"]["path"])


def test_the_script_passes_and_fails(project: Path) -> None:
    done = shell(project, "sh check.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    assert failures(project / "build" / "check.xml") == []
    spoil(project)
    done = shell(project, "sh check.sh")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "broken: min-agreement: " in done.stdout
    assert failures(project / "build" / "check.xml") == ["min-agreement"]


def test_the_cmake_file_builds_and_tests(project: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    done = shell(project, "cmake -B out && cmake --build out")
    assert done.returncode == 0, done.stdout + done.stderr
    done = shell(project, "ctest --test-dir out --output-on-failure")
    assert done.returncode == 0, done.stdout + done.stderr
    assert failures(project / "out" / "check.xml") == []
    (project / "good" / "model.onnx").write_text("version https://git-lfs.github.com/spec/v1")
    done = shell(project, "ctest --test-dir out --output-on-failure")
    assert done.returncode != 0
    assert "good/model.onnx was altered" in done.stdout


def test_the_script_for_bazel_runs_in_a_forest_of_links(project: Path, tmp_path: Path) -> None:
    forest, scratch = tmp_path / "forest", tmp_path / "scratch"
    scratch.mkdir()
    for name in ("model", "good"):
        (forest / name).mkdir(parents=True)
        for file in (project / name).iterdir():
            (forest / name / file.name).symlink_to(file)
    for name in ("samples.npz", "check_model.sh"):
        (forest / name).symlink_to(project / name)
    junit = tmp_path / "test.xml"
    done = shell(forest, "sh check_model.sh", TEST_TMPDIR=str(scratch), XML_OUTPUT_FILE=str(junit))
    assert done.returncode == 0, done.stdout + done.stderr
    assert failures(junit) == []
    [rules] = [block.code for block in BLOCKS if block.language == "starlark"]
    assert all(f'"{file.name}"' in rules for file in (project / "model").iterdir())
