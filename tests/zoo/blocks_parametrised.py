"""Hand-written blocks whose weights are computed from other parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import weight_norm as hooked_weight_norm

from tests.zoo.blocks_conv import conv


class _TwoConvs(nn.Module):
    """Stem, body and head; subclasses wrap stem and body."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = self.wrap(conv(3, 12)), self.wrap(conv(12, 10)), conv(10, 5, 1)

    def wrap(self, layer: nn.Conv2d) -> nn.Module:
        """The layer with its weight computed from something else."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(F.relu(self.stem(x)))))


class WeightNorm(_TwoConvs):
    """Weight normalisation as a parametrization."""

    def wrap(self, layer: nn.Conv2d) -> nn.Module:
        return parametrizations.weight_norm(layer)


class WeightNormHook(_TwoConvs):
    """Weight normalisation the older way, by a hook before `forward`."""

    def wrap(self, layer: nn.Conv2d) -> nn.Module:
        return hooked_weight_norm(layer)


class SpectralNorm(_TwoConvs):
    """The weight over its largest singular value: every entry depends on all."""

    def wrap(self, layer: nn.Conv2d) -> nn.Module:
        return parametrizations.spectral_norm(layer)


class _Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


class SymmetricLinear(nn.Module):
    """A symmetric weight, by a parametrization of one's own: rows and columns are the same parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(7, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        parametrize.register_parametrization(self.body, "weight", _Symmetric())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(F.relu(self.embed(x)))))


class WeightStandardised(_TwoConvs):
    """Weight standardisation (Qiao et al. 2019): the statistics of a filter run over its inputs."""

    def wrap(self, layer: nn.Conv2d) -> nn.Module:
        parametrize.register_parametrization(layer, "weight", _Standardise())
        return layer


class _Standardise(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        flat = weight.reshape(1, weight.shape[0], -1)
        return F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(weight) * 0.2


class LowRankUpdate(nn.Module):
    """A linear layer with a low-rank update added (LoRA, Hu et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(7, 12), nn.Linear(12, 16), nn.Linear(16, 5)
        self.down = nn.Parameter(torch.randn(4, 12) * 0.3)
        self.up = nn.Parameter(torch.randn(16, 4) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.embed(x))
        weight = self.body.weight + self.up @ self.down
        return self.head(F.relu(F.linear(x, weight, self.body.bias)))
