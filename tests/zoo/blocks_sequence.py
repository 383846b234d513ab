"""Hand-written blocks over sequences: attention in its many spellings, recurrent layers, gated units."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, HEAD = 24, 4, 6


class _SelfAttention(nn.Module):
    """Embedding in front, head behind; subclasses attend in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(7, WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out, self.head = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 5),
        )

    def attend(self, x: Tensor) -> Tensor:
        """`[n, tokens, width]` to the same."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.out(self.attend(self.norm(x))))


class FusedQkvUnbind(_SelfAttention):
    """Queries, keys and values from one layer, taken apart by `unbind` (timm)."""

    def attend(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, WIDTH)


class FusedQkvSplit(_SelfAttention):
    """Taken apart by `split` before the heads, with softmax written out (GPT-2)."""

    def attend(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (part.view(n, t, HEADS, HEAD).transpose(1, 2) for part in self.qkv(x).split(WIDTH, dim=2))
        weights = (q @ k.transpose(-2, -1) * HEAD**-0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).contiguous().view(n, t, WIDTH)


class FusedQkvChunk(_SelfAttention):
    """Taken apart by `chunk` after the heads, each head with its own q, k and v (GPT-NeoX); causal."""

    def attend(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, HEADS, 3 * HEAD).transpose(1, 2).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class EinsumAttention(_SelfAttention):
    """Attention by `einsum`, heads never moved to the front."""

    def attend(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (part.reshape(n, t, HEADS, HEAD) for part in self.qkv(x).chunk(3, dim=-1))
        weights = (torch.einsum("nqhd,nkhd->nhqk", q, k) / HEAD**0.5).softmax(dim=-1)
        return torch.einsum("nhqk,nkhd->nqhd", weights, v).reshape(n, t, WIDTH)


class RelativeBiasAttention(_SelfAttention):
    """A learned bias per head and pair of positions, from a table (Swin)."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * 9 - 1, HEADS) * 0.3)
        position = torch.arange(9)
        self.register_buffer("index", position[:, None] - position[None, :] + 8)

    def attend(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(9, 9, HEADS).permute(2, 0, 1).unsqueeze(0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(n, t, WIDTH)


class _GroupedQueries(nn.Module):
    """Four query heads share two key and value heads (Ainslie et al. 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q = nn.Linear(7, WIDTH), nn.Linear(WIDTH, HEADS * HEAD, bias=False)
        self.k, self.v = nn.Linear(WIDTH, 2 * HEAD, bias=False), nn.Linear(WIDTH, 2 * HEAD, bias=False)
        self.out, self.head = nn.Linear(HEADS * HEAD, WIDTH, bias=False), nn.Linear(WIDTH, 5)

    def rotate(self, x: Tensor) -> Tensor:
        """What subclasses do with positions; nothing here."""
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[n, heads, tokens, head]` each."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        x = self.embed(x)
        q = self.rotate(self.q(x).view(n, t, -1, HEAD).transpose(1, 2))
        k = self.rotate(self.k(x).view(n, t, -1, HEAD).transpose(1, 2))
        v = self.v(x).view(n, t, -1, HEAD).transpose(1, 2)
        return self.head(x + self.out(self.attend(q, k, v).transpose(1, 2).reshape(n, t, -1)))


class RepeatedKeys(_GroupedQueries):
    """Keys and values repeated with `repeat_interleave`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class ExpandedKeys(_GroupedQueries):
    """Keys and values repeated with `expand` and `reshape` (transformers)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, heads, t, d = k.shape
        repeats = q.shape[1] // heads
        k, v = (
            z[:, :, None].expand(n, heads, repeats, t, d).reshape(n, heads * repeats, t, d) for z in (k, v)
        )
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class EnableGqa(_GroupedQueries):
    """The repetition left to the attention operator."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class Rotary(RepeatedKeys):
    """Rotary positions, halves of a head rotated against each other (Su et al. 2021)."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        angle = torch.arange(9)[:, None] * 100.0 ** (-torch.arange(HEAD // 2) / (HEAD // 2))
        self.register_buffer("cos", torch.cat([angle, angle], -1).cos())
        self.register_buffer("sin", torch.cat([angle, angle], -1).sin())

    def rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * self.cos + turned * self.sin


class MultiheadAttention(nn.Module):
    """torch's own layer, self-attention and cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.context, self.head = nn.Linear(7, WIDTH), nn.Linear(7, 10), nn.Linear(WIDTH, 5)
        self.own = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, HEADS, kdim=10, vdim=10, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.context(x)
        x = self.embed(x)
        x = x + self.own(x, x, x, need_weights=False)[0]
        return self.head(x + self.cross(x, memory, memory, need_weights=False)[0])


class TransformerLayer(nn.Module):
    """nn.TransformerEncoderLayer, norm first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(7, WIDTH), nn.Linear(WIDTH, 5)
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 40, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)))


class TiedEmbedding(nn.Module):
    """Input embedding and output head are one parameter (Press & Wolf 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(19, WIDTH), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 19, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))


class Swiglu(nn.Module):
    """Gate and value from one layer, taken apart by `chunk` (Shazeer 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.both, self.down, self.head = (
            nn.Linear(7, 16),
            nn.Linear(16, 44),
            nn.Linear(22, 16),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        gate, value = self.both(x).chunk(2, dim=-1)
        return self.head(x + self.down(F.silu(gate) * value))


class Lstm(nn.Module):
    """Two LSTM layers, the second reading both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = (
            nn.Linear(7, 10),
            nn.LSTM(10, 12, num_layers=2, bidirectional=True, batch_first=True),
        )
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(F.relu(self.embed(x)))[0])


class Gru(nn.Module):
    """A GRU whose last state is read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru, self.head = nn.Linear(7, 10), nn.GRU(10, 12, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(F.relu(self.embed(x)))[1][-1])


class TokenMixer(nn.Module):
    """Mixing over tokens with a linear layer: the token axis is a weight's axis (MLP-Mixer)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.head = (
            nn.Linear(7, 16),
            nn.Linear(9, 14),
            nn.Linear(14, 9),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)
        return self.head(x.mean(1))
