"""What the backend tests share: a lowered and opened graph in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune.backend import Lowered
from graphprune.graph import Graph
from graphprune.registry import backends
from graphprune.target import get


@dataclass
class Opened:
    """A captured model beside its artifact. Calling it takes the model's arguments."""

    model: torch.nn.Module
    graph: Graph
    lowered: Lowered
    runner: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        signature = self.graph.signature
        return signature.unflatten(self.runner(*signature.flatten(args, kwargs)))

    def matches(self, *args: Any, relative: float = 1e-5, **kwargs: Any) -> None:
        """The artifact's result is the original's, in structure, dtype, shape and value."""
        with torch.no_grad():
            wanted = self.model(*args, **kwargs)
        same(self(*args, **kwargs), wanted, relative)


def same(found: Any, wanted: Any, relative: float) -> None:
    """Compare nested results; tensors relative to their largest magnitude."""
    assert type(found) is type(wanted)
    if isinstance(wanted, Mapping):
        assert list(found) == list(wanted)
        for key in wanted:
            same(found[key], wanted[key], relative)
    elif isinstance(wanted, (tuple, list)):
        assert len(found) == len(wanted)
        for left, right in zip(found, wanted, strict=True):
            same(left, right, relative)
    elif isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        scale = float(wanted.double().abs().max()) if wanted.numel() else 1.0
        assert float((found.double() - wanted.double()).abs().max()) <= relative * max(scale, 1e-30)
    else:
        assert found == wanted


class Everything(nn.Module):
    """Outputs of every kind: computed, an input, a buffer, twice the same, a size, a constant, ``None``.

    Its inputs are called like a parameter and like an output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("table", torch.randn(3))

    def forward(self, weight: torch.Tensor, output: torch.Tensor) -> dict[str, Any]:
        y = self.linear(weight) * self.weight
        return {"weight": y, "input": weight, "table": self.table, "pair": (y, output + 1),
                "size": weight.shape[0], "flag": True, "nothing": None}  # fmt: skip


def convolutional() -> nn.Module:
    torch.manual_seed(1)
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, groups=4), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 5),
    )  # fmt: skip
    for name, value in body.named_buffers():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 2) if name.endswith("var") else nn.init.normal_(value)
    return body.eval()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def runtime() -> str:
    """The backend that ``opened`` lowers with; a module of another one overrides it."""
    return "onnxruntime"


@pytest.fixture
def opened(runtime: str) -> Callable[..., Opened]:
    """``opened(model, *args, dynamic=False, target="cpu", threads=None, **kwargs)``."""

    def make(
        model: torch.nn.Module, *args: Any, dynamic: bool = False, target: str = "cpu",
        threads: int | None = None, **kwargs: Any,
    ) -> Opened:  # fmt: skip
        model = model.eval()
        graph = graphprune.trace(model, args, kwargs, dynamic_batch=dynamic)
        backend = backends.load(runtime)()
        lowered = backend.lower(graph, get(target))
        runner = backend.open(lowered.files, lowered.inputs, lowered.outputs, get(target), threads)
        return Opened(model, graph, lowered, runner)

    return make
