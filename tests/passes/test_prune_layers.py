"""``prune-layers``: the blocks that matter least go, measured one by one, and the rest computes as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphprune.passes.prune_layers import PruneLayers
from graphprune.passes.residual import drop, residual_blocks
from torch import nn

import graphprune
from graphprune.errors import AxisError, InputError, PassError
from graphprune.graph import Graph
from graphprune.instruments import Recorder
from graphprune.pipeline import Context, PassResult, Pipeline
from tests.passes.dead import x
from tests.passes.rewriting import assert_same, expected, randomise, text

STREAM = 6


class Block(nn.Module):
    """A residual block with the norm before or behind it; ``on`` is 0 once it is dropped."""

    def __init__(self, post: bool = False, hidden: int = 5) -> None:
        super().__init__()
        self.norm, self.post, self.on = nn.LayerNorm(STREAM), post, True
        self.up, self.down = nn.Linear(STREAM, hidden), nn.Linear(hidden, STREAM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(self.up(x if self.post else self.norm(x)).relu())
        x = x + y if self.on else x
        return self.norm(x) if self.post else x


def stack(count: int = 4, scales: tuple[float, ...] = (1.0, 0.01, 2.0, 0.1), **options: Any) -> Any:
    """Blocks whose branches are scaled, so that their effects are in the order of the scales."""
    model = randomise(nn.Sequential(*(Block(**options) for _ in range(count))).double(), 2)
    with torch.no_grad():
        for block, scale in zip(model, scales, strict=False):
            block.down.weight *= 0.2 * scale
            block.down.bias *= 0.2 * scale
    return model


def trace(model: nn.Module, *inputs: torch.Tensor) -> Graph:
    return graphprune.trace(model, inputs or (x(2, STREAM),), dynamic_batch=True)


DATA = [x(8, STREAM, seed=s) for s in range(3)]


def run(graph: Graph, calibration: Any = DATA, evaluate: Any = None, **options: Any) -> PassResult:
    before, printed = graph.fingerprint(), str(graph)
    result = PruneLayers(**options).run(graph, Context(calibration=calibration, evaluate=evaluate))
    assert graph.fingerprint() == before
    assert str(graph) == printed
    result.graph.fx.lint()
    assert set(result.graph.tensors) == {str(n.target) for n in result.graph.fx.find_nodes(op="get_attr")}, (
        "tensors that nobody reads"
    )
    return result


def dropped(result: PassResult) -> list[str]:
    return [note.where.split(" ")[0] for note in result.notes if note.kind == "changed"]


# ---- what a block is -----------------------------------------------------------------------------------


def test_expected_graph() -> None:
    graph = graphprune.trace(stack(3), x(2, STREAM))
    assert text(run(graph, layers=1).graph) == expected("""
        input_1: f64[2, 6]
        layer_norm: f64[2, 6] = layer_norm(input_1, [6], %0.norm.weight, %0.norm.bias, 1e-05, False)
        linear: f64[2, 5] = linear(layer_norm, %0.up.weight, %0.up.bias)
        relu: f64[2, 5] = relu(linear)
        linear_1: f64[2, 6] = linear(relu, %0.down.weight, %0.down.bias)
        add: f64[2, 6] = add.Tensor(input_1, linear_1)
        layer_norm_2: f64[2, 6] = layer_norm(add, [6], %2.norm.weight, %2.norm.bias, 1e-05, False)
        linear_4: f64[2, 5] = linear(layer_norm_2, %2.up.weight, %2.up.bias)
        relu_2: f64[2, 5] = relu(linear_4)
        linear_5: f64[2, 6] = linear(relu_2, %2.down.weight, %2.down.bias)
        add_2: f64[2, 6] = add.Tensor(add, linear_5)
        return (add_2,)
    """)


@pytest.mark.parametrize("post", [False, True])
def test_the_rest_is_the_network_without_the_block(post: bool) -> None:
    model = stack(post=post)
    graph = trace(model)
    for gone in range(4):
        block = residual_blocks(graph)[gone]
        assert block.module == block.layer == str(gone)
        model[gone].on = False
        assert_same(drop(graph, [block]), model, x(3, STREAM))
        model[gone].on = True
    for block in model:
        block.on = False
    assert_same(drop(graph, residual_blocks(graph)), model, x(3, STREAM))


def test_convolutional_blocks_with_an_identity_shortcut() -> None:
    from torchvision.models.resnet import BasicBlock, ResNet

    model: Any = ResNet(BasicBlock, [2, 1, 1, 1], num_classes=3)
    model = randomise(model.double())
    graph = graphprune.trace(model, x(1, 3, 32, 32))
    assert [block.layer for block in residual_blocks(graph)] == ["layer1.0", "layer1.1"]
    small = drop(graph, residual_blocks(graph)[:1])
    model.layer1[0] = nn.ReLU()  # behind the sum
    assert_same(small, model, x(1, 3, 32, 32))


def test_what_is_no_block() -> None:
    class Other(nn.Module):
        """Two branches; a branch read elsewhere; a shortcut that is scaled; no product; another shape."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(STREAM, STREAM), nn.Linear(STREAM, STREAM)

        def forward(self, x: torch.Tensor) -> Any:
            first = self.a(x) + self.b(x)
            inner = self.a(first)
            second = (first + inner) * inner
            third = torch.add(self.b(second), second, alpha=2)
            fourth = third + third.square()
            return fourth + self.a(fourth).sum(-1, keepdim=True)

    assert not residual_blocks(trace(randomise(Other().double())))


