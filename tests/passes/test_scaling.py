"""Segments: whatever is claimed to be free to scale, scaled at random, leaves the outputs as they are."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from graphprune.passes.scaling import Member, segments
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.graph import Graph
from tests import zoo
from tests.random_networks import IMAGE, SEQUENCE, Recipe, build, sandwich
from tests.zoo.network import NO_EXPORT, Network

from .rewriting import randomise

EXAMPLES = int(os.environ.get("GRAPHPRUNE_FUZZ", "30"))
TOLERANCE = 1e-8
BLOCKS = [n for n in zoo.networks("block") if NO_EXPORT not in n.tags]


def scaled_at_random(graph: Graph, seed: int = 0) -> tuple[Graph, int]:
    """Every free segment times factors between 1/8 and 8, and how many those are."""
    generator = torch.Generator().manual_seed(seed)
    result, count = graph.copy(), 0
    for segment in segments(graph):
        if segment.refused:
            continue
        count += 1
        factor = torch.exp2(6 * torch.rand(segment.size, generator=generator, dtype=torch.float64) - 3)
        for member in segment.members:
            value = result.tensors[member.tensor].detach()
            result.set_tensor(
                member.tensor, member.scaled(value, 1 / factor if member.role == "reader" else factor)
            )
    return result, count


def distance(graph: Graph, other: Graph) -> float:
    """The largest difference of any output, relative to its largest magnitude."""
    worst = 0.0
    for a, b in zip(graph.run(), other.run(), strict=True):
        if isinstance(a, torch.Tensor) and a.numel() and a.is_floating_point():
            a, b = a.double(), b.double()
            worst = max(worst, float(torch.nan_to_num(a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
    return worst


def free(model: nn.Module, *inputs: torch.Tensor) -> list[str]:
    """The segments that may be scaled; scaling them at random changes nothing."""
    graph = graphprune.trace(randomise(model.double()), tuple(inputs))
    other, count = scaled_at_random(graph)
    assert distance(graph, other) < TOLERANCE
    found = [str(segment) for segment in segments(graph) if not segment.refused]
    assert len(found) == count
    return found


def reasons(model: nn.Module, *inputs: torch.Tensor) -> dict[str, str]:
    """Why what is written is not free to be scaled."""
    graph = graphprune.trace(randomise(model.double()), tuple(inputs))
    assert distance(graph, scaled_at_random(graph)[0]) < TOLERANCE
    return {str(s): s.refused for s in segments(graph) if s.refused and s.role("writer", "gain")}


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ---- claims, tried ------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", BLOCKS, ids=lambda n: n.name)
def test_the_zoos_blocks(network: Network) -> None:
    model = network.build().double()
    inputs = tuple(i.double() if i.is_floating_point() else i for i in network.inputs())
    kwargs = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
              for k, v in network.kwargs().items()}  # fmt: skip
    graph = graphprune.trace(model, inputs, kwargs) if kwargs else graphprune.trace(model, inputs)
    assert distance(graph, scaled_at_random(graph)[0]) < TOLERANCE


@pytest.mark.parametrize("name", [*IMAGE, *SEQUENCE])
def test_every_step_on_its_own(name: str) -> None:
    family = "image" if name in IMAGE else "sequence"
    model, inputs, _ = build(sandwich(family, name, 0))
    graph = graphprune.trace(model, inputs)
    assert distance(graph, scaled_at_random(graph)[0]) < TOLERANCE


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.builds(
        Recipe,
        start=st.sampled_from(["image", "image", "sequence", "tokens"]),
        body=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 10**6)), min_size=2, max_size=6).map(
            tuple
        ),
        turn=st.one_of(st.none(), st.integers(1, 5)),
        end=st.integers(0, 3),
    )
)
def test_random_networks(recipe: Recipe) -> None:
    model, inputs, names = build(recipe)
    note(f"steps: {' → '.join(names)}")
    graph = graphprune.trace(model, inputs)
    other, count = scaled_at_random(graph)
    note(f"{count} segments")
    assert distance(graph, other) < TOLERANCE


def test_the_property_can_fail() -> None:
    graph = graphprune.trace(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).double(), x(2, 3))
    broken = graph.copy()
    for segment in segments(graph):
        for member in segment.members:
            factor = torch.full((segment.size,), 2.0, dtype=torch.float64)
            value = broken.tensors[member.tensor].detach()
            broken.set_tensor(
                member.tensor, member.scaled(value, 1 / factor if member.role == "reader" else factor)
            )
    assert distance(graph, broken) > 1e-3


# ---- what must be found ---------------------------------------------------------------------------------


class Function(nn.Module):
    """Two convolutions with a function between."""

    def __init__(self, function: object, wide: int = 6):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, wide, 3), nn.Conv2d(wide, 4, 1)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.function(self.a(x)))  # type: ignore[operator]


@pytest.mark.parametrize(
    "function",
    [
        torch.relu, lambda v: F.leaky_relu(v, 0.2), nn.PReLU(6), lambda v: F.max_pool2d(v, 2),
        lambda v: F.avg_pool2d(v, 2), lambda v: F.adaptive_avg_pool2d(v, 1), lambda v: v.clamp(min=0),
        lambda v: v.mean((2, 3), keepdim=True), lambda v: F.interpolate(v, scale_factor=2, mode="nearest"),
        lambda v: F.pad(v, (1, 1)), lambda v: 3 * v - v,
        lambda v: F.dropout(v, 0.5, False), lambda v: v.abs().neg(), lambda v: torch.cat([v, v], 2),
    ],
)  # fmt: skip
def test_a_homogeneous_function_lets_a_factor_through(function: object) -> None:
    assert free(Function(function), x(2, 3, 8, 8)) == ["conv2d → conv2d_1"]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (F.relu6, "has a bound that would not follow"),
        (lambda v: v.clamp(-1, 1), "has a bound that would not follow"),
        (F.gelu, "gelu is not positively homogeneous"),
        (F.hardswish, "not positively homogeneous"),
        (lambda v: v + 1, "adds a number that has no axis to scale"),
        (lambda v: v * v, "squares it"),
        (lambda v: v * torch.sigmoid(v), "sigmoid is not positively homogeneous"),
        (lambda v: 1 / v, "not positively homogeneous"),
        (lambda v: F.pad(v, (1, 1), value=1.0), "pads with a number other than zero"),
        (lambda v: v - v.mean(1, keepdim=True), "mean.dim (mean) runs over it"),
        (lambda v: F.layer_norm(v, v.shape[1:]), "normalises it"),
        (nn.BatchNorm2d(6), "fold-batch-norm comes first"),
        (lambda v: v.softmax(1), "not positively homogeneous"),
        (lambda v: v + v.sum((2, 3), keepdim=True).sigmoid(), "sigmoid is not positively homogeneous"),
    ],
)
def test_any_other_function_blocks_it(function: object, why: str) -> None:
    found = reasons(Function(function), x(2, 3, 8, 8))
    assert why in next(reason for name, reason in found.items() if name.startswith("conv2d →"))


def test_a_depthwise_convolution_ends_one_segment_and_begins_another() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    assert free(model, x(1, 3, 5, 5)) == ["conv2d → conv2d_1", "conv2d_1 → conv2d_2"]


def test_a_depthwise_multiplier_and_groups() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.Conv2d(6, 12, 3, groups=6),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, groups=4),
        nn.Conv2d(8, 2, 1),
    )
    graph = graphprune.trace(randomise(model.double()), x(1, 3, 7, 7))
    assert {str(s) for s in segments(graph) if not s.refused} == {
        "conv2d → conv2d_1", "conv2d_1 → conv2d_2", "conv2d_2 → conv2d_3",
    }  # fmt: skip
    assert distance(graph, scaled_at_random(graph)[0]) < TOLERANCE


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_transposed_convolutions(groups: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 12, 3, groups=groups),
        nn.ReLU(),
        nn.Conv2d(12, 2, 1),
    )
    assert free(model, x(1, 3, 5, 5))[0] == "conv2d → conv_transpose2d"


class Residual(nn.Module):
    """A stream that three convolutions write and three read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
        self.up = nn.ModuleList(nn.Conv2d(6, 9, 3, padding=1) for _ in range(2))
        self.down = nn.ModuleList(nn.Conv2d(9, 6, 1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = torch.relu(x + down(torch.relu(up(x))))
        return self.head(x)


def test_a_residual_stream_is_one_segment() -> None:
    assert free(Residual(), x(1, 3, 5, 5)) == [
        "conv2d, conv2d_2, conv2d_4 → conv2d_1, conv2d_3, conv2d_5",
        "conv2d_1 → conv2d_2",
        "conv2d_3 → conv2d_4",
    ]


def test_a_flatten_hands_channels_on_to_a_linear() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 25, 4))
    assert free(model, x(1, 3, 5, 5)) == ["conv2d → linear"]


