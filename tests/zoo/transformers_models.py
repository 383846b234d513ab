"""Small transformers with random weights: encoders, decoders, both, vision and audio.

Two layers of width 64 with four heads, unless an architecture asks for something else: whatever makes
an architecture hard to prune is there at any size. All return tuples and keep no cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo import torchvision_schemas
from tests.zoo.network import Network, normal, seeded

VOCABULARY, TOKENS = 97, 12

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 112,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _TEXT | {"num_key_value_heads": 2}
_WINDOWED = _GROUPED | {"head_dim": 16, "sliding_window": 8}
_VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 112,
    "image_size": 32,
    "patch_size": 8,
}
_SWIN = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
    "window_size": 4,
}  # fmt: skip
_IMAGE = normal(2, 3, 32, 32)


@dataclass(frozen=True)
class _Spec:
    """An architecture: the class to build, its configuration, and what it is called with."""

    name: str
    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    domain: str = "text"
    inputs: Callable[[], tuple[Any, ...]] | None = None
    kwargs: Callable[[], dict[str, Any]] = dict
    part: str = ""

    def make(self) -> nn.Module:
        torchvision_schemas.declare()
        import transformers

        config = getattr(transformers, self.config)(**self.options)
        config.use_cache = False
        model: nn.Module = getattr(transformers, self.model)(config)
        model = model.get_submodule(self.part)
        model.__class__ = _returns_tuple(type(model))
        return model


def _returns_tuple(parent: type[nn.Module]) -> type[nn.Module]:
    """`parent` with a forward that gives a tuple of tensors where it gave a dictionary.

    Not by `return_dict=False`: as a call argument it would become an input of every captured graph, and
    in the configuration it reaches inner modules whose callers count on the dictionary.
    """

    @functools.wraps(parent.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = parent.forward(self, *args, **kwargs)
        return output.to_tuple() if hasattr(output, "to_tuple") else output

    return type(parent.__name__, (parent,), {"forward": forward, "__module__": parent.__module__})


def _tokens(seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(seed))


def _ids() -> tuple[Tensor]:
    return (_tokens(),)


def _padded() -> dict[str, Any]:
    """A mask whose second sentence is three tokens shorter."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, -3:] = 0
    return {"attention_mask": mask}


def _decoder_ids() -> dict[str, Any]:
    return {"decoder_input_ids": _tokens(1)[:, :7]}


