"""Example inputs for a model that was given none.

What a model says of itself comes first (the configuration of transformers, the ``pretrained_cfg`` of
timm, the ``example_input_array`` of Lightning; see :mod:`~graphprune.frontend.declared_inputs`), then the
first layer that fixes a shape. A guess counts only when the model runs on it; the run happens in evaluation
mode on a fixed seed, and leaves modes, buffers and random state as they were.

>>> import torch
>>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 2))
>>> inferred = infer(model)
>>> inferred.args[0].shape, inferred.reason
(torch.Size([1, 6]), "[1, 6] float32, from layer '1', Linear(in_features=6, ...)")
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import InputError

# Sides tried for a layer that fixes channels but not extent: the usual one first, then what a
# flattening head may insist on.
SIDES = {
    1: (1024, 16000, 512, 256, 128, 100, 64, 32, 16, 8),
    2: (224, 256, 32, 28, 64, 128, 384, 299, 48, 96, 112, 160, 192, 320, 416, 448, 512, 16, 8),
    3: (32, 64, 16, 112, 8),
}
SMALL_SIDES = (7, 8, 16, 32, 4, 64)  # for transposed convolutions, which enlarge what they get
TOKENS = 16
LAYERS = 3  # how many shape-fixing layers are tried before giving up


@dataclass(frozen=True)
class Inferred:
    """An example call that the model ran on, and where it comes from (for the report)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class Candidate:
    """A call worth trying. ``source`` says what it was derived from."""

    source: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampler:
    """Deterministic random tensors in the dtype and on the device of a model's parameters."""

    dtype: torch.dtype
    device: torch.device
    seed: int = 0

    @staticmethod
    def of(model: nn.Module) -> Sampler:
        """What the first floating-point tensor of ``model`` asks for."""
        tensors = [*model.parameters(), *model.buffers()]
        for value in tensors:
            if value.is_floating_point():
                return Sampler(value.dtype, value.device)
        return Sampler(torch.get_default_dtype(), tensors[0].device if tensors else torch.device("cpu"))

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal values of ``shape``."""
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed))
        return values.to(device=self.device, dtype=self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Integers in ``[low, high)`` as int64."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(low, max(high, low + 1), shape, generator=generator).to(self.device)


def infer(model: nn.Module) -> Inferred:
    """An example call for ``model``: the first candidate that it runs on.

    Raises:
        InputError: nothing fits; names the parameters of ``forward`` and what was tried.
    """
    from .declared_inputs import declared

    sampler = Sampler.of(model)
    failures: list[str] = []
    for candidate in [*declared(model, sampler)]:
        error = attempt(model, candidate.args, candidate.kwargs)
        if error is None:
            return _inferred(candidate)
        failures.append(f"{_describe(candidate)}: {error}")
    required = required_parameters(model)
    if len(required) <= 1:
        for candidate in layer_candidates(model, sampler):
            error = attempt(model, candidate.args, candidate.kwargs)
            if error is None:
                return _inferred(candidate)
            failures.append(f"{_describe(candidate)}: {error}")
    raise InputError(_complaint(model, required, failures))


def attempt(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Run the model once without leaving a trace; what it said when it failed, ``None`` when it ran."""
    try:
        with undisturbed(model):
            model(*args, **kwargs)
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"
    return None


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes, buffers and random state are as before afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers()]
    devices = {t.device for t in [*model.parameters(), *model.buffers()] if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)), torch.no_grad():
        torch.manual_seed(0)
        try:
            # The attribute, not eval(): overriding train() is common, and may change more than a flag.
            for module, _ in modes:
                module.training = False
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)