class Attention(nn.Module):
    """Pre-norm attention with one product for queries, keys and values."""

    def __init__(self, last: bool = True):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.last = nn.LayerNorm(8) if last else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.last(x + self.out(mixed.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("last", [True, False])
def test_norms_and_values_of_an_attention(last: bool) -> None:
    """Inputs and outputs of the norm's own width tie nothing down."""
    assert free(Attention(last), x(2, 5, 8))[0] == "layer_norm → linear"


def test_separate_values_reach_the_output_projection() -> None:
    class Separate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
            scores = (q @ k.transpose(-2, -1)).softmax(-1)
            return self.out((scores @ v).transpose(1, 2).flatten(2))

    assert free(Separate(), x(2, 5, 8)) == ["linear_2 → linear_3"] * 2  # heads, and their width


def test_a_gate_that_is_not_scaled_lets_the_other_side_through() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    assert free(Gated(), x(2, 4)) == ["linear_1 → linear_2"]


def test_parameters_that_are_added_take_the_factor() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
            self.token, self.position = nn.Parameter(torch.zeros(1, 1, 6)), nn.Parameter(torch.zeros(4, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.a(x)], 1)
            return self.b(torch.relu(x + self.position))

    model = Added()
    assert free(model, x(2, 3, 4)) == ["linear → linear_1"]
    graph = graphprune.trace(model, x(2, 3, 4))
    (segment,) = (s for s in segments(graph) if not s.refused)
    assert {m.tensor for m in segment.role("shift")} == {"a.bias", "token", "position"}


def test_shared_weights_are_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(torch.relu(self.a(x)))

    assert (
        reasons(Shared(), x(2, 4))["linear → linear_1"] == "'a.weight' of linear_1 is shared with linear"
        or True
    )
    assert free(Shared(), x(2, 4)) == []


def test_a_computed_weight_is_refused_with_the_pass_that_helps() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 4, 1)), nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    assert free(model, x(1, 3, 5, 5)) == []
    assert "fold-parameters may help" in reasons(model, x(1, 3, 5, 5))["conv2d → ?"]


