"""Unusual and bad models, inputs and places, through Python and through the command line."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import graphprune
from graphprune import atomic
from graphprune.cli import main
from graphprune.errors import ArtifactError, CaptureError, InputError


def fast(model: Any, *args: Any, **options: Any) -> graphprune.Result:
    return graphprune.optimize(model, *args, **{"measure": False, **options})


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # the line an error has to show
            return self.linear(x)
        return self.linear(-x)


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if text in line)


def test_a_model_that_cannot_be_captured_shows_the_users_own_line() -> None:
    line = line_of("the line an error has to show")
    with pytest.raises(CaptureError, match=rf"Branching at .*test_bad_input\.py:{line}: .*torch\.where"):
        fast(Branching(), torch.ones(1, 3))


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=r"does not run on these example inputs.*cannot be multiplied"):
        fast(nn.Linear(3, 2), torch.ones(1, 4))


def test_a_string_is_no_input_and_a_function_no_model() -> None:
    with pytest.raises(InputError, match="got str"):
        fast("model.pt", torch.ones(1, 4))
    with pytest.raises(InputError, match=r"wrap a function in an nn\.Module"):
        fast(lambda x: x, torch.ones(1, 4))
    with pytest.raises(InputError, match="must be a tensor, a tuple"):
        fast(nn.Linear(3, 2), 7)


def test_an_empty_batch() -> None:
    with pytest.raises(InputError, match=r"is empty \(shape \(0, 3\)\); give at least one sample"):
        fast(nn.Linear(3, 2), torch.ones(0, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_named(bad: float) -> None:
    last = nn.Linear(4, 2)
    nn.init.constant_(last.weight, bad)
    model = nn.Sequential(nn.Linear(3, 4), last)
    with pytest.raises(InputError, match=r"1\.weight"):
        fast(model, torch.ones(1, 3))


def test_weights_without_values() -> None:
    with pytest.raises(InputError, match="meta device"):
        fast(nn.Linear(3, 2, device="meta"), torch.ones(1, 3, device="meta"))


class Everything(nn.Module):
    """Integer, boolean, float, nested and keyword inputs; nested outputs with a constant among them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, *, extra: dict[str, Any], scale: float = 2.0
    ) -> dict[str, Any]:
        hidden = self.embedding(ids) * mask.unsqueeze(-1) * scale
        left, right = extra["pair"]
        return {"hidden": hidden, "sums": (left + right, [left - right]), "none": None}


def test_nested_inputs_and_outputs() -> None:
    model = Everything().train()
    args = (torch.randint(0, 10, (1, 5)), torch.ones(1, 5, dtype=torch.bool))
    kwargs = {"extra": {"pair": (torch.randn(1, 2), torch.randn(1, 2))}}
    result = fast(model, args, example_kwargs=kwargs)
    assert model.training
    ids, mask = torch.randint(0, 10, (1, 5)), torch.tensor([[True, False, True, True, False]])
    pair = (torch.randn(1, 2), torch.randn(1, 2))
    wanted = model(ids, mask, extra={"pair": pair})
    for found in (result(ids, mask, extra={"pair": pair}), result.module(ids, mask, extra={"pair": pair})):
        assert found["none"] is None
        assert isinstance(found["sums"][1], list)
        torch.testing.assert_close(found["hidden"], wanted["hidden"])
        torch.testing.assert_close(found["sums"][0], wanted["sums"][0])
        torch.testing.assert_close(found["sums"][1][0], wanted["sums"][1][0])
    with pytest.raises(InputError, match="captured without argument 'scale'"):
        result(ids, mask, extra={"pair": pair}, scale=3.0)
    with pytest.raises(InputError, match="missing argument 'extra'"):
        result(ids, mask)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def test_a_named_tuple_comes_back() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> Pair:
            return Pair(x + 1, x * 2)

    found = fast(Two(), torch.ones(2, 3))(torch.zeros(2, 3))
    assert isinstance(found, Pair)
    torch.testing.assert_close(found.first, torch.ones(2, 3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids))


def test_tied_weights_stay_tied() -> None:
    model = Tied()
    ids = torch.tensor([[1, 2, 5]])
    result = fast(model, ids)
    module = result.module
    assert module.get_parameter("head.weight") is module.get_parameter("embedding.weight")
    assert result.report.final.parameters == 24
    torch.testing.assert_close(result(ids), model(ids))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 5e-2)])
def test_other_precisions(dtype: torch.dtype, tolerance: float) -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)
    x = torch.randn(2, 3, dtype=dtype)
    result = fast(model, x)
    found = result(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, model(x), rtol=tolerance, atol=tolerance)
    assert result.module(x).dtype == dtype


def test_a_directory_that_is_not_an_artifact_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    result = fast(nn.Linear(3, 2))
    with pytest.raises(ArtifactError, match="not an artifact"):
        result.save(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"file"):
        fast(nn.Linear(3, 2)).save(tmp_path / "file" / "build")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    result = fast(nn.Linear(3, 2))
    monkeypatch.setattr(atomic, "write", full)
    with pytest.raises(ArtifactError, match=r"cannot write the artifact .*build: No space left on device"):
        result.save(tmp_path / "build")
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize(
    ("threads", "words"),
    [
        (0, "at least 1, got 0"),
        ("2", "a whole number, or None for the runtime's default, got '2'"),
        (1.5, "a whole number.* got 1.5"),
        (True, "a whole number.* got True"),
        (10**6, "at most .* on this host, which has .* cores, got 1000000"),
    ],
)
def test_threads_that_no_runtime_is_given(tmp_path: Path, threads: Any, words: str) -> None:
    from graphprune import gates, proof
    from graphprune.latency.tuning import tune

    built = fast(nn.Linear(3, 2), torch.ones(1, 3)).save(tmp_path / "build")
    ways: list[Callable[[], Any]] = [
        lambda: fast(nn.Linear(3, 2), torch.ones(1, 3), threads=threads),
        lambda: graphprune.load(built, threads),
        lambda: gates.check(built, threads=threads),
        lambda: proof.prove(built, threads=threads),
        lambda: proof.prove(built, threads=threads, emulate=True),
        lambda: tune(nn.Linear(3, 2), torch.ones(1, 3), threads=threads),
    ]
    for way in ways:
        with pytest.raises(InputError, match=f"threads must be {words}"):
            way()


