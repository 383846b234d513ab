"""Every form a model source can take, and what is said when it leads nowhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphprune.errors import MissingExtraError, SourceError
from graphprune.frontend import sources
from graphprune.frontend.sources import RANDOM_WEIGHTS, load_object, resolve

NETS = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
    def forward(self, x):
        return self.linear(x)

def make():
    return Net()

def pair():
    return Net(), torch.ones(1, 3)

def program():
    return torch.export.export(Net(), (torch.ones(1, 3),))

def fails():
    raise RuntimeError("no checkpoint")

def number():
    return 7

ready = Net()
batches = [torch.ones(1, 3)]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A directory with a module of its own name for each test, because imported modules stay imported."""
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / f"nets_{request.node.name.split('[')[0]}.py").write_text(NETS)
    return tmp_path


def module_in(place: Path) -> str:
    return next(place.glob("nets_*.py")).stem


def test_callables_classes_and_objects(place: Path) -> None:
    module = module_in(place)
    for name in ("make", "Net", "ready"):
        source = resolve(f"{module}:{name}", place)
        assert isinstance(source.model, nn.Module)
        assert source.example_inputs is None
        assert source.notes == ()
    assert resolve(f"{module}:pair", place).example_inputs.shape == (1, 3)
    assert isinstance(resolve(f"{module}:program", place).model, torch.export.ExportedProgram)


def test_a_python_file(place: Path) -> None:
    assert isinstance(resolve(f"{module_in(place)}.py:make", place).model, nn.Module)


def test_an_object_that_is_not_a_model(place: Path) -> None:
    assert len(load_object(f"{module_in(place)}:batches", place)) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("maek", "has no attribute 'maek' .did you mean 'make'"),
        ("fails", r"fails failed at .*nets_.*\.py:21: RuntimeError: no checkpoint"),
        ("number", "gives int; it must give an nn.Module"),
    ],
)
def test_what_does_not_lead_to_a_model(place: Path, name: str, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        resolve(f"{module_in(place)}:{name}", place)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import torch\nimport not_there_at_all\n", r"does not import at .*broken_0\.py:2: No module named"),
        ("x = 1\nraise ValueError('why')\n", r"does not import at .*broken_1\.py:2: ValueError: why"),
        ("def (:\n", r"does not import at .*broken_2\.py:1: SyntaxError"),
    ],
)
def test_a_module_that_does_not_import(
    place: Path, body: str, words: str, request: pytest.FixtureRequest
) -> None:
    name = f"broken_{words.split('broken_')[1][0]}"
    (place / f"{name}.py").write_text(body)
    with pytest.raises(SourceError, match=words):
        resolve(f"{name}:model", place)
    with pytest.raises(SourceError, match=words):
        resolve(f"{name}.py:model", place)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("absent_module:model", "there is no module 'absent_module' in"),
        ("absent.py:model", r"there is no file .*absent\.py"),
        ("absent.pt2", r"there is no file .*absent\.pt2"),
        ("weights.pth", "holds weights, not a model"),
        ("resnet18", "module:callable, FILE.pt2, timm:NAME"),
        ("module:", "cannot read the source"),
        ("build", "is an artifact, not a model; use: graphprune inspect build"),
    ],
)
def test_texts_that_lead_nowhere(place: Path, text: str, words: str) -> None:
    (place / "build").mkdir()
    (place / "build" / "manifest.json").write_text("{}")
    with pytest.raises(SourceError, match=words):
        resolve(text, place)


def test_an_exported_program(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),))
    torch.export.save(program, tmp_path / "model.pt2")
    model = resolve("model.pt2", tmp_path).model
    assert isinstance(model, torch.export.ExportedProgram)
    assert model.example_inputs is not None


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"not a zip")
    with pytest.raises(SourceError, match=r"model\.pt2 is not a program saved with torch\.export\.save"):
        resolve("model.pt2", tmp_path)


@pytest.mark.parametrize(
    ("text", "package", "extra"),
    [
        ("timm:resnet18", "timm", "vision"),
        ("torchvision:resnet18", "torchvision", "vision"),
        ("transformers:bert", "transformers", "text"),
    ],
)
def test_a_missing_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, text: str, package: str, extra: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        sources.importlib.util, "find_spec", lambda name, *a: None if name == package else found(name, *a)
    )
    with pytest.raises(MissingExtraError, match=rf"pip install 'graphprune\[{extra}\]'"):
        resolve(text)


@pytest.mark.network
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "name"), [("timm", "resnet10t"), ("torchvision", "squeezenet1_1")])
def test_vision_libraries(kind: str, name: str) -> None:
    pytest.importorskip(kind)
    source = resolve(f"{kind}:{name}")
    assert isinstance(source.model, nn.Module)
    assert source.notes == (RANDOM_WEIGHTS,)
    with pytest.raises(SourceError, match=rf"{kind} has no model '{name}x' \(did you mean"):
        resolve(f"{kind}:{name}x")


@pytest.mark.network
@pytest.mark.filterwarnings("ignore")
def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {
        "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16,
    }  # fmt: skip
    model = transformers.BertForMaskedLM(transformers.BertConfig(**small)).eval()
    model.save_pretrained(tmp_path / "bert")
    source = resolve("transformers:bert", tmp_path)
    assert type(source.model) is type(model)
    assert source.notes == ()
    for name, value in source.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    (tmp_path / "bert" / "model.safetensors").unlink()
    assert "weights are random" in resolve("transformers:bert", tmp_path).notes[0]
    (tmp_path / "bert" / "config.json").unlink()
    with pytest.raises(SourceError, match=r"holds no config\.json"):
        resolve("transformers:bert", tmp_path)
    with pytest.raises(SourceError, match="no model 'brt'"):
        resolve("transformers:brt", tmp_path)
