"""The steps that random networks are made of: one small module per family of operators.

A step is a function ``(shape, r) -> (module, shape) | None``: given the shape of one sample's activation,
``(C, H, W)`` for images and ``(T, D)`` for sequences, and a :class:`random.Random`, it makes a module and
says what comes out. ``None`` means that it does not fit this shape.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]
Made = tuple[nn.Module, Shape] | None
Step = Callable[[Shape, random.Random], Made]

IMAGE: dict[str, Step] = {}
SEQUENCE: dict[str, Step] = {}

LIBRARY = torch.library.Library("graphprune_random", "DEF")
LIBRARY.define("mystery(Tensor x) -> Tensor")
LIBRARY.impl("mystery", lambda x: x.flip(1).cumsum(1) * 0.1 + x, "CompositeExplicitAutograd")
LIBRARY.impl("mystery", torch.empty_like, "Meta")


def mystery(x: Tensor) -> Tensor:
    """An operator that graphprune has no rule for."""
    return torch.ops.graphprune_random.mystery(x)  # type: ignore[no-any-return]


class Run(nn.Module):
    """A function of the activation and of named layers; what is not a module is an attribute."""

    def __init__(self, function: Callable[..., Tensor], **layers: Any):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def image(step: Step) -> Step:
    """Register a step on images under its function's name."""
    IMAGE[step.__name__] = step
    return step


def sequence(step: Step) -> Step:
    """Register a step on sequences under its function's name."""
    SEQUENCE[step.__name__] = step
    return step


def width(r: random.Random) -> int:
    return r.choice([4, 6, 8, 12])


def divisor(n: int, r: random.Random) -> int:
    return r.choice([d for d in range(1, n + 1) if n % d == 0])


