"""``fold-batch-norm``: expected graphs, every kind of layer against eager PyTorch, every refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.passes.rewriting import apply, assert_same, expected, randomise, refusals, text, trace

BATCH_NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


def fold(model: nn.Module, *inputs: torch.Tensor, tolerance: float = 1e-9) -> tuple[int, list[str], Any]:
    """Fold a float64 network and compare; returns how many batch norms are left, the reasons, the graph."""
    graph = trace(model, *inputs)
    result = apply("fold-batch-norm", graph)
    assert_same(result.graph, model, *inputs, tolerance=tolerance)
    left = len(list(result.graph.find(torch.ops.aten.batch_norm.default)))
    assert left == len(refusals(result))
    return left, refusals(result), result.graph


def double(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    model = nn.Sequential(*layers).double()
    randomise(model, seed)
    return model


def x(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- expected graphs -----------------------------------------------------------------------------


def test_behind_a_convolution() -> None:
    model = double(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    _, _, graph = fold(model, x(2, 3, 5, 5))
    assert text(graph) == expected("""
        input_1: f64[2, 3, 5, 5]
        conv2d: f64[2, 4, 3, 3] = conv2d(input_1, %0.weight, %0.bias)
        relu: f64[2, 4, 3, 3] = relu(conv2d)
        return (relu,)
    """)
    assert set(graph.tensors) == {"0.weight", "0.bias"}
    assert isinstance(graph.tensors["0.bias"], nn.Parameter)
    assert set(graph.module.state_dict()) == {"0.weight", "0.bias"}


def test_before_a_convolution_without_padding() -> None:
    model = double(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, stride=2, padding=0))
    _, _, graph = fold(model, x(2, 3, 7, 7))
    assert text(graph) == expected("""
        input_1: f64[2, 3, 7, 7]
        conv2d: f64[2, 4, 3, 3] = conv2d(input_1, %1.weight, %1.bias, [2, 2])
        return (conv2d,)
    """)


def test_a_matrix_product_gets_an_addition() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3, 4))
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x @ self.weight)

    model = randomise(Product().double())
    _, _, graph = fold(model, x(5, 3))
    assert text(graph) == expected("""
        x: f64[5, 3]
        matmul: f64[5, 4] = matmul(x, %weight)
        add_tensor: f64[5, 4] = add.Tensor(matmul, %bias)
        return (add_tensor,)
    """)


def test_summary_and_notes_name_what_took_it() -> None:
    model = double(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    result = apply("fold-batch-norm", trace(model, x(1, 3, 2, 2)))
    messages = [(n.kind, n.message) for n in result.notes]
    assert messages == [
        ("info", "1 batch norms folded, 1 left"),
        ("changed", "folded into conv2d"),
        ("refused", "reads relu; is an output of the network"),
    ]
    assert "batch_norm in module '1'" in result.notes[1].where


def test_nothing_to_do_is_said() -> None:
    graph = trace(double(nn.Linear(2, 2)), x(1, 2))
    result = apply("fold-batch-norm", graph)
    assert not result.changed
    assert result.notes[0].message == "no batch norm to fold"


# ---- every configuration against eager --------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    transposed = draw(st.booleans())
    options: dict[str, Any] = {
        "kernel_size": draw(st.integers(1, 3)),
        "stride": draw(st.integers(1, 2)),
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if transposed:
        options["padding"] = draw(st.integers(0, 1))
        top = max(options["stride"], options["dilation"]) - 1
        options["output_padding"] = draw(st.integers(0, top))
    else:
        same = options["stride"] == 1 and options["kernel_size"] % 2
        options["padding"] = draw(st.sampled_from([0, 0, 1, 2, "valid", *(["same"] if same else [])]))
        options["padding_mode"] = draw(st.sampled_from(["zeros"] * 3 + ["reflect", "replicate"]))
        if dims == 3 or options["padding"] == 2:
            options["padding_mode"] = "zeros"
    return {
        "dims": dims,
        "transposed": transposed,
        "inputs": groups * draw(st.integers(1, 3)),
        "outputs": groups * draw(st.integers(1, 3)),
        "affine": draw(st.booleans()),
        "behind": draw(st.booleans()),
        "seed": draw(st.integers(0, 9)),
        "options": options,
    }


@settings(max_examples=50, deadline=None, derandomize=True)
@given(convolutions())
def test_convolutions_of_every_kind(config: dict[str, Any]) -> None:
    dims, options = config["dims"], config["options"]
    kind = (TRANSPOSED if config["transposed"] else CONVOLUTIONS)[dims]
    layer = kind(config["inputs"], config["outputs"], **options)
    width = config["outputs"] if config["behind"] else config["inputs"]
    norm = BATCH_NORMS[dims](width, affine=config["affine"], eps=1e-2)
    model = double(*((layer, norm) if config["behind"] else (norm, layer)), seed=config["seed"])
    left, reasons, _ = fold(model, x(2, config["inputs"], *[6] * dims))
    if config["behind"]:
        assert left == 0
    elif config["transposed"]:
        even = options["kernel_size"] == options["stride"] == 1 and not options["padding"]
        assert left == (0 if even and not options["output_padding"] else 1)
        assert all("adds up fewer" in r or "borders" in r for r in reasons)
    else:
        padded = options["padding"] not in (0, "valid") and options["padding_mode"] == "zeros"
        pointwise_same = options["padding"] == "same" and options["kernel_size"] == 1
        assert left == (1 if padded and not pointwise_same else 0)
        assert all("zero padding" in r for r in reasons)


@pytest.mark.parametrize("padding", [1, 2, "same"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_without_a_shift_zero_padding_is_no_obstacle(padding: Any, groups: int) -> None:
    norm = nn.BatchNorm2d(4, affine=False)
    model = double(norm, nn.Conv2d(4, 8, 3, padding=padding, groups=groups))
    assert norm.running_mean is not None
    norm.running_mean.zero_()
    assert fold(model, x(2, 4, 6, 6))[0] == 0


def test_without_a_shift_a_transposed_convolution_takes_it() -> None:
    norm = nn.BatchNorm2d(4, affine=False)
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
    model = double(norm, layer)
    assert norm.running_mean is not None
    norm.running_mean.zero_()
    assert fold(model, x(2, 4, 6, 6))[0] == 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("shape", [(5, 4), (2, 4, 4)])
def test_linears(bias: bool, affine: bool, behind: bool, shape: tuple[int, ...]) -> None:
    class Tokens(nn.Module):
        """Batch norm over [N, C], or over the channels of [N, L, C] by transposing."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 6, bias=bias)
            self.norm = nn.BatchNorm1d(6 if behind else 4, affine=affine)

        def normalise(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x.transpose(1, 2)).transpose(1, 2) if x.dim() == 3 else self.norm(x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.normalise(self.linear(x)) if behind else self.linear(self.normalise(x))

    assert fold(randomise(Tokens().double()), x(*shape))[0] == 0


def test_tokens_flattened_into_the_batch() -> None:
    class LinearNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.linear(x)
            return self.norm(x.flatten(0, 1)).reshape_as(x)

    model = randomise(LinearNorm().double())
    assert fold(model, x(2, 7, 3))[0] == 0
    result = apply("fold-batch-norm", trace(model, x(2, 7, 3), dynamic_batch=True))
    assert not refusals(result)
    assert_same(result.graph, model, x(3, 7, 3))


def test_addmm() -> None:
    class Fused(nn.Module):
        def __init__(self, behind: bool) -> None:
            super().__init__()
            self.weight, self.offset = nn.Parameter(torch.empty(3, 4)), nn.Parameter(torch.empty(4))
            self.norm, self.behind = nn.BatchNorm1d(4 if behind else 3), behind

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x if self.behind else self.norm(x)
            x = torch.addmm(self.offset, x, self.weight)
            return self.norm(x) if self.behind else x

    for behind in (True, False):
        left, _, graph = fold(randomise(Fused(behind).double()), x(5, 3))
        assert left == 0
        assert text(graph).count(" = ") == 1


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)]
)
def test_other_precisions(dtype: torch.dtype, tolerance: float) -> None:
    model = double(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).to(dtype)
    left, _, graph = fold(model, x(2, 3, 6, 6).to(dtype), tolerance=tolerance)
    assert left == 0
    assert {t.dtype for t in graph.tensors.values()} == {dtype}


