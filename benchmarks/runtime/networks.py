"""The networks that are timed, at the size they are used at.

The three with real weights are those of `examples.networks`. Those of torchvision are whole, at 224 pixels,
with batch norm statistics that keep their activations in range (see `tests.zoo.network.settle`): a network
that explodes or vanishes is timed on infinities and denormal numbers. Those of transformers are four layers
of width 256 over 128 tokens, with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from examples import networks as pretrained
from tests.zoo import torchvision_schemas
from tests.zoo.network import normal, seeded

VOCABULARY, TOKENS = 1000, 128
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 1024, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 256,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_T5 = {"vocab_size": VOCABULARY, "d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_heads": 4}


@dataclass(frozen=True)
class Timed:
    """A network and the call that is timed, both the same every time they are built."""

    name: str
    build: Callable[[], nn.Module]
    args: Callable[[], tuple[torch.Tensor, ...]]
    kwargs: Callable[[], dict[str, torch.Tensor]] = field(default=dict)


def _photograph() -> tuple[torch.Tensor]:
    return (pretrained.photographs()[:1],)


def _tone() -> tuple[torch.Tensor]:
    return (pretrained.tones(1)[0],)


def _sentence() -> tuple[torch.Tensor, ...]:
    ids, mask = pretrained.tokenise(length=TOKENS)
    return ids[:1], mask[:1]


def _tokens() -> tuple[torch.Tensor]:
    return (torch.randint(3, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0)),)


def _mask() -> dict[str, torch.Tensor]:
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    mask[:, -20:] = 0
    return {"attention_mask": mask}


def _from_torchvision(name: str) -> nn.Module:
    def make() -> nn.Module:
        torchvision_schemas.declare()
        from torchvision import models

        return models.get_model(name, weights=None)

    return seeded(f"runtime_{name}", make, settle_on=normal(1, 3, 224, 224))()


def _from_transformers(model: str, config: str, options: dict[str, Any]) -> nn.Module:
    def make() -> nn.Module:
        torchvision_schemas.declare()
        import transformers

        chosen = getattr(transformers, config)(**options)
        chosen.use_cache = False
        built: nn.Module = getattr(transformers, model)(chosen)
        return built

    return seeded(f"runtime_{model}", make)()


def _vision(name: str) -> Timed:
    return Timed(name, partial(_from_torchvision, name), normal(1, 3, 224, 224))


def _text(name: str, model: str, config: str, options: dict[str, Any]) -> Timed:
    return Timed(name, partial(_from_transformers, model, config, options), _tokens, _mask)


NETWORKS = (
    Timed("efficientnet_lite0 (trained)", pretrained.efficientnet_lite0, _photograph),
    Timed("crepe_tiny (trained)", pretrained.crepe_tiny, _tone),
    Timed("minilm_l6 (trained)", pretrained.minilm, _sentence),
    *map(
        _vision, ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121", "swin_t", "vit_b_16")
    ),
    _text("bert 4x256", "BertModel", "BertConfig", _TEXT),
    _text("gpt2 4x256", "GPT2LMHeadModel", "GPT2Config", _GPT2),
    _text("llama 4x256", "LlamaForCausalLM", "LlamaConfig", _TEXT | {"num_key_value_heads": 2}),
    _text("t5_encoder 4x256", "T5EncoderModel", "T5Config", _T5),
)


def get(name: str) -> Timed:
    """The network whose name begins with `name`; raises KeyError with the names there are."""
    found = [network for network in NETWORKS if network.name.startswith(name)]
    if not found:
        raise KeyError(f"no network {name!r}; there are {', '.join(n.name for n in NETWORKS)}")
    return found[0]
