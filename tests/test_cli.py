"""The commands: what goes to standard output, what to standard error, and that ``--json`` is only JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import graphprune
from graphprune import versions
from graphprune.cli import app, main
from graphprune.contents import read
from graphprune.errors import GraphpruneError
from graphprune.registry import passes

NETS = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8, 4)
    def forward(self, x):
        print("a library that prints")
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))

def small():
    torch.manual_seed(0)
    return Net(), torch.randn(1, 3, 8, 8)

def batches():
    return [torch.randn(1, 3, 8, 8)]

def score(model):
    return 1.0
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and two artifacts of it."""
    directory = tmp_path_factory.mktemp("project")
    (directory / "cli_nets.py").write_text(NETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert main(["optimize", "cli_nets:small", "--out", "build", "--no-measure"]) == 0
        assert main(["optimize", "cli_nets:small", "--out", "open", "--no-measure", "--dynamic-batch",
                     "--pipeline", "clean-up"]) == 0  # fmt: skip
    return directory


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_optimize_writes_the_artifact_and_the_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["optimize", "cli_nets:small", "--out", "again", "--threads", "1", "--backend", "onnxruntime"])
        == 0
    )
    output = capsys.readouterr()
    assert "artifact against original" in output.out
    assert "original, eager" in output.out
    assert output.out.splitlines()[-1] == f"artifact: {here / 'again'}"
    assert "pass fold-batch-norm" in output.err.splitlines()
    assert "\x1b" not in output.out + output.err
    assert main(["optimize", "cli_nets:small", "--out", "again", "--no-measure"]) == 8
    assert main(["optimize", "cli_nets:small", "--out", "again", "--no-measure", "--overwrite"]) == 0
    graphprune.load(here / "again")


def test_optimize_compressed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimize", "cli_nets:small", "--out", "packed", "--no-measure", "--compress", "zstd"]) == 0
    graphprune.load(here / "packed" / "artifact.gpz")
    capsys.readouterr()
    assert main(["optimize", "cli_nets:small", "--out", "other", "--no-measure", "--compress", "gzip"]) != 0
    output = capsys.readouterr()
    assert "'gzip' is not known; give 'zstd'" in output.err
    assert "capture" not in output.err
    assert not (here / "other").exists()


def test_optimize_json_is_only_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "optimize", "cli_nets:small", "--no-measure")
    assert report["out"] is None
    assert report["certificates"]["artifact against original"]["passed"]
    assert report["example_source"] == "given"


def test_a_recipe_with_flags_over_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = here / "recipes"
    folder.mkdir()
    (folder / "recipe_nets.py").write_text(NETS)
    (folder / "graphprune.toml").write_text(
        'source = "recipe_nets:small"\nout = "from_recipe"\npipeline = "clean-up"\nmeasure = false\n'
        'calibration = "recipe_nets:batches"\nevaluate = "recipe_nets:score"\ndynamic-batch = true\n'
    )
    flags = ["--recipe", "recipes/graphprune.toml", "--pipeline", "fold-batch-norm", "--fixed-batch"]
    report = run_json(capsys, "optimize", *flags)
    assert report["out"] == str(folder / "from_recipe")
    assert report["pipeline"] == "fold-batch-norm"
    assert report["inputs"][0]["shape"] == [1, 3, 8, 8]
    assert graphprune.load(folder / "from_recipe").manifest["pipeline"] == "fold-batch-norm"


CUDA = "CUDAExecutionProvider"


@pytest.mark.parametrize("recipe", [False, True])
def test_execution_providers(here: Path, capsys: pytest.CaptureFixture[str], recipe: bool) -> None:
    arguments = ["cli_nets:small", "--providers", f"{CUDA}, CPUExecutionProvider", "--backend", "onnxruntime"]
    if recipe:
        (here / "providers.toml").write_text(
            f'source = "cli_nets:small"\nproviders = ["{CUDA}", "CPUExecutionProvider"]\n'
            'backend = "onnxruntime"\n'
        )
        arguments = ["--recipe", "providers.toml"]
    place = f"provided-{recipe}"
    assert main(["optimize", *arguments, "--target", "x86", "--no-measure", "--out", place]) == 0
    assert f"{CUDA} is not in this onnxruntime" in " ".join(capsys.readouterr().out.split())
    kept = read(here / place).target
    assert (kept.name, kept.providers) == ("x86", (CUDA, "CPUExecutionProvider"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--providers", "CudaExecutionProvider"], f"did you mean '{CUDA}'?"),
        (["--providers", "CPU"], "did you mean 'CPUExecutionProvider'?"),
        (["--providers", "CPUExecutionProvider,FooProvider"], "'FooProvider'; here are "),
        (["--providers", ""], "names no execution provider"),
        (
            ["--providers", CUDA, "--backend", "openvino,tvm"],
            "ONNX Runtime's, and the backend is openvino,tvm",
        ),
    ],
)
@pytest.mark.usefixtures("here")
def test_execution_providers_are_checked_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    assert main(["optimize", "cli_nets:small", *options]) == 3
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("error: ")
    assert "Js" not in error