def test_the_fold_is_computed_in_float64() -> None:
    """The weights are the exactly folded ones, rounded once."""
    model = double(nn.Linear(64, 64), nn.BatchNorm1d(64))
    exact = fold(model, x(4, 64))[2].tensors["0.weight"]
    rounded = model.float()
    reference = double(nn.Linear(64, 64), nn.BatchNorm1d(64))
    reference.load_state_dict(rounded.state_dict())
    exact = fold(reference, x(4, 64))[2].tensors["0.weight"].float()
    single = apply("fold-batch-norm", trace(rounded, x(4, 64).float())).graph.tensors["0.weight"]
    assert torch.equal(single, exact)


# ---- past operators that commute ----------------------------------------------------------------------


class Between(nn.Module):
    """Convolution, something, batch norm; or batch norm, something, linear."""

    def __init__(self, first: nn.Module, between: Any, last: nn.Module):
        super().__init__()
        self.first, self.between, self.last = first, between, last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.between(self.first(x)))


BEHIND = {
    "average pool": (lambda v: F.avg_pool2d(v, 2), nn.BatchNorm2d(4)),
    "average pool, padding not counted": (
        lambda v: F.avg_pool2d(v, 3, padding=1, count_include_pad=False, ceil_mode=True), nn.BatchNorm2d(4)),
    "global pool, flattened": (lambda v: F.adaptive_avg_pool2d(v, 1).flatten(1), nn.BatchNorm1d(4)),
    "mean over space": (lambda v: v.mean((2, 3)), nn.BatchNorm1d(4)),
    "mean, kept": (lambda v: v.mean((2, 3), keepdim=True), nn.BatchNorm2d(4)),
    "flattened space": (lambda v: v.flatten(2), nn.BatchNorm1d(4)),
    "reflected": (lambda v: F.pad(v, (1, 1, 1, 1), mode="reflect"), nn.BatchNorm2d(4)),
    "interpolated": (lambda v: F.interpolate(v, scale_factor=2, mode="bilinear"), nn.BatchNorm2d(4)),
    "bicubic": (lambda v: F.interpolate(v, scale_factor=2, mode="bicubic"), nn.BatchNorm2d(4)),
    "nearest": (lambda v: F.interpolate(v, scale_factor=2), nn.BatchNorm2d(4)),
    "rows selected": (lambda v: v[:, :, 1], nn.BatchNorm1d(4)),
    "rows sliced": (lambda v: v[:, :, 1:3], nn.BatchNorm2d(4)),
    "flipped": (lambda v: v.flip(1, 3), nn.BatchNorm2d(4)),
    "scaled and shifted by numbers": (lambda v: (v * 3 + 2) / 7 - 1, nn.BatchNorm2d(4)),
    "there and back": (lambda v: v.permute(0, 2, 3, 1).movedim(-1, 1), nn.BatchNorm2d(4)),
    "channel shuffle": (
        lambda v: v.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2), nn.BatchNorm2d(4)),
    "dropout in evaluation mode": (lambda v: F.dropout(v, 0.5, False), nn.BatchNorm2d(4)),
}  # fmt: skip


