"""The networks that are quantized, the inputs they are calibrated with, and others.

Every input is one sample, a batch of one: what the tools are calibrated with and the files are made for.

>>> case = speed_case("bert-mini")
>>> [list(t.shape) for t in case.samples(2)[1]]
[[1, 128], [1, 128]]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.pruning import networks as digits
from benchmarks.pruning import real, training
from benchmarks.pruning.data import Network, split
from benchmarks.runtime import networks as timed
from tests.zoo import torchvision_schemas
from tests.zoo.network import seeded

Sample = tuple[Tensor, ...]
TOKENS = timed.TOKENS
CALIBRATION = 100  # samples, where weights are trained
UNTRAINED_CALIBRATION = 16  # and where they are random: nothing but time is measured of those
HELD_OUT = 8


@dataclass(frozen=True)
class Case:
    """A network, and inputs for it.

    Attributes:
        build: the network in evaluation mode.
        samples: the first n inputs; equal ones every time.
        calibration: how many of them tools are given; those behind are held out.
        transformer: whether it is one, which some tools want to be told.
        metrics: network → figures on inputs of its own, the first is the score; ``None`` where it has no
            weights that were trained.
        seed: of the training.
    """

    name: str
    build: Callable[[], nn.Module]
    samples: Callable[[int], list[Sample]]
    calibration: int = CALIBRATION
    transformer: bool = False
    metrics: Callable[[Network], dict[str, float]] | None = None
    seed: int = 0

    def parts(self) -> tuple[list[Sample], list[Sample]]:
        """Inputs to calibrate with, and :data:`HELD_OUT` others."""
        found = self.samples(self.calibration + HELD_OUT)
        return found[: self.calibration], found[self.calibration :]


def _images(count: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(1, 3, 224, 224, generator=generator),) for _ in range(count)]


def _token_ids(count: int) -> list[Sample]:
    """Random tokens, of which up to a third is padding."""
    generator = torch.Generator().manual_seed(1)
    found: list[Sample] = []
    for _ in range(count):
        ids = torch.randint(3, timed.VOCABULARY, (1, TOKENS), generator=generator)
        mask = torch.ones(1, TOKENS, dtype=torch.long)
        mask[:, TOKENS - int(torch.randint(0, TOKENS // 3, (1,), generator=generator)) :] = 0
        found.append((ids * mask, mask))
    return found


def _paragraphs(count: int) -> list[Sample]:
    """Six sentences of a document in a row, cut or padded to :data:`TOKENS` tokens."""
    texts: list[str] = []
    for document in real._documents():
        sentences = real._sentences(document)
        texts += [" ".join(sentences[i : i + 6]) for i in range(0, len(sentences), 6)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    ids, mask = real.shipped.tokenise([texts[i] for i in order[:count].tolist()], TOKENS)
    return list(zip(ids.split(1), mask.split(1), strict=True))


def _of_split(name: str, count: int) -> list[Sample]:
    """Single inputs of what the pruning benchmark calibrates with."""
    found: list[Sample] = []
    for batch in split(name).calibration:
        parts = batch if isinstance(batch, tuple) else (batch,)
        found += list(zip(*(t.split(1) for t in parts), strict=True))
        if len(found) >= count:
            break
    return found[:count]


def _small_vit() -> nn.Module:
    def make() -> nn.Module:
        torchvision_schemas.declare()
        from timm.models.vision_transformer import VisionTransformer

        model: nn.Module = VisionTransformer(embed_dim=192, depth=12, num_heads=3)
        return model

    return seeded("quantization_vit_tiny", make)()


def _speed() -> dict[str, Case]:
    untrained: dict[str, Any] = {"calibration": UNTRAINED_CALIBRATION}
    found = [
        Case(name, partial(timed._from_torchvision, name), _images, **untrained)
        for name in ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large")
    ]
    found += [
        Case("efficientnet-lite0", partial(real.define, "efficientnet-lite0"),
             partial(_of_split, "efficientnet-lite0")),
        Case("vit_tiny", _small_vit, _images, transformer=True, **untrained),
        Case("bert-mini", partial(timed._from_transformers, "BertModel", "BertConfig", timed._TEXT),
             _token_ids, transformer=True, **untrained),
        Case("minilm-l6", partial(real.define, "minilm-l6"), _paragraphs, transformer=True),
    ]  # fmt: skip
    return {case.name: case for case in found}


SPEED = _speed()
TRAINED = ("resnet20", "mobilenetv2", "vit")
REAL = ("efficientnet-lite0", "crepe-tiny", "crepe-full", "minilm-l6")


def speed_case(name: str) -> Case:
    """A network to time: :data:`SPEED` has the names."""
    return SPEED[name]


def accuracy_case(name: str, seed: int = 0) -> Case:
    """A network to score, of :data:`TRAINED` (one a seed) or :data:`REAL`."""
    build: Callable[[], nn.Module]
    build = partial(training.trained, name, seed) if name in digits.NAMES else partial(real.define, name)
    return Case(
        name, build, partial(_of_split, name), transformer=name in ("vit", "minilm-l6"),
        metrics=lambda network: split(name).metrics(network), seed=seed,
    )  # fmt: skip
