"""Small networks of every shape that a quantizer has to know, and what an int8 runtime makes of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from graphprune.backend import Audit
from graphprune.graph import Graph
from graphprune.pipeline import LOSSLESS, Context, PassResult, Pipeline
from graphprune.registry import backends, passes
from graphprune.target import get

CPU = get("cpu")


def images(*shape: int, seed: int = 0, count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def norm(channels: int) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5), ("running_mean", -0.5, 0.5),
                                ("running_var", 0.5, 2.0)):  # fmt: skip
            getattr(made, name).uniform_(low, high)
    return made


class Residual(nn.Module):
    def __init__(self, channels: int = 8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), norm(channels), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), norm(channels), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), norm(channels))
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = F.relu(x + self.b(self.a(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Inverted(nn.Module):
    """MobileNetV3's block: depthwise, hard swish, squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 16, 1), norm(16), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), norm(16), nn.Hardswish())
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1), norm(8))
        self.head = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(self.project(x * gate))


class Dense(nn.Module):
    """A concatenation, a clamp, padding before a convolution, SiLU, average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(16, 8, 3, stride=2), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu6(self.a(x)), F.relu(self.b(x))], 1)
        x = self.c(F.pad(x, (0, 1, 0, 1)))
        return self.d(F.avg_pool2d(F.silu(x), 2))


class Block(nn.Module):
    """A transformer's encoder layer, with a mask if it is given one."""

    def __init__(self, width: int = 32, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        seen = self.first(x)
        q, k, v = (layer(seen).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in self.qkv)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Words(nn.Module):
    """A vocabulary that is the output layer's weight, too, around a transformer's layer."""

    def __init__(self, tied: bool = True):
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.block = Block()
        self.head = nn.Linear(32, 50, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block(self.table(ids)))


def lossless(model: nn.Module, *inputs: Tensor) -> Graph:
    torch.manual_seed(0)
    return Pipeline.parse(LOSSLESS).run(graphprune.trace(model.eval(), inputs)).graph


def run(name: str, graph: Graph, calibration: list[Tensor], **options: object) -> PassResult:
    done: PassResult = passes.load(name)(**options).run(graph, Context(calibration=calibration))
    return done


def audit(graph: Graph) -> Audit:
    backend = backends.load("onnxruntime")()
    found: Audit = backend.audit(backend.lower(graph, CPU), CPU)
    return found


def noise(graph: Graph, original: Graph, *inputs: Tensor) -> float:
    """``|a - b| / |b|`` of the first output."""
    a, b = graph.run(*inputs)[0], original.run(*inputs)[0]
    return float((a - b).norm() / b.norm())