@pytest.mark.parametrize("name", BEHIND)
def test_behind_past(name: str) -> None:
    between, norm = BEHIND[name]
    model = randomise(Between(nn.Conv2d(3, 4, 3), between, norm).double())
    assert fold(model, x(2, 3, 6, 6))[0] == 0


AHEAD = {
    "flattened": (lambda v: v.flatten(1), nn.Linear(64, 5)),
    "pooled": (lambda v: F.avg_pool2d(v, 2).flatten(1), nn.Linear(16, 5)),
    "channels last": (lambda v: v.permute(0, 2, 3, 1), nn.Linear(4, 5)),
    "sliced channels": (lambda v: v[:, 1:3], nn.Conv2d(2, 5, 3)),
    "one row": (lambda v: v[:, :, 0].flatten(1), nn.Linear(16, 5)),
    "mean": (lambda v: v.mean((2, 3)), nn.Linear(4, 5)),
    "shuffled": (lambda v: v.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2), nn.Conv2d(4, 5, 3)),
    "numbers": (lambda v: v * 2 - 1, nn.Conv2d(4, 6, 3, groups=2)),
    "edges": (lambda v: F.pad(v, (1, 1, 1, 1), mode="replicate"), nn.Conv2d(4, 6, 3)),
    "concat with others": (lambda v: torch.cat((torch.ones_like(v), v), 1), nn.Conv2d(8, 6, 3)),
    "transposed, pointwise": (lambda v: v, nn.ConvTranspose2d(4, 6, 1, groups=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", AHEAD)
def test_before_past(name: str) -> None:
    between, layer = AHEAD[name]
    model = randomise(Between(nn.BatchNorm2d(4), between, layer).double())
    assert fold(model, x(2, 4, 4, 4))[0] == 0


def test_max_pool_takes_positive_scales_past() -> None:
    norm = nn.BatchNorm2d(4)
    model = randomise(Between(nn.Conv2d(3, 4, 3), lambda v: F.max_pool2d(v, 2), norm).double())
    left, reasons, _ = fold(model, x(2, 3, 6, 6))
    assert left == 1
    assert "a scale is negative" in reasons[0]
    norm.weight.data.abs_()
    assert fold(model, x(2, 3, 6, 6))[0] == 0


def test_sums_and_concats_of_convolutions() -> None:
    class Branches(nn.Module):
        def __init__(self, join: str) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 3, padding=1)
            self.offset = nn.Parameter(torch.empty(4, 1, 1))
            self.norm, self.join = nn.BatchNorm2d(4 if join == "sum" else 8), join

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.join == "sum":
                return self.norm(torch.add(self.a(x), self.b(x), alpha=2) + self.offset)
            return self.norm(torch.cat((self.a(x), self.b(x)), 1))

    for join in ("sum", "concat"):
        left, _, graph = fold(randomise(Branches(join).double()), x(2, 3, 5, 5))
        assert left == 0
        assert not list(graph.find(torch.ops.aten.batch_norm.default))


def test_chains_fold_fully() -> None:
    norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4)]
    assert fold(double(nn.Conv2d(3, 4, 3), *norms), x(2, 3, 5, 5))[0] == 0
    norms = [nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3)]
    assert fold(double(*norms, nn.Conv2d(3, 4, 3)), x(2, 3, 5, 5))[0] == 0


