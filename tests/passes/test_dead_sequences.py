"""``remove-dead-channels`` on attention, recurrent layers and embeddings: heads and hidden units are axes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.dead import changes, double, remove, shapes, x
from tests.passes.rewriting import randomise

HEADS, WIDTH, STREAM = 4, 3, 10


class Attention(nn.Module):
    """Self-attention, its projections fused or apart, its core fused or spelled out, keys shared or not."""

    def __init__(self, fused: bool = True, core: str = "sdpa", kv_heads: int = HEADS) -> None:
        super().__init__()
        self.core, self.kv_heads, self.fused = core, kv_heads, fused
        sizes = [HEADS * WIDTH, kv_heads * WIDTH, kv_heads * WIDTH]
        self.sizes = sizes
        if fused:
            self.qkv = nn.Linear(STREAM, sum(sizes))
        else:
            self.q, self.k, self.v = (nn.Linear(STREAM, size) for size in sizes)
        self.out = nn.Linear(HEADS * WIDTH, STREAM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        parts = self.qkv(x).split(self.sizes, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (p.view(batch, length, -1, WIDTH).transpose(1, 2) for p in parts)
        if self.kv_heads != HEADS and self.core != "gqa":
            k, v = (t.repeat_interleave(HEADS // self.kv_heads, 1) for t in (k, v))
        if self.core == "spelled out":
            y = (q @ k.mT * WIDTH**-0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, is_causal=self.core == "causal", enable_gqa=self.core == "gqa"
            )
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))

    def rows(self, which: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of a projection, views that can be written to."""
        index = "qkv".index(which)
        if not self.fused:
            layer = getattr(self, which)
            return layer.weight.data, layer.bias.data
        weight, bias = self.qkv.weight.data, self.qkv.bias.data
        return weight.split(self.sizes)[index], bias.split(self.sizes)[index]


def attention(**options: Any) -> Attention:
    model = randomise(Attention(**options).double(), 7)
    assert isinstance(model, Attention)
    return model


def head(index: int) -> slice:
    return slice(index * WIDTH, (index + 1) * WIDTH)


FORMS = [(fused, core) for fused in (True, False) for core in ("sdpa", "causal", "spelled out")]


