"""Networks as they are in use, with known channels and heads planted dead: just those go, to 1e-5.

Planted in every way a channel can be dead (unread, zero, never firing, constant), where residuals,
concatenations, depthwise convolutions and attention couple channels, beside bait: channels that look dead and
are not, since a border of zeros or another reader sees them. The oracle is the eager network, in float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprune
from graphprune.graph import Graph
from graphprune.pipeline import Context, PassResult, Pipeline
from tests.passes.dead import changes
from tests.passes.rewriting import assert_same

Dead = dict[str, set[int]]


def calm(model: nn.Module, seed: int = 0) -> Any:
    """Random batch norms and biases around what initialisation gives, so that float32 has room."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        drawn = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.data.copy_(0.5 + drawn.abs())
        elif name.endswith(("running_mean", "bias")):
            tensor.data.copy_(0.2 * drawn)
        elif tensor.dim() == 1 and tensor.is_floating_point():
            tensor.data.copy_((1.0 + 0.3 * drawn).clamp(min=0.5))
    return model.eval()


def set_norm(norm: Any, channel: int, value: float) -> None:
    """A batch norm gives one number for a channel."""
    norm.weight.data[channel] = 0.0
    norm.bias.data[channel] = value


def removed(graph: Graph, result: PassResult) -> Dead:
    """Axis → positions that the notes say went, held against the sizes that are left."""
    found = {}
    for axis, message in changes(result).items():
        places = re.search(r"\(positions? ([\d, ]+)\)", message)
        assert places is not None, message
        found[axis] = {int(p) for p in places[1].split(",")}
        left = result.graph.axes[axis].size
        assert left == graph.axes[axis].size - len(found[axis])
    return found


def image(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(4))


# ---- convolutional networks ---------------------------------------------------------------------------


def resnet() -> tuple[nn.Module, tuple[torch.Tensor, ...], Dead]:
    """Inside blocks, and in the stream that two blocks and a projection share."""
    from torchvision.models.resnet import BasicBlock, ResNet

    model = calm(ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10))
    first, second = model.layer1
    set_norm(first.bn1, 3, -0.5)  # never fires
    first.conv2.weight.data[:, 7] = 0  # unread
    set_norm(first.bn1, 9, 0.5)  # bait: constant, and conv2 pads with zeros
    set_norm(model.layer3[1].bn1, 11, 0.0)
    set_norm(model.bn1, 20, -1.0)  # the stream: nothing comes in, no block writes
    for block in (first, second):
        set_norm(block.bn2, 20, 0.0)
    for reader in (first.conv1, second.conv1, model.layer2[0].conv1, model.layer2[0].downsample[0]):
        reader.weight.data[:, 31] = 0  # nobody reads it
    for reader in (first.conv1, second.conv1, model.layer2[0].conv1):
        reader.weight.data[:, 32] = 0  # bait: the projection does
    set_norm(model.layer4[0].bn2, 5, 0.25)  # constant behind everything that pads: the mean of a constant
    set_norm(model.layer4[0].downsample[1], 5, 0.25)
    set_norm(model.layer4[1].bn2, 5, -2.0)
    model.layer4[1].conv1.weight.data[:, 5] = 0
    return model, (image(),), {
        "conv1.weight[0]": {20, 31},
        "layer1.0.conv1.weight[0]": {3, 7},
        "layer3.1.conv1.weight[0]": {11},
        "layer4.0.conv2.weight[0]": {5},
    }  # fmt: skip


def densenet() -> tuple[nn.Module, tuple[torch.Tensor, ...], Dead]:
    """A channel of a concatenation goes where every norm behind it makes it constant."""
    from torchvision.models import DenseNet

    model = calm(DenseNet(growth_rate=8, block_config=(3, 2), num_init_features=16, bn_size=2, num_classes=5))
    block = model.features.denseblock1
    layers = [block.denselayer1, block.denselayer2, block.denselayer3]
    set_norm(layers[0].norm2, 6, -0.1)  # inside the first layer
    for norm in (layers[0].norm1, layers[1].norm1, layers[2].norm1, model.features.transition1.norm):
        set_norm(norm, 4, -0.3)  # channel 4 of the stem
    for norm in (layers[2].norm1, model.features.transition1.norm):
        set_norm(norm, 16 + 8 + 2, -0.3)  # channel 2 of the second layer's
        set_norm(norm, 16 + 5, -0.3)  # bait: the second layer reads channel 5 of the first
    set_norm(model.features.transition1.norm, 16 + 16 + 7, 0.4)  # constant, before a 1×1 convolution
    model.classifier.weight.data[:, 3] = 0  # bait: layers of the second block read it
    model.classifier.weight.data[:, 20 + 8 + 1] = 0  # the last layer's channel 1
    return model, (image(),), {
        "features.conv0.weight[0]": {4},
        "features.denseblock1.denselayer1.conv1.weight[0]": {6},
        "features.denseblock1.denselayer2.conv2.weight[0]": {2},
        "features.denseblock1.denselayer3.conv2.weight[0]": {7},
        "features.denseblock2.denselayer2.conv2.weight[0]": {1},
    }  # fmt: skip