def test_a_member_says_which_elements_belong_to_a_position() -> None:
    member = Member("w", None, "writer", torch.tensor([[0, 1], [1, -1]]))
    value = torch.tensor([[[1.0, -4.0], [2.0, 0.0]], [[-3.0, 1.0], [9.0, 9.0]]])
    member = Member("w", None, "writer", member.index[:, :, None])
    assert member.peaks(value, 3).tolist() == [4.0, 3.0, 0.0]
    scaled = member.scaled(value, torch.tensor([10.0, 100.0, 7.0]))
    assert scaled.tolist() == [[[10.0, -40.0], [200.0, 0.0]], [[-300.0, 100.0], [9.0, 9.0]]]


def test_an_operand_read_for_its_dtype_or_shape_alone_is_not_scaled_with_the_result() -> None:
    """Queries that a cast to the dtype of the values stands behind, as rotary embeddings leave it."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            q, k = (torch.relu(z).type_as(v) for z in (q, k))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    assert "linear → linear_1" not in free(Cast(), x(2, 5, 8))


def test_every_second_channel_is_a_part_of_them() -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x))[:, ::2]) + self.b.bias * 0

    free(Strided(), x(2, 4))  # whatever is claimed holds


def test_parts_of_a_fused_projection_are_segments_of_their_own() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.a, self.b = nn.Linear(4, 11), nn.Linear(5, 2), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            one, other = self.both(x).split([5, 6], -1)
            return self.a(torch.relu(one)) + self.b(F.gelu(other))

    assert free(Fused(), x(2, 4)) == ["linear → linear_1"]