@pytest.mark.parametrize(("fused", "core"), FORMS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_heads_whose_projection_is_zero(fused: bool, core: str, dynamic: bool) -> None:
    model = attention(fused=fused, core=core)
    model.out.weight.data[:, head(1)] = 0
    model.out.weight.data[:, head(3)] = 0
    result = remove(model, x(2, 5, STREAM), dynamic_batch=dynamic)
    assert shapes(result.graph, "out.weight") == [(STREAM, 2 * WIDTH)]
    (message,) = changes(result).values()
    assert message == "2 of 4 removed (positions 1, 3): 2 unread"


@pytest.mark.parametrize(("fused", "core"), FORMS)
def test_heads_whose_value_is_constant(fused: bool, core: str) -> None:
    """Whatever the weights, an average of one number is that number; it moves into the output's bias."""
    model = attention(fused=fused, core=core)
    weight, bias = model.rows("v")
    weight[head(0)] = 0
    weight[head(2)] = 0
    bias[head(2)] = 0
    result = remove(model, x(2, 5, STREAM))
    (message,) = changes(result).values()
    assert message == "2 of 4 removed (positions 0, 2): 1 zero, 1 constant, taken into the bias behind it"
    assert sum(t.numel() for t in result.graph.tensors.values()) == (
        2 * 3 * WIDTH * (STREAM + 1) + STREAM * (2 * WIDTH + 1)
    )


@pytest.mark.parametrize(("fused", "core"), FORMS)
def test_width_of_keys_and_values(fused: bool, core: str) -> None:
    """A dimension of the dot product goes where a key is 0 in every head, one of the value where it is."""
    model = attention(fused=fused, core=core)
    (key, key_bias), (value, value_bias) = model.rows("k"), model.rows("v")
    for tensor in (key, key_bias):
        tensor.view(HEADS, WIDTH, -1)[:, 1] = 0
    for tensor in (value, value_bias):
        tensor.view(HEADS, WIDTH, -1)[:, 2] = 0
    result = remove(model, x(2, 5, STREAM))
    assert shapes(result.graph, "out.weight") == [(STREAM, HEADS * (WIDTH - 1))]
    assert sum(t.numel() for n, t in result.graph.tensors.items() if "out" not in n) == (
        3 * HEADS * (WIDTH - 1) * (STREAM + 1)
    )


@pytest.mark.parametrize("core", ["gqa", "sdpa", "spelled out"])
@pytest.mark.parametrize("fused", [True, False])
def test_shared_keys(fused: bool, core: str) -> None:
    """Two groups of two query heads: a group goes as a whole, and a place in every group."""
    model = attention(fused=fused, core=core, kv_heads=2)
    model.out.weight.data[:, head(2)] = 0
    assert not remove(model, x(2, 5, STREAM)).changed
    model.out.weight.data[:, head(3)] = 0
    result = remove(model, x(2, 5, STREAM))
    assert shapes(result.graph, "out.weight") == [(STREAM, 2 * WIDTH)]
    assert sum(t.numel() for n, t in result.graph.tensors.items() if "out" not in n) == 4 * WIDTH * (
        STREAM + 1
    )
    other = attention(fused=fused, core=core, kv_heads=2)
    value, bias = other.rows("v")
    value[head(0)] = 0
    bias[head(0)] = 0
    assert shapes(remove(other, x(2, 5, STREAM)).graph, "out.weight") == [(STREAM, 2 * WIDTH)]


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(need_weights: bool) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(STREAM, 5, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=need_weights)[0]

    model: Any = randomise(Own().double())
    model.attention.out_proj.weight.data[:, 4:6] = 0
    result = remove(model, x(2, 3, STREAM))
    assert shapes(result.graph, "attention.out_proj.weight") == [(STREAM, 8)]
    assert result.graph.tensors["attention.in_proj_weight"].shape == (24, STREAM)


def test_a_mask_that_hides_a_row_keeps_its_constant() -> None:
    """A row that sees nothing is 0, not the constant, so only a zero value can go."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention(fused=False)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            m = self.inner
            q, k, v = (p(x).view(2, 4, HEADS, WIDTH).transpose(1, 2) for p in (m.q, m.k, m.v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return m.out(y.transpose(1, 2).reshape(2, 4, -1))

    model: Any = randomise(Masked().double())
    model.inner.v.weight.data[head(1)] = 0
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    assert not remove(model, x(2, 4, STREAM), mask).changed
    model.inner.v.bias.data[head(1)] = 0
    assert remove(model, x(2, 4, STREAM), mask).changed


def test_transformer_layer() -> None:
    """The stream is statistical and stays; heads and hidden units go."""
    layer = nn.TransformerEncoderLayer(12, 4, 16, activation="gelu", batch_first=True, norm_first=True)
    model: Any = randomise(nn.Sequential(layer).double())
    model[0].linear1.weight.data[[2, 9]] = 0
    model[0].linear2.weight.data[:, 5] = 0
    model[0].self_attn.out_proj.weight.data[:, 3:6] = 0
    result = remove(model, x(2, 5, 12))
    assert shapes(result.graph, "0.linear1.weight", "0.self_attn.in_proj_weight") == [(13, 12), (27, 12)]


# ---- recurrent layers and embeddings -----------------------------------------------------------------


class Recurrent(nn.Module):
    """An embedding, a recurrent layer, a linear one over its output."""

    def __init__(self, kind: type[nn.RNNBase], layers: int = 1, bidirectional: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)
        self.cell = kind(4, 5, layers, bidirectional=bidirectional, batch_first=True)  # type: ignore[arg-type]
        self.head = nn.Linear(10 if bidirectional else 5, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(self.table(tokens))[0])


KINDS: list[type[nn.RNNBase]] = [nn.LSTM, nn.GRU, nn.RNN]
TOKENS = torch.tensor([[1, 7, 10], [0, 3, 3]])


def recurrent(kind: type[nn.RNNBase], **options: Any) -> Recurrent:
    model = randomise(Recurrent(kind, **options).double(), 2)
    assert isinstance(model, Recurrent)
    return model


def unread(model: Recurrent, units: list[int], layers: int = 1, suffixes: tuple[str, ...] = ("",)) -> None:
    """Nothing but these units reads these units."""
    others = [u for u in range(5) if u not in units]
    for layer in range(layers):
        for suffix in suffixes:
            weight = getattr(model.cell, f"weight_hh_l{layer}{suffix}").data.view(-1, 5, 5)
            for unit in units:
                weight[:, others, unit] = 0
                if layer:
                    entering = getattr(model.cell, f"weight_ih_l{layer}{suffix}").data
                    entering.view(-1, 5, len(suffixes), 5)[:, others, :, unit] = 0
    for unit in units:
        model.head.weight.data.view(2, -1, 5)[:, :, unit] = 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_hidden_units_that_only_read_each_other(kind: type[nn.RNNBase], dynamic: bool) -> None:
    model = recurrent(kind)
    model.head.weight.data[:, [1, 4]] = 0
    assert not remove(model, TOKENS).changed  # other units still read them
    unread(model, [1, 4])
    result = remove(model, TOKENS, dynamic_batch=dynamic)
    assert shapes(result.graph, "head.weight", "cell.weight_hh_l0") == [
        (2, 3), (3 * model.cell.weight_hh_l0.shape[0] // 5, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_goes_when_every_layer_and_direction_can_do_without(kind: type[nn.RNNBase]) -> None:
    model = recurrent(kind, layers=2, bidirectional=True)
    unread(model, [2], 2, ("", "_reverse"))
    assert shapes(remove(model, TOKENS).graph, "head.weight") == [(2, 8)]
    model.cell.weight_ih_l1.data[0, 2] = 1.0  # the first layer's unit is read by unit 0 of the second
    assert not remove(model, TOKENS).changed


@pytest.mark.parametrize("kind", KINDS)
def test_embedding_columns(kind: type[nn.RNNBase]) -> None:
    """A column goes when the layer does not read it, or when it holds zeros."""
    model = recurrent(kind)
    model.cell.weight_ih_l0.data[:, 1] = 0
    model.table.weight.data[:, 3] = 0
    result = remove(model, TOKENS)
    assert shapes(result.graph, "table.weight") == [(11, 2)]
    assert "1 unread, 1 zero" in changes(result)["table.weight[1]"]
    model.table.weight.data[:, 3] = 1.5  # a constant has nowhere to go
    assert shapes(remove(model, TOKENS).graph, "table.weight") == [(11, 3)]


def test_embedding_into_a_linear_layer() -> None:
    model: Any = double(nn.Embedding(7, 6), nn.Linear(6, 3))
    model[0].weight.data[:, 2] = 1.5
    model[0].weight.data[:, 4] = 0
    model[1].weight.data[:, 5] = 0
    result = remove(model, torch.tensor([[1, 2], [6, 0]]))
    assert changes(result) == {
        "0.weight[1]": "3 of 6 removed (positions 2, 4, 5): 1 unread, 1 zero, "
        "1 constant, taken into the bias behind it"
    }


def test_addmm_takes_a_constant_and_a_bare_product_does_not() -> None:
    class Product(nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)
            self.weight = nn.Parameter(torch.empty(4, 2))
            self.bias = nn.Parameter(torch.empty(2)) if bias else None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return y @ self.weight if self.bias is None else torch.addmm(self.bias, y, self.weight)

    for bias in (True, False):
        model: Any = randomise(Product(bias).double())
        model.first.weight.data[2] = 0
        assert remove(model, x(5, 3)).changed == bias
        model.first.bias.data[2] = 0
        assert shapes(remove(model, x(5, 3)).graph, "weight") == [(3, 2)]