_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 112}
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 112, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
_BART = {
    "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 112,
    "decoder_ffn_dim": 112, "max_position_embeddings": 64,
}  # fmt: skip
_WAV = {
    "vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 112, "conv_dim": (24, 24, 24), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
_DEBERTA = _TEXT | {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "share_att_key": True,
    "norm_rel_ebd": "layer_norm", "type_vocab_size": 0, "position_biased_input": False,
}  # fmt: skip
_EAGER = {"attn_implementation": "eager"}

_ENCODERS = (
    _Spec("bert", "BertModel", "BertConfig", _TEXT),
    _Spec("bert_masked", "BertModel", "BertConfig", _TEXT, kwargs=_padded),
    _Spec("bert_eager", "BertModel", "BertConfig", _TEXT | _EAGER, kwargs=_padded),
    _Spec("bert_masked_lm", "BertForMaskedLM", "BertConfig", _TEXT),
    _Spec("roberta", "RobertaForSequenceClassification", "RobertaConfig", _TEXT),
    _Spec(
        "distilbert", "DistilBertModel", "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 112},
    ),
    _Spec("albert", "AlbertModel", "AlbertConfig", _TEXT | {"embedding_size": 24}),
    _Spec("electra", "ElectraModel", "ElectraConfig", _TEXT | {"embedding_size": 24}),
    _Spec("deberta_v2", "DebertaV2Model", "DebertaV2Config", _DEBERTA),
    _Spec("deberta_v2_masked", "DebertaV2Model", "DebertaV2Config", _DEBERTA, kwargs=_padded),
    _Spec("mpnet", "MPNetModel", "MPNetConfig", _TEXT | {"pad_token_id": 1}),
    _Spec("modernbert", "ModernBertModel", "ModernBertConfig", _TEXT | {"local_attention": 8}),
    _Spec("roformer", "RoFormerModel", "RoFormerConfig", _TEXT | {"embedding_size": 24}),
    _Spec("squeezebert", "SqueezeBertModel", "SqueezeBertConfig", _TEXT | {"embedding_size": 64}),
)  # fmt: skip
_DECODERS = (
    _Spec("gpt2", "GPT2LMHeadModel", "GPT2Config", _GPT2),
    _Spec("gpt2_eager", "GPT2LMHeadModel", "GPT2Config", _GPT2 | _EAGER, kwargs=_padded),
    _Spec("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT),
    _Spec(
        "gpt_neo", "GPTNeoForCausalLM", "GPTNeoConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 8,
         "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64},
    ),
    _Spec(
        "gptj", "GPTJForCausalLM", "GPTJConfig",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    ),
    _Spec("gpt_bigcode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT2),
    _Spec("opt", "OPTForCausalLM", "OPTConfig", _TEXT | {"ffn_dim": 112, "word_embed_proj_dim": 64}),
    _Spec(
        "bloom", "BloomForCausalLM", "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    ),
    _Spec("llama", "LlamaForCausalLM", "LlamaConfig", _TEXT),
    _Spec("llama_grouped", "LlamaForCausalLM", "LlamaConfig", _GROUPED),
    _Spec("llama_grouped_masked", "LlamaForCausalLM", "LlamaConfig", _GROUPED, kwargs=_padded),
    _Spec("llama_grouped_eager", "LlamaForCausalLM", "LlamaConfig", _GROUPED | _EAGER),
    _Spec("mistral", "MistralForCausalLM", "MistralConfig", _GROUPED | {"sliding_window": 8}),
    _Spec("qwen2", "Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    _Spec("qwen3", "Qwen3ForCausalLM", "Qwen3Config", _GROUPED | {"head_dim": 24}),
    _Spec("gemma", "GemmaForCausalLM", "GemmaConfig", _TEXT | {"num_key_value_heads": 1, "head_dim": 16}),
    _Spec("gemma2", "Gemma2ForCausalLM", "Gemma2Config", _WINDOWED),
    _Spec("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", _WINDOWED),
    _Spec("phi", "PhiForCausalLM", "PhiConfig", _TEXT | {"partial_rotary_factor": 0.5}),
    _Spec("phi3", "Phi3ForCausalLM", "Phi3Config", _GROUPED),
    _Spec("falcon", "FalconForCausalLM", "FalconConfig", _TEXT | {"ffn_hidden_size": 112}),
    _Spec("stablelm", "StableLmForCausalLM", "StableLmConfig", _GROUPED),
    _Spec("olmo2", "Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
    _Spec("mixtral", "MixtralForCausalLM", "MixtralConfig", _GROUPED | {"num_local_experts": 4}),
    _Spec(
        "mixtral_batched", "MixtralForCausalLM", "MixtralConfig",
        _GROUPED | {"num_local_experts": 4, "experts_implementation": "batched_mm"},
    ),
    _Spec(
        "mamba", "MambaForCausalLM", "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 6},
    ),
)  # fmt: skip
_ENCODER_DECODERS = (
    _Spec("t5_encoder", "T5EncoderModel", "T5Config", _T5),
    _Spec("t5_encoder_masked", "T5EncoderModel", "T5Config", _T5, kwargs=_padded),
    _Spec("t5", "T5ForConditionalGeneration", "T5Config", _T5, kwargs=_decoder_ids),
    _Spec(
        "t5_gated", "T5ForConditionalGeneration", "T5Config",
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, kwargs=_decoder_ids,
    ),
    _Spec("bart", "BartModel", "BartConfig", _BART, kwargs=_decoder_ids),
    _Spec("marian", "MarianMTModel", "MarianConfig", _BART | {"pad_token_id": 0}, kwargs=_decoder_ids),
)  # fmt: skip
_VISION = (
    _Spec("vit", "ViTForImageClassification", "ViTConfig", _VIT, "vision", _IMAGE),
    _Spec("vit_eager", "ViTForImageClassification", "ViTConfig", _VIT | _EAGER, "vision", _IMAGE),
    _Spec("deit", "DeiTModel", "DeiTConfig", _VIT, "vision", _IMAGE),
    _Spec("beit", "BeitModel", "BeitConfig", _VIT | {"use_relative_position_bias": True}, "vision", _IMAGE),
    _Spec("dinov2", "Dinov2Model", "Dinov2Config", _VIT, "vision", _IMAGE),
    _Spec("clip_vision", "CLIPVisionModel", "CLIPVisionConfig", _VIT, "vision", _IMAGE),
    _Spec("siglip_vision", "SiglipVisionModel", "SiglipVisionConfig", _VIT, "vision", _IMAGE),
    _Spec(
        "swin", "SwinModel", "SwinConfig",
        _SWIN, "vision", _IMAGE,
    ),
    _Spec(
        "swinv2", "Swinv2Model", "Swinv2Config",
        _SWIN, "vision", _IMAGE,
    ),
    _Spec(
        "segformer", "SegformerForSemanticSegmentation", "SegformerConfig",
        {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1], "decoder_hidden_size": 40, "num_labels": 5,
         "num_attention_heads": [1, 2, 4, 6]},
        "vision", normal(2, 3, 64, 64),
    ),
    _Spec(
        "convnext", "ConvNextForImageClassification", "ConvNextConfig",
        {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]}, "vision", normal(2, 3, 64, 64),
    ),
    _Spec(
        "resnet", "ResNetForImageClassification", "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [32, 48, 64, 96], "depths": [1, 1, 2, 1]},
        "vision", normal(2, 3, 64, 64),
    ),
    _Spec(
        "mobilevit", "MobileViTForImageClassification", "MobileViTConfig",
        {"hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 12, 16, 20, 24, 32, 80], "image_size": 64},
        "vision", normal(2, 3, 64, 64),
    ),
    _Spec(
        "pvt_v2", "PvtV2ForImageClassification", "PvtV2Config",
        {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 6],
         "image_size": 64},
        "vision", normal(2, 3, 64, 64),
    ),
)  # fmt: skip
_AUDIO = (
    _Spec("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", _WAV, "audio", normal(2, 800)),
    _Spec(
        "wav2vec2_stable", "Wav2Vec2Model", "Wav2Vec2Config",
        _WAV | {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}, "audio", normal(2, 800),
    ),
    _Spec("hubert", "HubertModel", "HubertConfig", _WAV, "audio", normal(2, 800)),
    _Spec("wavlm", "WavLMModel", "WavLMConfig", _WAV, "audio", normal(2, 800)),
    _Spec(
        "whisper_encoder", "WhisperModel", "WhisperConfig",
        _BART | {"num_mel_bins": 20, "max_source_positions": 30, "max_target_positions": 32,
                 "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        "audio", normal(2, 20, 60), part="encoder",
    ),
    _Spec(
        "ast", "ASTForAudioClassification", "ASTConfig",
        _VIT | {"max_length": 48, "num_mel_bins": 32, "frequency_stride": 8, "time_stride": 8},
        "audio", normal(2, 48, 32),
    ),
)  # fmt: skip

# Networks that torch.export does not capture, with the reason.
_NOT_EXPORTED: dict[str, str] = {}


def networks() -> list[Network]:
    """Every transformers network of the zoo; names start with `hf_`."""
    found = []
    for spec in (*_ENCODERS, *_DECODERS, *_ENCODER_DECODERS, *_VISION, *_AUDIO):
        name, note = f"hf_{spec.name}", _NOT_EXPORTED.get(spec.name, "")
        settles = spec.domain == "vision"
        inputs = spec.inputs if spec.inputs is not None else _ids
        found.append(
            Network(
                name=name,
                family=spec.config.removesuffix("Config").lower(),
                build=seeded(name, spec.make, settle_on=inputs if settles else None),
                inputs=inputs,
                kwargs=spec.kwargs,
                tags=frozenset({"transformers", spec.domain} | ({"no-export"} if note else set())),
                requires=("transformers",),
                note=note,
            )
        )
    return found
