"""``graphprune inspect``: the axes as a table, as JSON, explained by name, and drawn to a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphprune.cli import main

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.norm(self.conv(x).relu().sum((2, 3))))

def net():
    return Net(), torch.zeros(1, 3, 8, 8)
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(MODEL)
    return f"{tmp_path / 'net.py'}:net"


def test_the_table_lists_prunable_axes_and_counts_the_rest(
    source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", source]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("conv.weight[0]"))
    assert "6  statistical  5: conv.weight[0] [6], conv.bias[0] [6], norm.weight[0] [6] and 2 more" in row
    assert "layer statistics run over it at layer_norm" in row
    assert "0 exact, 1 statistical," in out
    assert "head.weight[0]" not in out


def test_frozen_adds_the_others_with_their_reasons(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", source, "--frozen"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("head.weight[0]"))
    assert "frozen" in row
    assert "the caller sees it" in row


def test_no_axes_leaves_the_table_out(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", source, "--no-axes"]) == 0
    assert "statistical" not in capsys.readouterr().out


def test_json_has_every_member(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", source, "--json", "--frozen", "--explain", "conv"]) == 0
    found = json.loads(capsys.readouterr().out)
    axes = {a["name"]: a for a in found["axes"]["axes"]}
    assert axes["conv.weight[0]"]["members"][-1] == {"tensor": "head.weight", "dim": 1, "placement": "[6]"}
    assert axes["head.weight[0]"]["kind"] == "frozen"
    assert 0 < found["axes"]["coverage"] <= 1
    assert "conv.weight [6, 3, 3, 3]" in found["explanation"]


def test_explain_answers_one_question_only(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", source, "--explain", "head.weight"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("head.weight [4, 6]\n  dim 0: frozen at output: the caller sees it\n")
    assert "operators" not in out


def test_an_unknown_name_is_one_line_with_a_suggestion(
    source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", source, "--explain", "head.wieght"]) == 3
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "did you mean 'head.weight'" in error


@pytest.mark.parametrize("suffix", ["svg", "dot", "json"])
def test_draw_writes_the_file(source: str, suffix: str, tmp_path: Path) -> None:
    if suffix != "json":
        pytest.importorskip({"svg": "matplotlib", "dot": "pydot"}[suffix])
    path = tmp_path / f"axes.{suffix}"
    assert main(["inspect", source, "--draw", str(path)]) == 0
    text = path.read_text()
    assert "conv.weight[0]" in text
    assert "head.weight[0]" not in text
    assert main(["inspect", source, "--frozen", "--draw", str(path)]) == 0
    assert "head.weight[0]" in path.read_text()


def test_draw_refuses_another_format(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", source, "--draw", str(tmp_path / "axes.png")]) == 3
    assert ".svg" in capsys.readouterr().err
    assert not (tmp_path / "axes.png").exists()


def test_an_artifact_has_no_axes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert main(["inspect", str(tmp_path), "--explain", "conv"]) == 3
    assert "need a model" in capsys.readouterr().err
