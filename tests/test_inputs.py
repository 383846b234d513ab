"""Example inputs from declarations and from layers, and the trace that inferring them leaves: none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from graphprune.errors import InputError
from graphprune.frontend.inputs import Sampler, attempt, infer, undisturbed


def flattened(channels: int, side: int) -> nn.Sequential:
    """A convolution with a head that accepts one image size only."""
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * side * side, 2))


class TwoInputs(nn.Module):
    example_input_array: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.linear(left + right) * scale


class Counting(nn.Module):
    """Writes a buffer on every call, in evaluation mode too, and draws random numbers."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x) + torch.rand(2) * 0


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Linear(5, 2), (1, 5)),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (1, 12)),
        (nn.Conv2d(3, 4, 3), (1, 3, 224, 224)),
        (nn.Conv1d(2, 4, 3), (1, 2, 1024)),
        (nn.Conv3d(1, 2, 3), (1, 1, 32, 32, 32)),
        (nn.ConvTranspose2d(3, 4, 2), (1, 3, 7, 7)),
        (flattened(1, 28), (1, 1, 28, 28)),
        (flattened(3, 32), (1, 3, 32, 32)),
        (nn.LSTM(6, 4, batch_first=True), (1, 16, 6)),
        (nn.GRU(6, 4), (16, 1, 6)),
        (nn.LSTMCell(6, 4), (1, 6)),
        (nn.BatchNorm1d(7), (1, 7)),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), (1, 3, 224, 224)),
        (nn.LayerNorm((4, 6)), (1, 4, 6)),
        (nn.GroupNorm(2, 8), (1, 8, 224, 224)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (1, 16, 8)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_the_first_layer_gives_the_shape(model: nn.Module, shape: tuple[int, ...]) -> None:
    inferred = infer(model)
    assert tuple(inferred.args[0].shape) == shape
    assert str(list(shape)) in inferred.reason


def test_an_embedding_gets_ids_of_its_own_vocabulary() -> None:
    ids = infer(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))).args[0]
    assert ids.dtype == torch.int64
    assert 0 <= int(ids.min()) <= int(ids.max()) < 5


def test_a_layer_registered_first_but_run_later_does_not_mislead() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.stem = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.stem(x).mean((2, 3)))

    assert tuple(infer(Reversed()).args[0].shape) == (1, 3, 224, 224)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_follows_the_parameters(dtype: torch.dtype) -> None:
    assert infer(nn.Linear(3, 2).to(dtype)).args[0].dtype == dtype


def test_device_follows_the_parameters() -> None:
    assert infer(nn.Linear(3, 2, device="meta")).args[0].device.type == "meta"


def test_two_calls_give_the_same_values() -> None:
    model = nn.Linear(3, 2)
    first = infer(model).args[0]
    torch.rand(3)
    torch.testing.assert_close(infer(model).args[0], first, rtol=0, atol=0)


def test_several_required_arguments_are_named() -> None:
    with pytest.raises(InputError, match=r"TwoInputs.* needs 2 arguments.*\(left, right\)") as caught:
        infer(TwoInputs())
    assert "forward(left, right, scale)" in str(caught.value)


def test_no_layer_with_a_shape() -> None:
    with pytest.raises(InputError, match=r"ReLU: no layer of it fixes an input shape; .*\(input,\)"):
        infer(nn.ReLU())


def test_what_was_tried_is_said() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2))
    with pytest.raises(InputError, match=r"tried 4, among them \[1, 3\] float32, from layer '0', Linear"):
        infer(model)


def test_lightning_style_declarations() -> None:
    model = TwoInputs()
    model.example_input_array = (torch.ones(4, 3), torch.ones(4, 3))
    assert [tuple(a.shape) for a in infer(model).args] == [(4, 3), (4, 3)]
    model.example_input_array = {"left": torch.ones(2, 3), "right": torch.ones(2, 3)}
    inferred = infer(model)
    assert inferred.args == ()
    assert sorted(inferred.kwargs) == ["left", "right"]
    assert "example_input_array" in inferred.reason


def test_timm_style_declarations() -> None:
    class Timm(nn.Sequential):
        pretrained_cfg: ClassVar[dict[str, Any]] = {"input_size": (3, 40, 48)}

    model = Timm(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1))
    inferred = infer(model)
    assert tuple(inferred.args[0].shape) == (1, 1, 40, 48)
    assert "pretrained_cfg" in inferred.reason