def test_a_budget_prunes_and_a_dry_run_only_shows_it(
    here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    common = [
        "optimize",
        "cli_nets:small",
        "--calibration",
        "cli_nets:batches",
        "--macs",
        "0.6",
        "--no-measure",
    ]
    assert main([*common, "--dry-run", "--json", "--out", str(tmp_path / "none")]) == 0
    plan = graphprune.Plan.from_json(capsys.readouterr().out)
    assert plan.after["macs"] <= 0.6 * plan.before["macs"]
    assert not (tmp_path / "none").exists()
    assert main([*common, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [p["pass"] for p in report["passes"]][:2] == ["prune-channels{macs=0.6}", "repair"]
    assert main([*common, "--pipeline", "clean-up"]) == 3
    assert "both a pipeline and a budget" in capsys.readouterr().err


def test_notes_of_the_source_are_in_the_report(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import nn

    from graphprune.frontend import sources

    random = sources.Source(nn.Linear(3, 2), None, (sources.RANDOM_WEIGHTS,))
    monkeypatch.setattr(sources, "resolve", lambda *_: random)
    assert main(["optimize", "timm:x", "--no-measure", "--input", "2x3"]) == 0
    out = capsys.readouterr().out
    assert "weights are random" in out
    assert "float32[2, 3]" in out


def test_inspect_a_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "cli_nets:small", "--graph"]) == 0
    out = capsys.readouterr().out
    for part in ("x: f32[1, 3, 8, 8]", "conv2d", "parameters", "276", "return (linear,)"):
        assert part in out
    found = run_json(capsys, "inspect", "cli_nets:small")
    assert found["operators"][0] == {"operator": "conv2d", "count": 1, "macs": 7776}
    assert found["cost"]["parameters"] == 276
    assert "graph" not in found


def test_inspect_an_artifact(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "build"]) == 0
    out = capsys.readouterr().out
    assert "what the runtime executes" in out
    assert "x: float32[1, 3, 8, 8]" in out
    found = run_json(capsys, "inspect", "build")
    assert found["manifest"]["backend"] == "onnxruntime"
    assert found["audit"]["operators"]


def test_passes_lists_every_pass_with_its_options(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {entry["name"]: entry for entry in run_json(capsys, "passes")}
    assert set(found) == set(passes.entries)
    assert found["fold-constants"]["options"] == {"max-bytes": "1048576"}
    assert all(entry["summary"] for entry in found.values())
    assert main(["passes"]) == 0
    assert "fold-constants" in capsys.readouterr().out


def test_bench_against_another(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "bench", "open", "--against", "build", "--rounds", "2", "--threads", "1")
    assert set(found["timings"]) == {"open", "build"}
    assert found["timings"]["open"]["rounds"] == 2
    assert found["speedup"]["build"]["median"] > 0
    assert found["batch"] == 1
    assert found["notes"] == []


def test_bench_says_what_is_otherwise_here(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "installed", lambda package: "1.0.0")
    assert main(["bench", "open", "--batch", "2", "--rounds", "1", "--threads", "1"]) == 0
    output = capsys.readouterr().out
    assert "batch 2, threads: 1" in output
    assert "note: open: it opens here, although it was built with onnxruntime" in output


@pytest.mark.parametrize("arguments", [["build"], ["open", "--against", "build"], ["build", "--json"]])
def test_bench_refuses_a_batch_that_nothing_would_be_called_with(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(["bench", *arguments, "--batch", "7"]) == 3
    output = capsys.readouterr()
    assert output.out == ""
    assert "build is fixed at batch 1 and has no open size" in output.err


def test_bench_of_two_calls_both_with_one_batch(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from graphprune.cli.bench import _batch

    two = graphprune.optimize(torch.nn.Flatten(), torch.ones(2, 3), measure=False, pipeline="clean-up")
    two.save(here / "two")
    one, both, free = (graphprune.load(name) for name in ("build", "two", "open"))
    assert _batch({"two": both}, None) == _batch({"open": free, "two": both}, None) == 2
    assert _batch({"two": both, "open": free}, 2) == 2
    assert _batch({"open": free}, None) == _batch({"build": one}, 1) == 1
    assert main(["bench", "build", "--against", "two"]) == 3
    assert "build at batch 1 and two at batch 2 are fixed" in capsys.readouterr().err


def test_bench_fills_open_dimensions(here: Path) -> None:
    from graphprune.cli.bench import _call

    assert _call("open", 3, 1)()[0].shape == (3, 4)


def test_bench_of_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "absent"]) == 8
    assert "absent is not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["optimize", "--tread", "3"], ["frobnicate"], ["bench"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", [[], ["optimize"], ["inspect"], ["passes"], ["bench"]])
def test_help_lists_the_exit_codes(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "6 verification" in " ".join(result.stdout.split())


def test_every_exit_code_is_documented() -> None:
    from graphprune import errors
    from graphprune.cli.console import EXIT_CODES

    codes = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, GraphpruneError)
    }
    documentation = (Path(__file__).parents[1] / "docs" / "cli.md").read_text()
    for code in codes | {0, 2, 70, 130, 141}:
        assert f"| {code} |" in documentation
    for code in codes:
        assert f" {code} " in EXIT_CODES


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"graphprune {graphprune.__version__}\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import sys; from graphprune.cli import main; sys.exit(main(['passes', '--json']))"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == ""
    child.stderr.close()
    assert child.wait() == 141
