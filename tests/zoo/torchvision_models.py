"""One small member of every classification and segmentation family of torchvision, untrained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tests.zoo import torchvision_schemas
from tests.zoo.network import Network, normal, seeded

_SEGMENTATION = {"num_classes": 5, "weights": None, "weights_backbone": None, "aux_loss": None}

# family, constructor below torchvision.models, image size, keyword arguments
_CLASSIFIERS: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("alexnet", "alexnet", 64, {}),
    ("vgg", "vgg11", 32, {}),
    ("vgg", "vgg11_bn", 32, {}),
    ("resnet", "resnet18", 64, {}),
    ("resnet", "resnet50", 64, {}),
    ("resnext", "resnext50_32x4d", 64, {}),
    ("wide_resnet", "wide_resnet50_2", 64, {}),
    ("squeezenet", "squeezenet1_1", 64, {}),
    ("densenet", "densenet121", 64, {}),
    ("inception", "inception_v3", 96, {"aux_logits": True, "init_weights": False}),
    ("googlenet", "googlenet", 64, {"aux_logits": True, "init_weights": False}),
    ("shufflenet_v2", "shufflenet_v2_x0_5", 64, {}),
    ("mobilenet_v2", "mobilenet_v2", 64, {}),
    ("mobilenet_v3", "mobilenet_v3_small", 64, {}),
    ("mobilenet_v3", "mobilenet_v3_large", 64, {}),
    ("mnasnet", "mnasnet0_5", 64, {}),
    ("efficientnet", "efficientnet_b0", 64, {}),
    ("efficientnet_v2", "efficientnet_v2_s", 64, {}),
    ("regnet_x", "regnet_x_400mf", 64, {}),
    ("regnet_y", "regnet_y_400mf", 64, {}),
    ("convnext", "convnext_tiny", 64, {}),
    ("vit", "vit_b_16", 64, {"image_size": 64}),
    ("swin", "swin_t", 64, {}),
    ("swin_v2", "swin_v2_t", 64, {}),
    ("maxvit", "maxvit", 64, {}),
)
_SEGMENTERS: tuple[tuple[str, str, int], ...] = (
    ("fcn", "fcn_resnet50", 64),
    ("deeplabv3", "deeplabv3_resnet50", 64),
    ("deeplabv3", "deeplabv3_mobilenet_v3_large", 64),
    ("lraspp", "lraspp_mobilenet_v3_large", 64),
)


def networks() -> list[Network]:
    """Every torchvision network of the zoo; names start with `tv_`."""
    classifiers = [
        _network(family, constructor, size, _classifier(constructor, options), frozenset({"classifier"}))
        for family, constructor, size, options in _CLASSIFIERS
    ]
    segmenters = [
        _network(family, constructor, size, _segmenter(constructor), frozenset({"segmentation"}))
        for family, constructor, size in _SEGMENTERS
    ]
    return classifiers + segmenters


def _network(
    family: str, constructor: str, size: int, make: Callable[[], nn.Module], tags: frozenset[str]
) -> Network:
    name, inputs = f"tv_{constructor}", normal(2, 3, size, size)
    return Network(
        name=name,
        family=family,
        build=seeded(name, make, settle_on=inputs),
        inputs=inputs,
        tags=tags | {"torchvision", "vision"},
        requires=("torchvision",),
    )


def _classifier(constructor: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torchvision_schemas.declare()
        from torchvision import models

        if constructor == "maxvit":
            # maxvit_t only comes at 224 pixels; the same blocks, narrow and at 64, with partitions of 2
            return models.MaxVit(
                input_size=(64, 64),
                stem_channels=16,
                partition_size=2,
                block_channels=[16, 32, 48, 64],
                block_layers=[1, 1, 2, 1],
                head_dim=8,
                stochastic_depth_prob=0.0,
                num_classes=10,
            )
        module: nn.Module = getattr(models, constructor)(weights=None, num_classes=10, **options)
        return module

    return make


def _segmenter(constructor: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torchvision_schemas.declare()
        from torchvision.models import segmentation

        options = {k: v for k, v in _SEGMENTATION.items() if k != "aux_loss" or "lraspp" not in constructor}
        module: nn.Module = getattr(segmentation, constructor)(**options)
        return module

    return make
