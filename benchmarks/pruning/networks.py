"""Networks small enough to train here: a residual one, a plain one, one with depthwise, a transformer.

All of them read ``[n, 1, 28, 28]`` and give ``[n, 10]``. Their shapes are those of the networks they are
named after, their widths those of the CIFAR versions; strides are larger, since a digit needs no more.

>>> import torch
>>> network = define("resnet20")
>>> network(torch.zeros(2, 1, 28, 28)).shape
torch.Size([2, 10])
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

NAMES = ("resnet20", "vgg", "mobilenetv2", "vit")
CLASSES = 10


class Residual(nn.Module):
    """Two convolutions and a shortcut, which is one of its own where the shape changes (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[n, inputs, h, w]`` to ``[n, outputs, h / stride, w / stride]``."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Inverted(nn.Module):
    """Expand, depthwise, project, with a sum where the shape stays (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int):
        super().__init__()
        hidden = inputs * expand
        self.expand = convolution(inputs, hidden, 1, activation=nn.ReLU6)
        self.depthwise = convolution(hidden, hidden, 3, stride, hidden, activation=nn.ReLU6)
        self.project = convolution(hidden, outputs, 1)
        self.sums = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """``[n, inputs, h, w]`` to ``[n, outputs, h / stride, w / stride]``."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.sums else y


def convolution(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = None,
) -> nn.Sequential:
    """A convolution that keeps the size (but for its stride), its batch norm, and an activation or none."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([activation()] if activation is not None else []))


def head(channels: int) -> list[nn.Module]:
    """Mean over positions, and a classifier."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]


def resnet20() -> nn.Module:
    """Three stages of three blocks, 16, 32 and 64 channels, as ResNet-20 for CIFAR; the stem halves."""
    blocks: list[nn.Module] = []
    inputs = 16
    for outputs, stride in ((16, 1), (32, 2), (64, 2)):
        for index in range(3):
            blocks.append(Residual(inputs, outputs, stride if index == 0 else 1))
            inputs = outputs
    return nn.Sequential(*convolution(1, 16, 3, 2, activation=nn.ReLU), *blocks, *head(64))


def vgg() -> nn.Module:
    """Seven convolutions in a row, 32 to 128 channels, with batch norms and two linears behind them."""
    layers: list[nn.Module] = []
    inputs = 1
    for outputs, stride in ((32, 2), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (128, 1)):
        layers += convolution(inputs, outputs, 3, stride, activation=nn.ReLU)
        inputs = outputs
    linears = [nn.Flatten(), nn.Linear(128 * 16, 128), nn.ReLU(), nn.Linear(128, CLASSES)]
    return nn.Sequential(*layers, *linears)


def mobilenetv2() -> nn.Module:
    """Seven inverted residuals, expanded four times; 16 to 48 channels between them."""
    blocks: list[nn.Module] = []
    inputs = 16
    for outputs, stride, count in ((16, 1, 1), (24, 2, 2), (32, 2, 2), (48, 1, 2)):
        for index in range(count):
            blocks.append(Inverted(inputs, outputs, stride if index == 0 else 1, 4))
            inputs = outputs
    stem = convolution(1, 16, 3, 2, activation=nn.ReLU6)
    return nn.Sequential(*stem, *blocks, *convolution(48, 128, 1, activation=nn.ReLU6), *head(128))


def vit() -> nn.Module:
    """timm's vision transformer (Dosovitskiy et al. 2021): 49 patches, 64 wide, 4 blocks of 4 heads.

    timm's, since that is the one that other libraries document how to prune.
    """
    from tests.zoo import torchvision_schemas

    torchvision_schemas.declare()
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=28, patch_size=4, in_chans=1, num_classes=CLASSES, embed_dim=64, depth=4, num_heads=4
    )
    return model


def define(name: str) -> nn.Module:
    """A network of :data:`NAMES` with fresh weights."""
    makers = {"resnet20": resnet20, "vgg": vgg, "mobilenetv2": mobilenetv2, "vit": vit}
    return makers[name]()