def mobilenet() -> tuple[nn.Module, tuple[torch.Tensor, ...], Dead]:
    """Expanded channels and their depthwise filters are one axis; streams are coupled over blocks."""
    from torchvision.models import MobileNetV2

    model = calm(MobileNetV2(num_classes=7, width_mult=0.35))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            layer.weight.data[:, :, 1, 1] = 1.0  # a filter of negative taps alone, after a ReLU, never fires
    inverted = model.features[3].conv  # expand, depthwise, project, norm; residual
    set_norm(inverted[0][1], 2, -1.0)  # zero, which padding keeps; its depthwise norm gives a constant
    set_norm(inverted[0][1], 5, 9.0)  # bait: 6 in the middle, not at the border
    inverted[1][0].weight.data[8] = 0  # no filter: constant for the projection
    set_norm(inverted[1][1], 13, 3.0)  # constant, too
    inverted[2].weight.data[:, 17] = 0  # unread
    set_norm(model.features[18][1], 100, 20.0)  # 6 everywhere: into the classifier's bias
    model.classifier[1].weight.data[:, 200] = 0
    last = model.features[17].conv
    set_norm(last[3], 1, 0.5)  # constant stream before a 1×1 convolution
    return model, (image(),), {
        "features.3.conv.0.0.weight[0]": {2, 8, 13, 17},
        "features.17.conv.2.weight[0]": {1},
        "features.18.0.weight[0]": {100, 200},
    }  # fmt: skip