def normal(r: random.Random, *shape: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(r.randrange(2**31))
    return nn.Parameter(torch.randn(*shape, generator=generator) * 0.5)


# ---- images: convolutions -------------------------------------------------------------------------


@image
def conv(s: Shape, r: random.Random) -> Made:
    c, out, k = s[0], width(r), r.choice([1, 3])
    return nn.Conv2d(c, out, k, padding=k // 2, bias=r.random() < 0.7), (out, *s[1:])


@image
def grouped(s: Shape, r: random.Random) -> Made:
    groups = divisor(s[0], r)
    out = groups * r.randint(1, 3)
    return nn.Conv2d(s[0], out, 3, padding=1, groups=groups), (out, *s[1:])


@image
def depthwise(s: Shape, r: random.Random) -> Made:
    times = r.choice([1, 1, 2])
    return nn.Conv2d(s[0], s[0] * times, 3, padding=1, groups=s[0]), (s[0] * times, *s[1:])


@image
def transposed(s: Shape, r: random.Random) -> Made:
    groups = divisor(s[0], r)
    out = groups * r.randint(1, 2)
    return nn.ConvTranspose2d(s[0], out, 3, padding=1, groups=groups), (out, *s[1:])


@image
def shared(s: Shape, r: random.Random) -> Made:
    layer = nn.Conv2d(s[0], s[0], 1)
    return Run(lambda m, x: m.layer(m.layer(x).relu()), layer=layer), s


@image
def swapped_kernel(s: Shape, r: random.Random) -> Made:
    """One weight both forwards and transposed."""
    weight = normal(r, width(r), s[0], 1, 1)
    return Run(lambda m, x: F.conv_transpose2d(F.conv2d(x, m.weight).relu(), m.weight), weight=weight), s


# ---- images: normalisations -----------------------------------------------------------------------


@image
def batch_norm(s: Shape, r: random.Random) -> Made:
    return nn.BatchNorm2d(s[0], affine=r.random() < 0.8), s


@image
def group_norm(s: Shape, r: random.Random) -> Made:
    return nn.GroupNorm(divisor(s[0], r), s[0]), s


@image
def instance_norm(s: Shape, r: random.Random) -> Made:
    return (nn.InstanceNorm2d(s[0], affine=True), s) if s[1] * s[2] > 1 else None


@image
def layer_norm_2d(s: Shape, r: random.Random) -> Made:
    return Run(lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=nn.LayerNorm(s[0])), s


@image
def normalise(s: Shape, r: random.Random) -> Made:
    return Run(lambda m, x: F.normalize(x, dim=1)), s


@image
def channel_softmax(s: Shape, r: random.Random) -> Made:
    return Run(lambda m, x: x * x.softmax(1)), s


@image
def channel_mean(s: Shape, r: random.Random) -> Made:
    kind = r.choice(["mean", "amax", "sum", "var", "logsumexp"])
    return Run(lambda m, x: x * getattr(x, kind)(1, keepdim=True).sigmoid()), s


# ---- images: branches -----------------------------------------------------------------------------


@image
def residual(s: Shape, r: random.Random) -> Made:
    inner = width(r)
    return Run(
        lambda m, x: x + m.second(m.first(x).relu()),
        first=nn.Conv2d(s[0], inner, 3, padding=1), second=nn.Conv2d(inner, s[0], 1),
    ), s  # fmt: skip


@image
def concat(s: Shape, r: random.Random) -> Made:
    a, b = width(r), width(r)
    keep = r.random() < 0.5
    out = a + b + (s[0] if keep else 0)
    return Run(
        lambda m, x: torch.cat([m.first(x), m.second(x), *([x] if keep else [])], 1),
        first=nn.Conv2d(s[0], a, 1), second=nn.Conv2d(s[0], b, 1),
    ), (out, *s[1:])  # fmt: skip


@image
def split_one_branch(s: Shape, r: random.Random) -> Made:
    if s[0] < 2:
        return None
    at = r.randint(1, s[0] - 1)

    def run(m: Any, x: Tensor) -> Tensor:
        a, b = x.split([at, x.shape[1] - at], 1)
        return torch.cat([m.layer(a), b], 1) if m.first else torch.cat([b, m.layer(a)], 1)

    return Run(run, layer=nn.Conv2d(at, at, 1), first=r.random() < 0.5), s


@image
def chunk_gate(s: Shape, r: random.Random) -> Made:
    if s[0] % 2:
        return None

    def run(m: Any, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return a * b.sigmoid()

    module = Run(lambda m, x: F.glu(x, 1)) if r.random() < 0.5 else Run(run)
    return module, (s[0] // 2, *s[1:])


@image
def halves_swapped(s: Shape, r: random.Random) -> Made:
    half = s[0] // 2
    if not half:
        return None
    return Run(
        lambda m, x: torch.cat([x[:, half:], x[:, :half]], 1) + (x if m.add else 0), add=r.random() < 0.5
    ), s


@image
def strided_channels(s: Shape, r: random.Random) -> Made:
    if s[0] % 2:
        return None
    return Run(lambda m, x: torch.cat([x[:, ::2], x[:, 1::2]], 1)), s


@image
def shuffle(s: Shape, r: random.Random) -> Made:
    g = divisor(s[0], r)
    if r.random() < 0.5:
        return nn.ChannelShuffle(g), s

    def run(m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, g, c // g, h, w).transpose(1, 2).reshape(n, c, h, w)

    return Run(run), s


@image
def squeeze_excitation(s: Shape, r: random.Random) -> Made:
    inner = width(r)
    return Run(
        lambda m, x: x * m.up(m.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid(),
        down=nn.Conv2d(s[0], inner, 1), up=nn.Conv2d(inner, s[0], 1),
    ), s  # fmt: skip


@image
def stacked(s: Shape, r: random.Random) -> Made:
    out = width(r)

    def run(m: Any, x: Tensor) -> Tensor:
        both = torch.stack([m.first(x), m.second(x)], m.dim)
        if m.unbind:
            a, b = both.unbind(m.dim)
            return a * b
        return both.sum(m.dim) if m.dim != 2 else both.flatten(1, 2)

    dim, unbind = r.choice([0, 1, 2]), r.random() < 0.5
    channels = out * 2 if dim == 2 and not unbind else out
    return Run(
        run, first=nn.Conv2d(s[0], out, 1), second=nn.Conv2d(s[0], out, 1), dim=dim, unbind=unbind
    ), (channels, *s[1:])  # fmt: skip


@image
def maxout(s: Shape, r: random.Random) -> Made:
    if s[0] % 2:
        return None
    inner = r.random() < 0.5

    def run(m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, c // 2, 2, h, w).amax(2) if inner else x.view(n, 2, c // 2, h, w).sum(1)

    return Run(run), (s[0] // 2, *s[1:])


# ---- images: moving positions ---------------------------------------------------------------------


@image
def pixel_shuffle(s: Shape, r: random.Random) -> Made:
    if s[0] % 4 == 0 and s[1] * s[2] <= 64:
        return nn.PixelShuffle(2), (s[0] // 4, s[1] * 2, s[2] * 2)
    if s[1] % 2 == 0 and s[2] % 2 == 0 and s[0] <= 12:
        return nn.PixelUnshuffle(2), (s[0] * 4, s[1] // 2, s[2] // 2)
    return None


@image
def resample(s: Shape, r: random.Random) -> Made:
    if s[1] * s[2] > 64:
        return nn.AvgPool2d(2), (s[0], s[1] // 2, s[2] // 2)
    return nn.Upsample(scale_factor=2, mode=r.choice(["nearest", "bilinear"])), (s[0], s[1] * 2, s[2] * 2)


@image
def pool(s: Shape, r: random.Random) -> Made:
    if min(s[1:]) < 4:
        return None
    layer = r.choice([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((s[1] // 2, s[2] // 2))])
    return layer, (s[0], s[1] // 2, s[2] // 2)


@image
def pad_space(s: Shape, r: random.Random) -> Made:
    mode = r.choice(["constant", "replicate"])
    return Run(lambda m, x: F.pad(x, (1, 0, 0, 1), mode=mode)), (s[0], s[1] + 1, s[2] + 1)


@image
def pad_channels(s: Shape, r: random.Random) -> Made:
    a, b = r.randint(0, 2), r.randint(1, 2)
    return Run(lambda m, x: F.pad(x, (0, 0, 0, 0, a, b))), (s[0] + a + b, *s[1:])


@image
def roll_or_flip(s: Shape, r: random.Random) -> Made:
    run = r.choice([
        lambda m, x: x.flip(1), lambda m, x: x.roll(1, 1), lambda m, x: x.flip(3),
        lambda m, x: x.roll((1, 1), (2, 3)),
        lambda m, x: x.cumsum(1), lambda m, x: x.cumsum(2), lambda m, x: x.sort(1).values,
    ])  # fmt: skip
    return Run(run), s


@image
def chosen_channels(s: Shape, r: random.Random) -> Made:
    order = torch.tensor([r.randrange(s[0]) for _ in range(r.randint(1, s[0]))])
    if r.random() < 0.5:
        order = torch.arange(s[0]).roll(r.randrange(s[0]))
    run = r.choice([lambda m, x: x.index_select(1, m.order), lambda m, x: x[:, m.order]])
    return Run(run, order=order), (len(order), *s[1:])


@image
def gathered(s: Shape, r: random.Random) -> Made:
    at = r.choice([1, 3])

    def run(m: Any, x: Tensor) -> Tensor:
        return x.gather(at, x.abs().argsort(at).detach())

    return Run(run), s


@image
def spread(s: Shape, r: random.Random) -> Made:
    times = r.choice([2, 3])
    if s[0] > 12:
        return None
    run = r.choice([
        lambda m, x: x.repeat_interleave(times, 1), lambda m, x: x.repeat(1, times, 1, 1),
        lambda m, x: x.unsqueeze(1).expand(-1, times, -1, -1, -1).flatten(1, 2),
        lambda m, x: x.unsqueeze(2).expand(-1, -1, times, -1, -1).reshape(x.shape[0], -1, *x.shape[2:]),
    ])  # fmt: skip
    return Run(run), (s[0] * times, *s[1:])


@image
def broadcast_from_one(s: Shape, r: random.Random) -> Made:
    out = width(r)
    return Run(
        lambda m, x: m.gate(x).expand(-1, out, -1, -1) * m.scale,
        gate=nn.Conv2d(s[0], 1, 1), scale=normal(r, out, 1, 1),
    ), (out, *s[1:])  # fmt: skip


@image
def einsum_mix(s: Shape, r: random.Random) -> Made:
    out = width(r)
    return Run(lambda m, x: torch.einsum("nchw,oc->nohw", x, m.mix), mix=normal(r, out, s[0])), (out, *s[1:])


@image
def patches(s: Shape, r: random.Random) -> Made:
    if s[1] < 3 or s[0] > 12:
        return None
    size = s[1:]
    return Run(lambda m, x: F.fold(F.unfold(x, 3, padding=1) * m.scale, size, 3, padding=1),
               scale=normal(r, 1)), s  # fmt: skip


@image
def activation(s: Shape, r: random.Random) -> Made:
    return r.choice([nn.ReLU(), nn.GELU(), nn.PReLU(s[0]), nn.Hardswish(), nn.Dropout(0.1)]), s


@image
def scale(s: Shape, r: random.Random) -> Made:
    return Run(
        lambda m, x: x * m.gain + m.shift, gain=normal(r, s[0], 1, 1), shift=normal(r, 1, s[0], 1, 1)
    ), s


@image
def unknown(s: Shape, r: random.Random) -> Made:
    return Run(lambda m, x: mystery(x)), s


# ---- sequences ------------------------------------------------------------------------------------


@sequence
def linear(s: Shape, r: random.Random) -> Made:
    out = width(r)
    return nn.Linear(s[1], out, bias=r.random() < 0.7), (s[0], out)


@sequence
def mlp(s: Shape, r: random.Random) -> Made:
    inner = width(r)
    return Run(
        lambda m, x: x + m.down(F.gelu(m.up(x))), up=nn.Linear(s[1], inner), down=nn.Linear(inner, s[1])
    ), s  # fmt: skip


@sequence
def gated_mlp(s: Shape, r: random.Random) -> Made:
    inner = width(r)

    def run(m: Any, x: Tensor) -> Tensor:
        gate, value = m.up(x).chunk(2, -1)
        return m.down(F.silu(gate) * value)

    return Run(run, up=nn.Linear(s[1], 2 * inner), down=nn.Linear(inner, s[1])), s


@sequence
def layer_norm(s: Shape, r: random.Random) -> Made:
    return r.choice([nn.LayerNorm(s[1]), nn.RMSNorm(s[1])]), s


@sequence
def hand_written_rms(s: Shape, r: random.Random) -> Made:
    return Run(
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.gain, gain=normal(r, s[1])
    ), s  # fmt: skip


@sequence
def batch_norm_1d(s: Shape, r: random.Random) -> Made:
    return Run(lambda m, x: m.norm(x.transpose(1, 2)).transpose(1, 2), norm=nn.BatchNorm1d(s[1])), s


class Attention(nn.Module):
    """Fused or separate projections, grouped queries, eager, fused or einsum products, rotary or not."""

    def __init__(self, dim: int, r: random.Random):
        super().__init__()
        self.kv, self.repeats, self.hd = r.choice([1, 2, 3]), r.choice([1, 1, 2]), r.choice([2, 4])
        self.heads = self.kv * self.repeats
        q, k = self.heads * self.hd, self.kv * self.hd
        self.sizes = [q, k, k]
        self.fused = r.random() < 0.5
        self.unbind = self.fused and self.repeats == 1 and r.random() < 0.5
        self.interleaved = not self.unbind and self.repeats == 1 and self.fused and r.random() < 0.3
        if self.fused:
            self.qkv = nn.Linear(dim, sum(self.sizes))
        else:
            self.q, self.k, self.v = (nn.Linear(dim, n) for n in self.sizes)
        self.core = r.choice(["eager", "sdpa", "einsum", "gqa", "bmm"])
        self.rotary, self.causal = r.random() < 0.3, r.random() < 0.3
        self.proj = nn.Linear(q, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, t, _ = x.shape
        if self.unbind:
            q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, self.hd).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        if self.interleaved:
            return self.qkv(x).view(n, t, self.heads, 3 * self.hd).transpose(1, 2).chunk(3, -1)
        parts = self.qkv(x).split(self.sizes, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (p.view(n, t, -1, self.hd).transpose(1, 2) for p in parts)
        return q, k, v

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 0.3
        return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

    def repeat(self, x: Tensor) -> Tensor:
        if self.repeats == 1:
            return x
        n, h, t, d = x.shape
        return x[:, :, None].expand(n, h, self.repeats, t, d).reshape(n, h * self.repeats, t, d)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.project(x)
        if self.rotary:
            q, k = self.rotate(q), self.rotate(k)
        if self.core == "gqa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
            return self.proj(y.transpose(1, 2).reshape(n, t, -1))
        k, v = self.repeat(k), self.repeat(v)
        if self.core == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
            return self.proj(y.transpose(1, 2).flatten(2))
        if self.core == "bmm":
            weights = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).softmax(-1)
            y = torch.bmm(weights, v.flatten(0, 1)).view(n, self.heads, t, self.hd)
            return self.proj(y.permute(0, 2, 1, 3).reshape(n, t, self.heads * self.hd))
        if self.core == "einsum":
            weights = torch.einsum("nhqd,nhkd->nhqk", q, k).softmax(-1)
            return self.proj(torch.einsum("nhqk,nhkd->nqhd", weights, v).reshape(n, t, -1))
        scores = q @ k.transpose(-2, -1) / self.hd**0.5
        if self.causal:
            scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, -1))


@sequence
def attention(s: Shape, r: random.Random) -> Made:
    inner = Attention(s[1], r)
    return (Run(lambda m, x: x + m.inner(x), inner=inner) if r.random() < 0.5 else inner), s


@sequence
def multihead(s: Shape, r: random.Random) -> Made:
    heads = divisor(s[1], r)
    return Run(
        lambda m, x: m.attention(x, x, x, need_weights=m.weights)[0],
        attention=nn.MultiheadAttention(s[1], heads, batch_first=True), weights=r.random() < 0.5,
    ), s  # fmt: skip


@sequence
def recurrent(s: Shape, r: random.Random) -> Made:
    hidden, both, layers = r.choice([3, 4]), r.random() < 0.4, r.choice([1, 2])
    kind = r.choice([nn.LSTM, nn.GRU, nn.RNN])
    options: dict[str, Any] = {"num_layers": layers, "bidirectional": both, "batch_first": True}
    out = hidden
    if kind is nn.LSTM and r.random() < 0.4:
        out = options["proj_size"] = 2
    layer = kind(s[1], hidden, **options)
    return Run(lambda m, x: m.layer(x)[0], layer=layer), (s[0], out * (1 + both))


@sequence
def conv_1d(s: Shape, r: random.Random) -> Made:
    out = width(r)
    return Run(lambda m, x: m.layer(x.transpose(1, 2)).mT, layer=nn.Conv1d(s[1], out, 3, padding=1)), (
        s[0],
        out,
    )


@sequence
def token_mixer(s: Shape, r: random.Random) -> Made:
    inner = width(r)
    return Run(
        lambda m, x: x + m.down(m.up(x.mT).relu()).mT, up=nn.Linear(s[0], inner), down=nn.Linear(inner, s[0])
    ), s  # fmt: skip


@sequence
def class_token(s: Shape, r: random.Random) -> Made:
    return Run(
        lambda m, x: torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1), token=normal(r, 1, 1, s[1])
    ), (s[0] + 1, s[1])  # fmt: skip


@sequence
def positions(s: Shape, r: random.Random) -> Made:
    if r.random() < 0.5:
        return Run(lambda m, x: x + m.table(m.at), table=nn.Embedding(s[0], s[1]), at=torch.arange(s[0])), s
    return Run(lambda m, x: x + m.table, table=normal(r, s[0], s[1])), s


@sequence
def pooled(s: Shape, r: random.Random) -> Made:
    kind = r.choice(["mean", "sum", "amax"])
    return Run(lambda m, x: x + m.layer(getattr(x, kind)(1, keepdim=True)), layer=nn.Linear(s[1], s[1])), s


@sequence
def tied(s: Shape, r: random.Random) -> Made:
    weight = normal(r, width(r), s[1])
    return Run(lambda m, x: F.linear(F.linear(x, m.weight).relu(), m.weight.t()), weight=weight), s


@sequence
def low_rank(s: Shape, r: random.Random) -> Made:
    rank, out = r.choice([2, 3]), width(r)
    return Run(
        lambda m, x: x @ (m.a @ m.b) + m.base(x), a=normal(r, s[1], rank), b=normal(r, rank, out),
        base=nn.Linear(s[1], out),
    ), (s[0], out)  # fmt: skip


@sequence
def weight_normed(s: Shape, r: random.Random) -> Made:
    return nn.utils.parametrizations.weight_norm(nn.Linear(s[1], s[1])), s


@sequence
def features_in_order(s: Shape, r: random.Random) -> Made:
    run = r.choice([
        lambda m, x: x.cumsum(-1), lambda m, x: x.flip(-1), lambda m, x: x.roll(1, 1),
        lambda m, x: mystery(x),
        lambda m, x: x * x.softmax(-1), lambda m, x: x * x.argmax(-1, keepdim=True), lambda m, x: x.tril(),
        lambda m, x: x.logsumexp(-1, keepdim=True) + x, lambda m, x: x - x.median(-1, keepdim=True).values,
    ])  # fmt: skip
    return Run(run), s


@sequence
def split_heads_and_mix(s: Shape, r: random.Random) -> Made:
    heads = divisor(s[1], r)
    return Run(
        lambda m, x: torch.einsum("nthd,hde->nthe", x.unflatten(-1, (heads, -1)), m.mix).flatten(2),
        mix=normal(r, heads, s[1] // heads, s[1] // heads),
    ), s  # fmt: skip


@sequence
def bilinear(s: Shape, r: random.Random) -> Made:
    out = r.choice([3, 4])
    return Run(lambda m, x: m.layer(x, x), layer=nn.Bilinear(s[1], s[1], out)), (s[0], out)


@sequence
def outer_features(s: Shape, r: random.Random) -> Made:
    a, b = r.choice([2, 3]), r.choice([2, 4])
    return Run(
        lambda m, x: (m.a(x).unsqueeze(-1) * m.b(x).unsqueeze(-2)).flatten(-2),
        a=nn.Linear(s[1], a), b=nn.Linear(s[1], b),
    ), (s[0], a * b)  # fmt: skip


@sequence
def concat_features(s: Shape, r: random.Random) -> Made:
    out = width(r)
    return Run(
        lambda m, x: torch.cat([x, m.layer(x), x.mean(1, keepdim=True).expand_as(x)], -1),
        layer=nn.Linear(s[1], out),
    ), (s[0], 2 * s[1] + out)  # fmt: skip
