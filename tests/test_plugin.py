"""The example plugin: built, installed beside graphprune, found by name, its own tests run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graphprune import registry
from graphprune.errors import RecipeError
from graphprune.registry import Registry

PLUGIN = Path(__file__).parent.parent / "examples" / "plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the plugin installed in it, from a copy of its source and without a network."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("pip is not installed here")
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(PLUGIN, source)
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
               "--no-index", "--disable-pip-version-check", "--target", str(target), str(source)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def fresh() -> Registry:
    """The registry of passes as a new process would see it."""
    return Registry("pass", "graphprune.passes", registry.passes.builtin)


def test_its_own_tests_pass_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    tests = shutil.copytree(PLUGIN / "tests", tmp_path / "tests")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c",
         os.devnull, "--doctest-modules", str(tests), str(installed / "graphprune_merge_activations")],
        env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 passed" in done.stdout


def test_it_loads_when_it_is_named(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "merge-activations" not in fresh().entries
    monkeypatch.syspath_prepend(str(installed))
    passes = fresh()
    assert passes.entries["merge-activations"] == "graphprune_merge_activations:MergeActivations"
    assert "graphprune_merge_activations" not in sys.modules
    try:
        assert passes.load("merge-activations").name == "merge-activations"
    finally:
        sys.modules.pop("graphprune_merge_activations", None)


def test_a_name_that_is_taken_is_an_error(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clash = tmp_path / "site"
    shutil.copytree(installed, clash)
    (entries,) = clash.glob("*.dist-info/entry_points.txt")
    entries.write_text(entries.read_text().replace("merge-activations =", "clean-up ="))
    monkeypatch.syspath_prepend(str(clash))
    with pytest.raises(RecipeError, match=r"two passes are called 'clean-up': .* uninstall or rename one"):
        fresh().load("clean-up")