def padded(mode: str) -> tuple[nn.Module, tuple[torch.Tensor, ...], Dead]:
    """A constant that is not 0 survives padding with itself, and with zeros only where nothing pads."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            kind = "zeros" if mode == "constant" else mode
            self.second = nn.Conv2d(8, 6, 3, padding=0 if mode == "constant" else 1, padding_mode=kind)
            self.third = nn.Conv2d(6, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.first(x)).relu()
            if mode == "constant":
                x = F.pad(x, (1, 1, 1, 1), value=0.75)
            return self.third(self.second(x).relu())

    model = calm(Padded())
    set_norm(model.norm, 1, -0.5)
    set_norm(model.norm, 2, 0.75)
    set_norm(model.norm, 6, 0.5)
    model.second.weight.data[:, 4] = 0
    model.second.weight.data[3] = 0  # behind it: a constant that a 1×1 convolution takes
    model.second.bias.data[3] = 0.25
    gone = {"zeros": {1, 4}, "constant": {2, 4}}.get(mode, {1, 2, 4, 6})
    return model, (image(12),), {"first.weight[0]": gone, "second.weight[0]": {3}}


# ---- transformers ---------------------------------------------------------------------------------------


def vit() -> tuple[nn.Module, tuple[torch.Tensor, ...], Dead]:
    """Heads and hidden units; each in a fused projection, and with values that are constant."""
    import timm

    model = calm(timm.create_model(
        "vit_tiny_patch16_224", depth=2, img_size=32, embed_dim=64, num_heads=8, num_classes=5
    ))  # fmt: skip
    first, second = model.blocks
    first.attn.proj.weight.data[:, 8:16] = 0  # head 1: nobody reads it
    first.attn.qkv.weight.data[128 + 40 : 128 + 48] = 0  # head 5: its values are its bias
    second.attn.qkv.weight.data[128:136] = 0  # head 0: its values are 0
    second.attn.qkv.bias.data[128:136] = 0
    second.attn.qkv.weight.data[16:24] = 0  # bait: head 2 attends evenly, and its values count
    second.attn.qkv.bias.data[16:24] = 0
    first.mlp.fc1.weight.data[7] = 0  # gelu of a bias
    first.mlp.fc2.weight.data[:, 90] = 0
    return model, (image(),), {
        "blocks.0.attn.qkv.weight[0].1": {1, 5},
        "blocks.0.mlp.fc1.weight[0]": {7, 90},
        "blocks.1.attn.qkv.weight[0].1": {0},
    }  # fmt: skip


def bert(core: str) -> tuple[nn.Module, tuple[torch.Tensor, ...], Dead]:
    """Post-norm, projections apart."""
    from transformers import BertConfig, BertModel

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel(BertConfig(
                vocab_size=40, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                num_attention_heads=6, max_position_embeddings=16, attn_implementation=core,
            ), add_pooling_layer=False)  # fmt: skip

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.bert(tokens)[0]

    model = calm(Hidden())
    first, second = model.bert.encoder.layer
    first.attention.output.dense.weight.data[:, 16:24] = 0  # head 2
    first.attention.self.value.weight.data[32:40] = 0  # head 4, constant
    second.attention.self.value.weight.data[:8] = 0  # head 0, zero
    second.attention.self.value.bias.data[:8] = 0
    second.attention.self.value.weight.data[8:15] = 0  # bait: one dimension of head 1 is not constant
    second.intermediate.dense.weight.data[11] = 0
    second.output.dense.weight.data[:, 3] = 0
    tokens = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(2))
    layer = "bert.encoder.layer."
    return model, (tokens,), {
        layer + "0.attention.self.query.weight[0].0": {2, 4},
        layer + "1.attention.self.query.weight[0].0": {0},
        layer + "1.intermediate.dense.weight[0]": {3, 11},
    }  # fmt: skip


def llama() -> tuple[nn.Module, tuple[torch.Tensor, ...], Dead]:
    """Groups of two queries that share a key and a value, rotary positions, no biases."""
    from transformers import LlamaConfig, LlamaModel

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = LlamaModel(LlamaConfig(
                vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=16, use_cache=False,
            ))  # fmt: skip

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(tokens, use_cache=False)[0]

    model = calm(Hidden())
    first, second = model.model.layers
    first.self_attn.v_proj.weight.data[4:8] = 0  # group 1
    first.self_attn.o_proj.weight.data[:, 24:32] = 0  # group 3, both queries
    second.self_attn.o_proj.weight.data[:, 4:8] = 0  # bait: one query of group 0
    second.mlp.up_proj.weight.data[9] = 0
    tokens = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(2))
    return model, (tokens,), {
        "model.layers.0.self_attn.q_proj.weight[0].0": {1, 3},
        "model.layers.1.mlp.gate_proj.weight[0]": {9},
    }  # fmt: skip


def decoder() -> tuple[nn.Module, tuple[torch.Tensor, ...], Dead]:
    """Self- and cross-attention of torch's own layers."""
    model = calm(nn.TransformerDecoderLayer(24, 6, 40, batch_first=True, norm_first=True))
    model.self_attn.out_proj.weight.data[:, 4:8] = 0
    model.multihead_attn.in_proj_weight.data[48 + 8 : 48 + 12] = 0  # values of head 2
    model.multihead_attn.out_proj.weight.data[:, 20:24] = 0
    model.linear1.weight.data[30] = 0
    model.linear1.bias.data[30] = -1.0  # never fires
    inputs = (torch.randn(2, 5, 24), torch.randn(2, 7, 24))
    return model, inputs, {
        "self_attn.in_proj_weight[0].1": {1},
        "multihead_attn.in_proj_weight[0].0": {2, 5},
        "linear1.weight[0]": {30},
    }  # fmt: skip


Build = Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...], Dead]]
PADDINGS: dict[str, Build] = {
    f"padding-{mode}": lambda mode=mode: padded(mode)  # type: ignore[misc]
    for mode in ("zeros", "constant", "reflect", "replicate", "circular")
}
TRANSFORMERS: dict[str, Build] = {
    "vit": vit, "bert-sdpa": lambda: bert("sdpa"), "bert-eager": lambda: bert("eager"), "llama": llama,
    "decoder": decoder,
}  # fmt: skip
NETWORKS: dict[str, Build] = {
    "resnet": resnet, "densenet": densenet, "mobilenet": mobilenet, **PADDINGS, **TRANSFORMERS,
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_just_what_was_planted_goes(name: str) -> None:
    torch.manual_seed(1)
    model, inputs, planted = NETWORKS[name]()
    graph = graphprune.trace(model, inputs)
    result = Pipeline.parse("remove-dead-channels").passes[0].run(graph, Context())
    assert removed(graph, result) == planted
    assert_same(result.graph, model, *inputs, tolerance=1e-5)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_just_the_planted_heads_go(name: str) -> None:
    torch.manual_seed(1)
    model, inputs, planted = TRANSFORMERS[name]()
    graph = graphprune.trace(model, inputs)
    result = Pipeline.parse("remove-dead-heads").passes[0].run(graph, Context())
    heads = {axis: gone for axis, gone in planted.items() if "attn" in axis or "attention" in axis}
    assert removed(graph, result) == heads
    assert_same(result.graph, model, *inputs, tolerance=1e-5)