def test_every_reader_takes_it_or_none_does() -> None:
    class Fork(nn.Module):
        def __init__(self, padding: int) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 3, padding=padding)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.norm(x)
            return self.a(x), self.b(x)

    assert fold(randomise(Fork(0).double()), x(2, 3, 5, 5))[0] == 0
    left, reasons, graph = fold(randomise(Fork(1).double()), x(2, 3, 5, 5))
    assert left == 1
    assert "conv2d_1" in reasons[0]
    assert "zero padding" in reasons[0]
    assert "norm.weight" in graph.tensors


def test_dynamic_batch() -> None:
    model = double(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    result = apply("fold-batch-norm", trace(model, x(2, 3, 6, 6), dynamic_batch=True))
    assert not refusals(result)
    for batch in (1, 7):
        assert_same(result.graph, model, x(batch, 3, 6, 6))


def test_without_weights_shapes_still_fold() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
        result = apply("fold-batch-norm", trace(model, torch.empty(1, 3, 5, 5)))
    assert not refusals(result)
    assert result.graph.is_meta
    assert set(result.graph.tensors) == {"0.weight", "0.bias"}


# ---- refusals ------------------------------------------------------------------------------------------


class Refusing(nn.Module):
    """Small networks in which a batch norm must stay, by name."""

    def __init__(self, case: str):
        super().__init__()
        self.case = case
        self.conv, self.norm, self.other = (
            nn.Conv2d(3, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 3, 1),
        )
        self.scale = nn.Parameter(torch.empty(3, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> Any:
        if self.case == "read elsewhere":
            y = self.conv(x)
            return self.norm(y), y.relu()
        if self.case == "shared weight":
            return self.norm(self.conv(x)).relu() + self.conv(x.relu())
        if self.case == "dense":
            a = self.conv(x)
            return torch.cat((a, self.norm(a).relu()), 1)
        if self.case == "concat":
            y = self.other(x)
            return self.norm(torch.cat((self.conv(x)[:, :1], y[:, 1:]), 1)).relu() + y
        if self.case == "activation":
            return self.norm(self.conv(x).relu())
        if self.case == "computed weight":
            return self.norm(F.conv2d(x, self.conv.weight * self.scale)).relu()
        if self.case == "batch statistics":
            return F.batch_norm(self.conv(x), None, None, training=True)
        if self.case == "input":
            return self.norm(x).relu()
        if self.case == "twice":
            y = self.conv(x)
            return self.norm(y + y).relu()
        if self.case == "space becomes channels":
            return self.norm(self.conv(x).transpose(1, 3)).relu()
        if self.case == "zero padded average":
            return self.norm(F.avg_pool2d(self.conv(x), 3, 1, padding=1)).relu()
        if self.case == "padded before":
            return self.other(F.pad(self.norm(x), (1, 1)))
        raise AssertionError(self.case)


REASONS = {
    "read elsewhere": "conv2d is also read by relu; is an output of the network",
    "shared weight": "the weight 'conv.weight' of conv2d is shared with conv2d (conv2d_1); feeds relu",
    "dense": "conv2d is also read by cat; feeds relu",
    "concat": "reads a concat, where reads slice.Tensor (slice_2), a part of the channels; feeds relu",
    "activation": "reads relu; is an output of the network",
    "computed weight": (
        "the weight of conv2d is computed, by mul.Tensor (mul); fold-parameters may help; feeds relu"),
    "batch statistics": "it normalises with the statistics of the batch",
    "input": "reads input 'x'; feeds relu",
    "twice": "conv2d is also read by add.Tensor (add); feeds relu",
    "space becomes channels": "the normalised channels become dimension 3 there, not dimension 1; feeds relu",
    "zero padded average": "avg_pool2d averages zero padding in, and the shift is not zero; feeds relu",
    "padded before": "reads input 'x'; pad pads with a constant that the shift would not reach",
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS)
def test_refused(case: str) -> None:
    model = randomise(Refusing(case).double())
    size = 3 if case == "space becomes channels" else 5
    graph = trace(model, x(2, 3, size, size))
    result = apply("fold-batch-norm", graph)
    assert refusals(result) == [REASONS[case]]
    assert not result.changed
    assert_same(result.graph, model, x(2, 3, size, size), tolerance=0)


def test_fold_parameters_helps_where_the_reason_says_so() -> None:
    model = randomise(Refusing("computed weight").double())
    folded = apply("fold-parameters", trace(model, x(2, 3, 5, 5))).graph
    result = apply("fold-batch-norm", folded)
    assert not refusals(result)
    assert_same(result.graph, model, x(2, 3, 5, 5))


def test_half_precision_overflow_is_refused() -> None:
    model = double(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].get_buffer("running_var").fill_(1e-5)
    model[1].get_parameter("weight").data.fill_(6e4)
    model = model.half()
    result = apply("fold-batch-norm", trace(model, torch.ones(2, 3).half()))
    assert "would not be finite in torch.float16" in refusals(result)[0]


def test_a_negative_variance_is_refused() -> None:
    model = double(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].get_buffer("running_var").fill_(-1.0)
    result = apply("fold-batch-norm", trace(model, x(2, 3)))
    assert "not finite" in refusals(result)[0]
