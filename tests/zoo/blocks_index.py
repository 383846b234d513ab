"""Hand-written blocks that pick channels by position: by index, slice, padding, gathering."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.blocks_conv import conv


class IndexSelect(nn.Module):
    """A fixed selection of channels, one of them taken twice."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 10), conv(6, 8), conv(8, 5, 1)
        self.register_buffer("order", torch.tensor([7, 0, 3, 3, 9, 2]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(torch.index_select(F.relu(self.stem(x)), 1, self.order))))


class ChannelPadding(nn.Module):
    """A shortcut that is strided in space and padded with zeros in channels (option A of He et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 10), conv(16, 5, 1)
        self.body = nn.Conv2d(10, 16, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 4))
        return self.head(F.relu(self.body(x) + shortcut))


class StridedSlices(nn.Module):
    """Even and odd channels taken apart, treated differently and put together again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.even, self.head = conv(3, 12), conv(6, 8), conv(14, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(torch.cat([F.relu(self.even(x[:, ::2])), x[:, 1::2]], 1))


class ChannelSlices(nn.Module):
    """Part of the channels convolved, the rest passed on (partial convolution), with `narrow` and slices."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.partial, self.head = conv(3, 14), conv(4, 4), conv(14, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(torch.cat([self.partial(x.narrow(1, 0, 4)), x[:, 4:]], 1))


class UnfoldFold(nn.Module):
    """Convolution by hand: `unfold` makes one column per channel and kernel position, `fold` sums back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.columns, self.head = conv(3, 6), nn.Linear(54, 14), conv(14, 5, 1)
        self.back = nn.Linear(14, 10 * 4)
        self.folded = conv(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        columns = F.unfold(F.relu(self.stem(x)), 3, padding=1).transpose(1, 2)
        hidden = F.relu(self.columns(columns))
        image = hidden.transpose(1, 2).reshape(n, 14, h, w)
        patches = self.back(hidden[:, ::4]).transpose(1, 2)
        coarse = F.fold(patches, (h, w), 2, stride=2)
        return self.head(image) + self.folded(F.relu(coarse))


class Gather(nn.Module):
    """The token that scores highest, gathered from a sequence: the index depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.score = nn.Linear(7, 12), nn.Linear(12, 1)
        self.hidden, self.head = nn.Linear(12, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.embed(x))
        best = self.score(x).argmax(dim=1, keepdim=True)
        token = torch.gather(x, 1, best.expand(-1, 1, x.shape[-1])).squeeze(1)
        return self.head(F.relu(self.hidden(token)))


class RollAndFlip(nn.Module):
    """Channels rolled and flipped before they meet themselves again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 12), conv(12, 10), conv(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.body(x + torch.roll(x, 1, dims=1) + torch.flip(x, dims=(1,)))))


class SpaceShift(nn.Module):
    """Quarters of the channels shifted in four directions (S²-MLP)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 12), conv(12, 10, 1), conv(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = F.relu(self.stem(x)).chunk(4, dim=1)
        moves = ((1, 2), (-1, 2), (1, 3), (-1, 3))
        shifted = [torch.roll(part, step, dims=dim) for part, (step, dim) in zip(parts, moves, strict=True)]
        return self.head(F.relu(self.body(torch.cat(shifted, 1))))


class Maxout(nn.Module):
    """The larger of two halves (Goodfellow et al. 2013): position i binds position i."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 20), conv(10, 12), conv(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).split(10, dim=1)
        return self.head(F.relu(self.body(torch.maximum(left, right))))