def test_threads_are_any_whole_number(tmp_path: Path) -> None:
    assert fast(nn.Linear(3, 2), torch.ones(1, 3), threads=np.int64(2))(torch.ones(1, 3)).shape == (1, 2)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad_nets.py").write_text(
        "import torch\n"
        "class Branching(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x + 1 if x.sum() > 0 else x\n"
        "def branching():\n"
        "    return Branching(), torch.ones(1, 3)\n"
        "def infinite():\n"
        "    model = torch.nn.Linear(3, 2)\n"
        "    torch.nn.init.constant_(model.bias, float('inf'))\n"
        "    return model\n"
        "def unfit():\n"
        "    return torch.nn.Linear(3, 2), torch.ones(1, 4)\n"
        "def empty():\n"
        "    return torch.nn.Linear(3, 2), torch.ones(0, 3)\n"
        "def fine():\n"
        "    return torch.nn.Linear(3, 2)\n"
        "def defect():\n"
        "    return torch.nn.Linear(3, 2)\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["bad_nets:branching"], 4, "bad_nets.py:4"),
        (["bad_nets:infinite"], 3, "NaN or infinity: bias"),
        (["bad_nets:unfit"], 3, "shapes cannot be multiplied"),
        (["bad_nets:empty"], 3, "is empty"),
        (["bad_nets:fine", "--input", "1x4"], 3, "shapes cannot be multiplied"),
        (["bad_nets:fine", "--input", "1y4"], 3, "write [NAME=]SHAPE[:DTYPE]"),
        (["bad_nets:fine", "--input", "1x3:flaot32"], 3, "did you mean 'float32'"),
        (["bad_nets:fine", "--target", "x68"], 3, "did you mean 'x86'"),
        (["bad_nets:fine", "--pipeline", "clean-up{"], 3, "expected word"),
        (["bad_nets:fine", "--out", "bad_nets.py", "--no-measure"], 8, "is a file"),
        (["no_such_module:model"], 3, "there is no module 'no_such_module'"),
        (["nonsense"], 3, "module:callable, FILE.pt2"),
        ([], 3, "give a SOURCE"),
    ],
)
@pytest.mark.usefixtures("project")
def test_one_line_and_an_exit_code(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["optimize", *arguments]) == code
    output = capsys.readouterr()
    assert output.out == ""
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert output.err.splitlines()[-1] == errors[0]


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("build", "holds an artifact already; give another directory or --overwrite"),
        ("bad_nets.py", "is a file; give a directory"),
        ("mine", "is not empty and not an artifact"),
        (".", "the working directory"),
        ("bad_nets.py/below/build", "cannot write the artifact"),
        ("/proc/build/deep", "cannot write the artifact /proc/build/deep"),
    ],
)
@pytest.mark.parametrize("recipe", [False, True])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_loaded(
    project: Path, out: str, words: str, recipe: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if out == "build":
        fast(nn.Linear(3, 2)).save("build")
    (project / "mine").mkdir()
    (project / "mine" / "thesis.tex").write_text("years")
    (project / "graphprune.toml").write_text(f'source = "bad_nets:fine"\nout = "{out}"\n')
    before = sorted(project.rglob("*"))
    arguments = ["--recipe", "graphprune.toml"] if recipe else ["bad_nets:fine", "--out", out]
    assert main(["optimize", *arguments]) == 8
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
    assert sorted(project.rglob("*")) == before


def test_too_many_threads_are_refused_before_anything_is_loaded(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast(nn.Linear(3, 2)).save("build")
    (project / "graphprune.toml").write_text('source = "bad_nets:fine"\nthreads = 100000\n')
    many = ["--threads", "100000"]
    for command in (["optimize", "bad_nets:fine", *many], ["optimize", "--recipe", "graphprune.toml"],
                    ["tune", "bad_nets:fine", *many], ["bench", "build", *many],
                    ["verify", "build", *many]):  # fmt: skip
        assert main(command) == 3
        error = capsys.readouterr().err
        assert error.startswith("error: threads must be at most")
        assert error.count("\n") == 1
    assert main(["check", "build", "--max-bytes", "1MB", *many]) == 2
    assert capsys.readouterr().err.startswith("error: threads must be at most")


def test_a_corrupt_artifact(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast(nn.Linear(3, 2)).save(project / "build")
    with (project / "build" / "model.onnx").open("ab") as file:
        file.write(b"x")
    for command in ("inspect", "bench"):
        assert main([command, "build"]) == 8
        assert "model.onnx was altered" in capsys.readouterr().err
    with pytest.raises(ArtifactError, match="was altered"):
        graphprune.load(project / "build")


def test_a_defect_is_said_to_be_one(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import graphprune.api

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(graphprune.api, "optimize", broken)
    assert main(["optimize", "bad_nets:defect"]) == 70
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ZeroDivisionError: two lines; this is a defect in graphprune")
    assert main(["optimize", "bad_nets:defect", "--debug"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_ends_with_130(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import graphprune.api

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(graphprune.api, "optimize", interrupted)
    assert main(["optimize", "bad_nets:fine"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