def required_parameters(model: nn.Module) -> list[str]:
    """The names of ``forward``'s parameters that have no default."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is inspect.Parameter.empty and p.kind not in variable
    ]


def layer_candidates(model: nn.Module, sampler: Sampler) -> Iterator[Candidate]:
    """Inputs for the first layers, in registration order, that fix a shape."""
    if not inspect.signature(model.forward).parameters:
        yield Candidate("a forward without parameters")
    found = 0
    for name, layer in model.named_modules():
        rule = next((rule for kinds, rule in _RULES if isinstance(layer, kinds)), None)
        if rule is None:
            continue
        found += 1
        for key, tensor in rule(layer, sampler):
            where = f"layer {name!r}, " if name else ""
            yield Candidate(f"{where}{type(layer).__name__}({key}={getattr(layer, key)}, ...)", (tensor,))
        if found == LAYERS:
            return


Shapes = Iterator[tuple[str, torch.Tensor]]


def _convolution(layer: Any, sampler: Sampler) -> Shapes:
    rank = layer.weight.dim() - 2
    for side in SMALL_SIDES if layer.transposed else SIDES[rank]:
        yield "in_channels", sampler.normal(1, layer.in_channels, *[side] * rank)


def _linear(layer: Any, sampler: Sampler) -> Shapes:
    yield "in_features", sampler.normal(1, layer.in_features)
    yield "in_features", sampler.normal(1, TOKENS, layer.in_features)


def _embedding(layer: Any, sampler: Sampler) -> Shapes:
    for length in (TOKENS, 8, 4, 1):
        yield "num_embeddings", sampler.integers(0, layer.num_embeddings, 1, length)
    yield "num_embeddings", sampler.integers(0, layer.num_embeddings, 1)


def _recurrent(layer: Any, sampler: Sampler) -> Shapes:
    shape = (1, TOKENS) if layer.batch_first else (TOKENS, 1)
    yield "input_size", sampler.normal(*shape, layer.input_size)


def _cell(layer: Any, sampler: Sampler) -> Shapes:
    yield "input_size", sampler.normal(1, layer.input_size)


def _attention(layer: Any, sampler: Sampler) -> Shapes:
    yield "embed_dim", sampler.normal(1, TOKENS, layer.embed_dim)


def _normalised(layer: Any, sampler: Sampler) -> Shapes:
    yield "normalized_shape", sampler.normal(1, *layer.normalized_shape)
    yield "normalized_shape", sampler.normal(1, TOKENS, *layer.normalized_shape)


def _channels(key: str, *ranks: int) -> Callable[[Any, Sampler], Shapes]:
    def rule(layer: Any, sampler: Sampler) -> Shapes:
        for rank in ranks:
            for side in SIDES[rank] if rank else (1,):
                yield key, sampler.normal(1, getattr(layer, key), *[side] * rank)

    return rule


_RULES: tuple[tuple[Any, Callable[[Any, Sampler], Shapes]], ...] = (
    (nn.modules.conv._ConvNd, _convolution),
    (nn.MultiheadAttention, _attention),
    (nn.Linear, _linear),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _cell),
    (nn.LayerNorm, _normalised),
    (nn.GroupNorm, _channels("num_channels", 2, 1)),
    ((nn.BatchNorm1d, nn.InstanceNorm1d), _channels("num_features", 0, 1)),
    ((nn.BatchNorm2d, nn.InstanceNorm2d), _channels("num_features", 2)),
    ((nn.BatchNorm3d, nn.InstanceNorm3d), _channels("num_features", 3)),
)


def _inferred(candidate: Candidate) -> Inferred:
    return Inferred(candidate.args, candidate.kwargs, _describe(candidate))


def _describe(candidate: Candidate) -> str:
    """``input_ids [1, 16] int64, from the configuration of BertModel``."""
    parts = []
    call = [*((None, a) for a in candidate.args), *candidate.kwargs.items()]
    for name, value in call:
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, torch.Tensor):
                text = f"{list(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
            else:
                text = repr(leaf)
            parts.append(f"{name} {text}" if name else text)
    return f"{', '.join(parts) or 'no inputs'}, from {candidate.source}"


def _complaint(model: nn.Module, required: list[str], failures: list[str]) -> str:
    names = list(inspect.signature(model.forward).parameters)
    text = f"cannot infer example inputs for {type(model).__name__}"
    if len(required) > 1:
        text += f": its forward needs {len(required)} arguments"
    elif not failures:
        text += ": no layer of it fixes an input shape"
    if failures:
        shown = failures[:1] + (failures[-1:] if len(failures) > 1 else [])
        text += f": tried {len(failures)}, among them {'; '.join(shown)}"
    wanted = required or names
    call = ", ".join(wanted) + ("," if len(wanted) == 1 else "")
    return (
        f"{text}; pass example_inputs=({call}) or example_kwargs, as forward({', '.join(names)}) takes them"
    )