class Text(nn.Module):
    """Says of itself what a transformers model says, with a vocabulary smaller than the library's dummies."""

    main_input_name = "input_ids"

    def __init__(self, **config: object) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=6, pad_token_id=0, eos_token_id=2, **config)
        self.embedding = nn.Embedding(6, 4)
        self.positions = nn.Embedding(8, 4)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, use_cache: bool = True
    ) -> torch.Tensor:
        assert not use_cache
        return self.embedding(input_ids) + self.positions(torch.arange(input_ids.shape[1]))


def test_a_small_vocabulary_and_few_positions_are_respected() -> None:
    inferred = infer(Text())
    ids = inferred.kwargs["input_ids"]
    assert ids.shape == (1, 8)
    assert int(ids.max()) < 6
    assert int(ids[0, -1]) == 2
    assert not set(ids[0, :-1].tolist()) & {0, 2}
    assert inferred.kwargs["use_cache"] is False


def test_modes_buffers_and_random_state_are_left_alone() -> None:
    model = nn.Sequential(Counting(), nn.BatchNorm1d(2), nn.Dropout())
    model[1].eval()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()
    infer(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_state_is_restored_after_a_failing_run() -> None:
    model = nn.Sequential(Counting(), nn.Linear(7, 2))
    assert "RuntimeError" in str(attempt(model, (torch.zeros(1, 3),), {}))
    assert model.training
    assert model[0].calls == 0


def test_evaluation_mode_inside() -> None:
    model = nn.Dropout()
    with undisturbed(model):
        assert not model.training
        assert not torch.is_grad_enabled()
    assert model.training


def test_sampler_of_a_model_without_floats() -> None:
    sampler = Sampler.of(nn.ReLU())
    assert sampler.dtype == torch.get_default_dtype()


ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PAIR = {
    "vocab_size": 20, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
}  # fmt: skip
LIBRARY: dict[str, dict[str, Any]] = {
    "BertModel": {**ENCODER, "vocab_size": 20},
    "LlamaForCausalLM": {**ENCODER, "vocab_size": 20, "num_key_value_heads": 1},
    "GPT2LMHeadModel": {"vocab_size": 20, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "T5Model": {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
    "BartForSequenceClassification": PAIR,
    "WhisperModel": {
        **PAIR, "num_mel_bins": 8, "max_source_positions": 20, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "decoder_start_token_id": 1,
    },
    "ViTModel": {**ENCODER, "image_size": 32, "patch_size": 8},
    "VideoMAEModel": {**ENCODER, "image_size": 16, "patch_size": 8, "num_frames": 4},
    "ASTModel": {**ENCODER, "max_length": 64, "num_mel_bins": 32},
    "Wav2Vec2Model": {
        **ENCODER, "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8),
        "num_feat_extract_layers": 2, "num_conv_pos_embedding_groups": 2,
    },
}  # fmt: skip


@pytest.mark.network
@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.filterwarnings("ignore")
def test_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    config = kind.config_class(**LIBRARY[name])
    inferred = infer(kind(config))
    assert kind.main_input_name in inferred.kwargs
    if getattr(config, "is_encoder_decoder", False):
        assert "decoder_input_ids" in inferred.kwargs
    assert "configuration" in inferred.reason


@pytest.mark.network
@pytest.mark.filterwarnings("ignore")
def test_transformers_with_two_modalities() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(
        text_config={**ENCODER, "vocab_size": 20, "eos_token_id": 2, "bos_token_id": 1},
        vision_config={**ENCODER, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    inferred = infer(transformers.CLIPModel(config))
    assert inferred.kwargs["pixel_values"].shape == (1, 3, 32, 32)
    assert int(inferred.kwargs["input_ids"].max()) < 20


@pytest.mark.network
@pytest.mark.parametrize(("name", "options", "shape"), [
    ("resnet18", {"in_chans": 1}, (1, 1, 224, 224)),
    ("vit_tiny_patch16_224", {"img_size": 64}, (1, 3, 64, 64)),
])  # fmt: skip
def test_timm(name: str, options: dict[str, int], shape: tuple[int, ...]) -> None:
    timm = pytest.importorskip("timm")
    assert tuple(infer(timm.create_model(name, **options)).args[0].shape) == shape
