"""Hand-written convolutional blocks: each holds one way in which channels depend on one another.

Widths differ within a block, so that axes of different meaning cannot pass for one another by size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(cin: int, cout: int, kernel: int = 3, **options: int | bool) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(cin, cout, kernel, padding=kernel // 2, **options)  # type: ignore[arg-type]


class UnequalConcatResidual(nn.Module):
    """Two branches of unequal width, concatenated, then added to a third of their joint width."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.skip = conv(3, 10), conv(3, 14), conv(3, 24, 1)
        self.head = conv(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.left(x), self.right(x)], dim=1)
        return self.head(F.relu(joined + self.skip(x)))


class ChannelShuffle(nn.Module):
    """Grouped convolutions with a channel shuffle between them (ShuffleNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = conv(3, 12), conv(12, 24, groups=3)
        self.second, self.head = conv(24, 18, groups=3), conv(18, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(F.relu(self.stem(x))))
        n, c, h, w = x.shape
        x = x.reshape(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.second(x)))


class PixelShuffle(nn.Module):
    """Upsampling by moving channels into space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.head = conv(3, 10), conv(10, 28), conv(7, 5)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shuffle(self.expand(F.relu(self.stem(x)))))


class PixelUnshuffle(nn.Module):
    """Downsampling by moving space into channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.head = conv(3, 6), conv(24, 14), conv(14, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mix(F.pixel_unshuffle(F.relu(self.stem(x)), 2))))


class GroupedMultiplier(nn.Module):
    """Depthwise with two outputs per input, then grouped with three inputs and two outputs a group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = conv(3, 12), conv(12, 24, groups=12)
        self.grouped, self.head = conv(24, 16, groups=8), conv(16, 5, 1)
        self.norm = nn.BatchNorm2d(24)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.depthwise(F.relu(self.stem(x)))))
        return self.head(F.relu(self.grouped(x)))


class SqueezeExcitation(nn.Module):
    """Channels scaled by a function of their own means (Hu et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 16), conv(16, 5, 1)
        self.squeeze, self.excite = nn.Linear(16, 6), nn.Linear(6, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return self.head(x * gate[:, :, None, None])


class SharedWeights(nn.Module):
    """One convolution used twice, so that its inputs are its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = conv(3, 12), conv(12, 12), conv(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.shared(F.relu(self.shared(x)))))


class GroupedConvTranspose(nn.Module):
    """A transposed convolution, whose weight is `[in, out / groups, kh, kw]`, with groups and without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 12), conv(10, 5, 1)
        self.grouped = nn.ConvTranspose2d(12, 16, 2, stride=2, groups=4)
        self.plain = nn.ConvTranspose2d(16, 10, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.plain(F.relu(self.grouped(F.relu(self.stem(x)))))))


class FlattenSpatial(nn.Module):
    """A linear layer over flattened channels and positions: one channel is H·W of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv(3, 12), nn.Conv2d(12, 10, 3, stride=2, padding=1)
        self.hidden, self.head = nn.Linear(10 * 4 * 4, 18), nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.body(F.relu(self.stem(x)))).flatten(1)
        return self.head(F.relu(self.hidden(x)))


class BroadcastGates(nn.Module):
    """Gates that broadcast: over space, over channels, and a parameter per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 14), conv(14, 5, 1)
        self.spatial, self.channel = conv(14, 1), conv(14, 14, 1)
        self.scale = nn.Parameter(torch.ones(14, 1, 1) * 0.8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)) * self.scale
        where = torch.sigmoid(self.spatial(x))
        which = torch.sigmoid(self.channel(F.adaptive_avg_pool2d(x, 1)))
        return self.head(x * where * which + x)


class UNet(nn.Module):
    """Two levels down and up, skips concatenated after interpolation (Ronneberger et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.down0, self.down1, self.bottom = conv(3, 8), conv(8, 12), conv(12, 18)
        self.up1, self.up0, self.head = conv(30, 14), conv(22, 10), conv(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.down0(x))
        second = F.relu(self.down1(F.max_pool2d(first, 2)))
        x = F.relu(self.bottom(F.avg_pool2d(second, 2)))
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = F.relu(self.up1(torch.cat([x, second], 1)))
        x = F.interpolate(x, size=first.shape[2:], mode="bilinear", align_corners=False)
        return self.head(F.relu(self.up0(torch.cat([x, first], 1))))


class GroupNormed(nn.Module):
    """GroupNorm: a statistic runs over the channels of a group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.body, self.head = (
            conv(3, 12),
            nn.GroupNorm(3, 12),
            conv(12, 10),
            conv(10, 5, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(F.relu(self.norm(self.stem(x))))))


class InstanceNormed(nn.Module):
    """InstanceNorm with affine parameters: its statistics stay within a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 12), conv(12, 10), conv(10, 5, 1)
        self.norm = nn.InstanceNorm2d(12, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(F.relu(self.norm(self.stem(x))))))


class ChannelPrelu(nn.Module):
    """PReLU with a slope per channel, and one with a slope for all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 12), conv(12, 10), conv(10, 5, 1)
        self.each, self.shared = nn.PReLU(12, init=0.3), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.body(self.each(self.stem(x)))))


class Conv1d(nn.Module):
    """Convolutions over time, one of them dilated and depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, 12, 5, stride=2)
        self.depthwise = nn.Conv1d(12, 12, 3, padding=2, dilation=2, groups=12)
        self.norm, self.head = nn.BatchNorm1d(12), nn.Conv1d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        return self.head(x + F.relu(self.norm(self.depthwise(x)))).mean(-1)


class Conv3d(nn.Module):
    """Convolutions over a volume."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv3d(2, 10, 3, padding=1), nn.BatchNorm3d(10)
        self.body, self.head = nn.Conv3d(10, 8, (1, 3, 3), stride=(1, 2, 2)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.norm(self.stem(x))), 2)
        return self.head(F.adaptive_avg_pool3d(F.relu(self.body(x)), 1).flatten(1))


class BatchNormAfterConcat(nn.Module):
    """Two dense layers: norm and activation stand before the convolution (Huang et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = conv(3, 8), conv(8, 6), conv(14, 6)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(8), nn.BatchNorm2d(14), nn.BatchNorm2d(20)
        self.head = conv(20, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.first(F.relu(self.norm1(x)))], 1)
        x = torch.cat([x, self.second(F.relu(self.norm2(x)))], 1)
        return self.head(F.relu(self.norm3(x)))
