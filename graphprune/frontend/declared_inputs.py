"""Example inputs from what a model declares about itself; recognised by attribute, nothing is imported.

* transformers: ``main_input_name`` and ``config`` (vocabulary, image size, mel bins), then ``dummy_inputs``;
* timm: ``pretrained_cfg`` or ``default_cfg`` with ``input_size``;
* Lightning: ``example_input_array``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .inputs import TOKENS, Candidate, Sampler

# Sub-configurations of composed models, in the order they are asked.
_PARTS = ("text_config", "vision_config", "audio_config", "encoder", "decoder", "backbone_config")
_MODALITIES = ("input_ids", "pixel_values", "input_values", "input_features")
_SAMPLES = 16_000  # one second of sound at the rate speech models are trained on


def declared(model: nn.Module, sampler: Sampler) -> Iterator[Candidate]:
    """Candidates from the model's own declarations, the most telling first."""
    yield from _lightning(model, sampler)
    yield from _transformers(model, sampler)
    yield from _timm(model, sampler)


def _lightning(model: nn.Module, sampler: Sampler) -> Iterator[Candidate]:
    array = getattr(model, "example_input_array", None)
    if array is None:
        return
    array = pytree.tree_map(
        lambda leaf: leaf.to(sampler.device) if isinstance(leaf, torch.Tensor) else leaf, array
    )
    source = "its example_input_array"
    if isinstance(array, Mapping):
        yield Candidate(source, (), dict(array))
    elif isinstance(array, (tuple, list)):
        yield Candidate(source, tuple(array))
    else:
        yield Candidate(source, (array,))


def _timm(model: nn.Module, sampler: Sampler) -> Iterator[Candidate]:
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        settings = vars(settings)
    size = settings.get("input_size")
    if not size:
        return
    channels = _first_channels(model) or size[0]
    # A model built for another size than its pretrained weights says so in its patch embedding.
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if built:
        yield Candidate("its patch embedding's img_size", (sampler.normal(1, channels, *built),))
    yield Candidate("its pretrained_cfg's input_size", (sampler.normal(1, channels, *size[1:]),))


def _first_channels(model: nn.Module) -> int | None:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return first.in_channels if first is not None else None


def _transformers(model: nn.Module, sampler: Sampler) -> Iterator[Candidate]:
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not isinstance(main, str):
        return
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    fixed: list[dict[str, Any]] = [{}]
    if "use_cache" in parameters or (open_ended and _setting(config, "use_cache") is not None):
        fixed.insert(0, {"use_cache": False})  # a cache in the outputs is of no use to one call
    source = f"the configuration of {type(model).__name__}"
    names = [main]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        names.append("decoder_input_ids")
    several = [n for n in _MODALITIES if n in parameters]
    combinations = [names] + ([several] if set(several) - set(names) else [])
    for wanted in combinations:
        for call in _calls(wanted, config, sampler):
            for constants in fixed:
                yield Candidate(source, (), {**call, **constants})
    yield from _dummies(model, config, sampler, fixed[0])


def _calls(names: list[str], config: Any, sampler: Sampler) -> Iterator[dict[str, Any]]:
    """Keyword calls over ``names``: the first choice for every one, then the alternatives of the first."""
    choices = [list(_values(name, config, sampler)) for name in names]
    if not all(choices):
        return
    for first in choices[0]:
        yield {names[0]: first, **{n: c[0] for n, c in zip(names[1:], choices[1:], strict=True)}}


def _values(name: str, config: Any, sampler: Sampler) -> Iterator[torch.Tensor]:
    if name in ("input_ids", "decoder_input_ids"):
        yield from _token_ids(config, sampler)
    elif name == "pixel_values":
        yield from _pixels(config, sampler)
    elif name == "input_values" and _setting(config, "num_mel_bins") is None:
        yield from (sampler.normal(1, samples) for samples in (_SAMPLES, 4_000))
    elif name in ("input_values", "input_features"):
        yield from _spectra(config, sampler)


def _token_ids(config: Any, sampler: Sampler) -> Iterator[torch.Tensor]:
    """``[1, tokens]`` ids of the model's own vocabulary, ending with its end-of-text token."""
    vocabulary = _setting(config, "vocab_size")
    if not isinstance(vocabulary, int):
        return
    special = {_setting(config, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    ordinary = [i for i in range(min(vocabulary, 64)) if i not in special] or [0]
    low = max(ordinary[0], min(5, vocabulary - 1))
    end = _setting(config, "eos_token_id")
    for length in (TOKENS, 8, 4):
        ids = sampler.integers(low, vocabulary, 1, length)
        for token in special:
            if isinstance(token, int):
                ids = torch.where(ids == token, ordinary[-1], ids)
        if isinstance(end, int) and 0 <= end < vocabulary:
            ids[:, -1] = end
        yield ids


def _pixels(config: Any, sampler: Sampler) -> Iterator[torch.Tensor]:
    channels = _setting(config, "num_channels", "in_channels", "in_chans", default=3)
    declared_size = _setting(config, "image_size", "img_size")
    sizes = [declared_size] if declared_size is not None else []
    frames = _setting(config, "num_frames")
    for size in [*sizes, 224, 256, 64]:
        if isinstance(size, Mapping):
            size = (size.get("height"), size.get("width"))
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        if isinstance(frames, int):
            yield sampler.normal(1, frames, channels, height, width)
        yield sampler.normal(1, channels, height, width)


def _spectra(config: Any, sampler: Sampler) -> Iterator[torch.Tensor]:
    """Log-mel features: ``[1, bins, frames]`` as Whisper takes them, ``[1, frames, bins]`` as others do."""
    bins = _setting(config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    if not isinstance(bins, int):
        return
    positions = _setting(config, "max_source_positions")
    if isinstance(positions, int):
        yield sampler.normal(1, bins, 2 * positions)
    for frames in (_setting(config, "max_length"), 128, 1024):
        if isinstance(frames, int) and frames > 20:
            yield sampler.normal(1, frames, bins)


def _dummies(model: Any, config: Any, sampler: Sampler, fixed: dict[str, Any]) -> Iterator[Candidate]:
    dummies = getattr(model, "dummy_inputs", None)
    if not isinstance(dummies, Mapping):
        return
    vocabulary = _setting(config, "vocab_size")

    def fit(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.is_floating_point():
            return leaf.to(device=sampler.device, dtype=sampler.dtype)
        # The library's fixed ids may exceed a small vocabulary.
        return (leaf % vocabulary if isinstance(vocabulary, int) else leaf).to(sampler.device)

    yield Candidate("its dummy_inputs", (), {**pytree.tree_map(fit, dict(dummies)), **fixed})


def _setting(config: Any, *names: str, default: Any = None) -> Any:
    """The first of ``names`` that the configuration or one of its parts defines."""
    parts = [config, *(getattr(config, part, None) for part in _PARTS)]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default
