"""Whole networks through `optimize`: their answers stay, their batch norms go, or are named with the reason.

The original in eager mode is the oracle. Networks of the libraries have random weights and batch norm
statistics that matter (see `tests.zoo.network.prepare`); three have real ones.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

import graphprune
from graphprune.backend import TensorSpec
from graphprune.errors import InputError
from tests import zoo

pytestmark = pytest.mark.network

TOLERANCE = 1e-4  # of the largest value of the reference

# An artifact computes what PyTorch does, whatever version of a library built the module.
warned_by_libraries = pytest.mark.filterwarnings("default")


@dataclass(frozen=True)
class Case:
    """What is expected of a network: its batch norms, and those which no operator can take, with the reason.

    `left` matches the names of the modules that stay; `because` every one of their notes.
    """

    name: str
    norms: int = 0
    remaining: int = 0
    left: str = "nothing stays"
    because: str = ""
    infers: bool = True


CASES = (
    Case("real_efficientnet_lite0", norms=49),
    # Convolution, ReLU, batch norm, pooling, then zero padding: the ReLU keeps the norm from the convolution
    # before it, the padding keeps its shift from the one behind. The last norm is not followed by padding.
    Case(
        "real_crepe_tiny", norms=6, remaining=5, left=r"conv[1-5]_BN",
        because=r"^reads relu.*pads with a constant that the shift would not reach$", infers=False,
    ),
    Case("real_minilm_l6", infers=False),
    Case("tv_resnet18", norms=20),
    Case("tv_mobilenet_v3_small", norms=34),
    Case("tv_shufflenet_v2_x0_5", norms=56),
    # A dense layer begins with batch norm and ReLU on features that later layers read as they are: neither
    # the features' makers can take the norm, nor, past the ReLU, its reader.
    Case(
        "tv_densenet121", norms=121, remaining=62,
        left=r"features\.(denseblock\d\.denselayer\d+\.norm1|transition\d\.norm|norm5)",
        because=r"is also read by .*feeds relu",
    ),
    Case("tv_swin_t"),
    Case("tv_vit_b_16"),
    Case("hf_bert"),
    Case("hf_bert_masked"),
    Case("hf_gpt2"),
    Case("hf_llama"),
    Case("hf_llama_grouped"),
    Case("hf_t5_encoder"),
)  # fmt: skip


def _paced(name: str) -> Any:
    """A parameter; a network that takes a third of a minute belongs to `make test-full`."""
    long = name in ("tv_swin_t", "tv_vit_b_16", "tv_densenet121")
    return pytest.param(name, marks=pytest.mark.slow) if long else name


DYNAMIC = ("tv_resnet18", "tv_shufflenet_v2_x0_5", "tv_swin_t", "real_minilm_l6", "hf_bert_masked", "hf_gpt2")


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The network with its example call; skips where a package it needs is not installed."""
    network = zoo.get(name)
    for package in network.requires:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{name} needs {package}")
    return network.build(), network.inputs(), network.kwargs()


def assert_same(found: Any, wanted: Any) -> None:
    """Equal structure, and tensors that agree to `TOLERANCE` of the largest wanted value."""
    one, other = tree_leaves(found), tree_leaves(wanted)
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        error = float((a - b).abs().max() / b.abs().max())
        assert error <= TOLERANCE, f"relative error {error:.1e}"


def eager(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model(*args, **kwargs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@warned_by_libraries
def test_answers_stay_and_batch_norms_go(case: Case) -> None:
    model, args, kwargs = build(case.name)
    names = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    assert len(names) == case.norms

    result = graphprune.optimize(model, args, example_kwargs=kwargs or None, measure=False)

    assert_same(result(*args, **kwargs), eager(model, args, kwargs))
    assert len(list(result.graph.find(torch.ops.aten.batch_norm.default))) == case.remaining
    exported = onnx.load_from_string(result.deployment.lowered.files["model.onnx"])
    assert sum(node.op_type == "BatchNormalization" for node in exported.graph.node) == case.remaining

    notes = [note for record in result.report.passes for note in record.notes if note.kind == "refused"]
    stayed = [match[1] for note in notes if (match := re.search(r"in module '([^']+)'", note.where))]
    assert sorted(stayed) == sorted(name for name in names if re.fullmatch(case.left, name))
    assert len(stayed) == case.remaining
    assert all(re.search(case.because, note.message) for note in notes)


@pytest.mark.parametrize("name", [_paced(name) for name in DYNAMIC])
@warned_by_libraries
def test_one_artifact_takes_any_batch(name: str) -> None:
    model, args, kwargs = build(name)
    result = graphprune.optimize(
        model, args, example_kwargs=kwargs or None, dynamic_batch=True, measure=False
    )
    for batch in (1, 7):
        some, named = tree_map(_of_size(batch), (args, kwargs))
        assert_same(result(*some, **named), eager(model, some, named))


def _of_size(batch: int) -> Callable[[Any], Any]:
    """Go round the samples until there are `batch` of them, each time shifted by one position."""

    def resize(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        rounds = [value.roll(shift, -1) for shift in range(1 + batch // len(value))]
        return torch.cat(rounds)[:batch]

    return resize


@pytest.mark.parametrize("name", [_paced(case.name) for case in CASES if case.infers])
@warned_by_libraries
def test_a_model_and_a_target_are_enough(name: str) -> None:
    model, _, _ = build(name)

    result = graphprune.optimize(model, target="arm")

    assert result.report.example_source.startswith("inferred: ")
    assert result.report.latency.artifact is None
    args = tuple(_sample(spec) for spec in result.report.inputs)
    keywords = dict(zip((spec.name for spec in result.report.inputs), args, strict=True))
    if "input_ids" in keywords:
        assert_same(result(**keywords, use_cache=False), eager(model, (), keywords | {"use_cache": False}))
    else:
        assert_same(result(*args), eager(model, args, {}))


def _sample(spec: TensorSpec) -> torch.Tensor:
    """Fresh values for an input: not those the network was compiled with."""
    generator = torch.Generator().manual_seed(11)
    shape = [int(size) for size in spec.shape]
    if spec.dtype == "int64":
        return torch.randint(3, 90, shape, generator=generator)
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("real_minilm_l6", r"needs 2 arguments; pass example_inputs=\(input_ids, attention_mask\)"),
        ("real_crepe_tiny", r"cannot infer example inputs for Crepe: tried \d+"),
    ],
)
@warned_by_libraries
def test_inputs_that_cannot_be_inferred_are_asked_for(name: str, advice: str) -> None:
    model, _, _ = build(name)
    with pytest.raises(InputError, match=advice):
        graphprune.optimize(model, target="arm")