def test_nested_blocks() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(STREAM, STREAM), nn.Linear(STREAM, STREAM)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return x + (y + self.b(y))

    graph = trace(randomise(Nested().double()))
    inner, outer = residual_blocks(graph)
    assert inner.nodes < outer.nodes
    for greedy in (True, False):
        result = run(graph, layers=1, greedy=greedy, ignored=("add",))
        assert dropped(result) == ["add_1"]
        assert not list(result.graph.find(torch.ops.aten.linear.default))
        with pytest.raises(InputError, match="only 1 can go"):
            run(graph, layers=2, greedy=greedy, ignored=("add",))


def test_a_transformer() -> None:
    """Attention and feed-forward parts are blocks of their own; whole layers go with one."""
    import timm

    model: Any = timm.create_model(
        "vit_tiny_patch16_224", depth=3, img_size=32, embed_dim=48, num_heads=3, num_classes=4
    ).eval()
    image = torch.randn(2, 3, 32, 32)
    graph = graphprune.trace(model, image)
    assert [block.layer for block in residual_blocks(graph)] == [
        f"blocks.{i}" for i in range(3) for _ in range(2)
    ]
    with torch.no_grad():
        for parameter in (*model.blocks[1].attn.proj.parameters(), *model.blocks[1].mlp.fc2.parameters()):
            parameter.mul_(0.01)
    graph = graphprune.trace(model, image)
    result = run(graph, [image], layers=1, whole=True)
    assert dropped(result) == ["blocks.1"]
    del model.blocks[1]
    assert_same(result.graph, model, image, tolerance=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_size_of_a_batch_belongs_to_no_block(dynamic: bool) -> None:
    """The first attention computes it and its multiples, and the others read them, too."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, norm_first=True)
    model: Any = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for parameter in (
            *model.layers[0].self_attn.out_proj.parameters(),
            *model.layers[0].linear2.parameters(),
        ):
            parameter.mul_(0.01)
    tokens = torch.randn(4, 5, 12)
    graph = graphprune.trace(model, tokens, dynamic_batch=dynamic)
    assert [block.layer for block in residual_blocks(graph)] == [
        f"layers.{i}" for i in range(3) for _ in range(2)
    ]
    result = run(graph, [tokens], layers=1, whole=True)
    assert dropped(result) == ["layers.0"]
    assert not [name for name in result.graph.tensors if name.startswith("layers.0.")]
    del model.layers[0]
    assert_same(result.graph, model, torch.randn(2 if dynamic else 4, 5, 12), tolerance=1e-5)


def test_sizes_of_a_block_are_read_behind_it() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(STREAM, STREAM)

        def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            y = self.a(torch.cat([x, x]))
            return (x + y[::2]) * other.view(y.shape[0], -1).sum()

    graph = trace(randomise(Counted().double()), x(4, STREAM), x(4, 2))
    small = drop(graph, residual_blocks(graph))
    assert not small.tensors
    one, other = x(3, STREAM), x(3, 2)
    torch.testing.assert_close(small(one, other), one * other.sum())


# ---- which go ----------------------------------------------------------------------------------------------


def eager_error(model: Any, gone: list[int]) -> float:
    """Relative error of the outputs, by hand."""
    inputs = torch.cat(DATA)
    with torch.no_grad():
        whole = model(inputs)
        for i in gone:
            model[i].on = False
        part = model(inputs)
        for i in gone:
            model[i].on = True
    return float((part - whole).norm() / whole.norm())


def test_the_smallest_effect_goes_first_and_the_report_has_it() -> None:
    model = stack()
    result = run(trace(model), layers=2)
    assert dropped(result) == ["add_1", "add_3"]
    errors = [eager_error(model, gone) for gone in ([1], [1, 3])]
    said = [note.message for note in result.notes if note.kind == "changed"]
    assert said == [f"dropped, with all so far: outputs off by {error:.1%}" for error in errors]
    ranked = [note for note in result.notes if note.kind == "info" and "by effect" in note.message]
    alone = sorted(eager_error(model, [i]) for i in range(4))
    assert [note.message for note in ranked] == [
        f"{i} of 4 by effect: outputs off by {error:.1%} without it" for i, error in enumerate(alone, 1)
    ]


def twins() -> Any:
    """Blocks 0 and 1 together undo each other; each alone matters more than block 2."""
    model = stack(3, (1.0, 1.0, 1.0))
    with torch.no_grad():
        for block, sign in ((model[0], 1.0), (model[1], -1.0)):
            block.up.weight.zero_()
            block.up.bias.fill_(1.0)
            block.down.weight.fill_(sign)
            block.down.bias.zero_()
        model[2].down.weight.mul_(5.0)
    return model


def test_greedy_measures_again() -> None:
    model = twins()
    alone = [eager_error(model, [i]) for i in range(3)]
    assert eager_error(model, [0, 1]) < min(alone)
    first = min(range(3), key=alone.__getitem__)
    pairs = {i: eager_error(model, sorted([first, i])) for i in range(3) if i != first}
    second = min(pairs, key=pairs.__getitem__)
    once = sorted(range(3), key=alone.__getitem__)[:2]
    names = ["add", "add_1", "add_2"]
    assert dropped(run(trace(model), layers=2)) == [names[first], names[second]]
    assert dropped(run(trace(model), layers=2, greedy=False)) == [names[i] for i in once]


def test_all_blocks_in_a_row() -> None:
    for greedy in (True, False):
        result = run(trace(stack()), layers=4, greedy=greedy)
        assert sorted(dropped(result)) == ["add", "add_1", "add_2", "add_3"]
        given = x(3, STREAM)
        assert torch.equal(result.graph(given), given)


def test_evaluate_decides_and_calibration_breaks_ties() -> None:
    def score(module: nn.Module) -> float:
        return float("2.up.weight" in dict(module.named_parameters()))

    graph = trace(stack())
    result = run(graph, None, score, layers=3)
    assert "add_2" not in dropped(result)
    assert "evaluate gives 1" in result.notes[0].message
    assert dropped(run(graph, DATA, score, layers=2)) == ["add_1", "add_3"]


def test_budgets() -> None:
    """For each unit saved: the wide block saves most of it, although its effect is not the smallest."""
    model = stack(3, (1.0, 0.3, 0.2))
    model[1] = randomise(Block(hidden=100).double(), 5)
    model[1].down.weight.data.mul_(0.002)
    model[1].down.bias.data.mul_(0.002)
    graph = trace(model)
    for budget in ("macs", "params"):
        result = run(graph, **{budget: 0.5})
        assert dropped(result) == ["add_1"]
    assert not run(graph, macs=1.0).changed
    left = sum(p.numel() for p in model[0].parameters())
    with pytest.raises(InputError, match=f"params {left} for 10 asked are left when all 2"):
        run(graph, params=10, ignored=("0",))


def test_ignored_and_in_a_pipeline() -> None:
    pipeline = Pipeline.parse("fold-constants,prune-layers{layers=1 ignored=[1]},clean-up")
    recorder = Recorder()
    pipeline.run(trace(stack()), Context(calibration=DATA), [recorder])
    record = recorder.records[1]
    assert [n.where.split(" ")[0] for n in record.notes if n.kind == "changed"] == ["add_3"]
    assert record.certificate is not None
    assert record.after.parameters < record.before.parameters


def test_what_is_left_can_be_pruned_and_remembers_the_whole() -> None:
    """What a repair needs: the network with all its blocks, also after more was removed."""
    graph = trace(stack())
    result = run(graph, layers=1)
    removal = result.graph.removal
    assert removal is not None
    assert removal.original.fingerprint() == graph.fingerprint()
    assert not removal.plan
    smaller = result.graph.apply(result.graph.plan({"2.up.weight[0]": [1, 3]}))
    assert smaller.tensors["2.up.weight"].shape == (3, STREAM)
    assert smaller.removal is not None
    assert dict(smaller.removal.plan.removed) == {"2.up.weight[0]": (1, 3)}
    assert smaller.removal.original.fingerprint() == graph.fingerprint()
    again = run(smaller, layers=1)
    assert again.graph.removal is not None
    assert again.graph.removal.plan == smaller.removal.plan


def test_repair_makes_up_for_a_block_that_is_gone() -> None:
    torch.manual_seed(0)
    graph = trace(stack(scales=(1.0, 1.5, 2.0, 1.0)))
    data = [x(64, STREAM, seed=s) for s in range(4)]
    context = Context(calibration=data)
    dropped = Pipeline.parse("prune-layers{layers=1}").run(graph, context).graph
    repaired = Pipeline.parse("prune-layers{layers=1},repair").run(graph, context).graph
    inputs = x(64, STREAM, seed=9)

    def error(network: Graph) -> float:
        wanted = graph(inputs)
        return float((network(inputs) - wanted).norm() / wanted.norm())

    assert error(repaired) < 0.8 * error(dropped)


def test_the_module_trains_and_the_original_cannot_take_it_back() -> None:
    model = stack()
    result = run(trace(model), layers=2)
    module = result.graph.module.train()
    module(x(3, STREAM)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    with pytest.raises(AxisError, match="refused to write back"):
        result.graph.write_back(model)


def test_outputs_of_every_kind() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = stack()

        def forward(self, x: torch.Tensor) -> Any:
            y = self.body(x)
            return {"values": y, "place": y.argmax(-1)}

    assert dropped(run(trace(Several()), layers=1)) == ["add_1"]

    class Place(Several):
        def forward(self, x: torch.Tensor) -> Any:
            return self.body(x).argmax(-1)

    with pytest.raises(InputError, match="hold no real numbers"):
        run(trace(Place()), layers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs one of layers .* got none"),
        ({"layers": 1, "macs": 0.5}, "got layers and macs"),
        ({"layers": 0}, "at least 1, not 0"),
        ({"layers": 1.5}, "at least 1, not 1.5"),
        ({"layers": True}, "at least 1, not True"),
        ({"layers": 5}, "layers=5 cannot be reached: only 4 can go"),
        ({"macs": -1.0}, "macs must be positive"),
        ({"params": 10**6}, "more than the network has"),
        ({"layers": 1, "ignored": ("layer9",)}, "'layer9' matches no residual block"),
        ({"layers": 1, "calibration": []}, "holds no inputs"),
        ({"layers": 1, "calibration": [torch.full((1, STREAM), torch.inf).double()]}, "not finite"),
        ({"layers": 1, "calibration": None}, "pass calibration= .* or evaluate="),
        ({"layers": 1, "evaluate": lambda module: float("nan")}, "evaluate gave nan"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, PassError), match=message):
        run(trace(stack()), **options)


def test_no_blocks() -> None:
    with pytest.raises(PassError, match="no residual blocks"):
        run(trace(randomise(nn.Sequential(nn.Linear(STREAM, STREAM)).double())), layers=1)


def test_meta_weights() -> None:
    with torch.device("meta"):
        graph = graphprune.trace(nn.Sequential(Block()), torch.empty(2, STREAM))
    with pytest.raises(PassError, match="shapes only"):
        PruneLayers(layers=1).run(graph, Context(calibration=DATA))
