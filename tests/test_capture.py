"""Capture: what goes in comes out, and the model is left exactly as it was."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import CaptureError, InputError
from graphprune.graph import Graph
from graphprune.graph_text import source_line


class Call(nn.Module):
    """Something with a weight, for a forward of any signature."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)


def leaves(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value, is_leaf=lambda v: v is None)


def assert_equal(found: Any, wanted: Any) -> None:
    assert torch.utils._pytree.tree_structure(found) == torch.utils._pytree.tree_structure(wanted)
    for a, b in zip(leaves(found), leaves(wanted), strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b)
        else:
            assert a == b


# ---- the model stays -------------------------------------------------------------------------------


def test_modes_weights_and_random_state_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Dropout(), nn.ReLU()))
    model.train()
    model[1].eval()
    next(model[2].children()).eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    random = torch.random.get_rng_state()
    graph = graphprune.trace(model, torch.ones(1, 3, 5, 5))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    x = torch.randn(2, 3, 5, 5)
    with pytest.raises(RuntimeError):
        graph.run(x[:, :2])
    assert_equal(graphprune.trace(model, x)(x), model.eval()(x))


def test_modes_come_back_after_a_failure() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    model = nn.Sequential(nn.Dropout(), Fails()).train()
    model[0].eval()
    with pytest.raises(CaptureError):
        graphprune.trace(model, torch.ones(2))
    assert [m.training for m in model.modules()] == [True, False, True]


def test_captured_graphs_share_no_changes() -> None:
    model = nn.Linear(3, 2)
    graph = graphprune.trace(model, torch.ones(1, 3))
    copied = graph.copy()
    copied.set_tensor("weight", torch.zeros(2, 3))
    assert torch.equal(graph.tensors["weight"], model.weight)
    assert isinstance(copied.tensors["weight"], nn.Parameter)


# ---- inputs and outputs ----------------------------------------------------------------------------------


class Nested(Call):
    def forward(self, first: Any, second: Any, *, scale: torch.Tensor, flag: bool = True) -> Any:
        a, (b, c) = first["a"], second
        total = self.linear(a + b) * scale
        return {"sum": total, "parts": [c.float(), (None, total.argmax(-1))], "flag": flag, "none": None}


def nested_call() -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = ({"a": torch.randn(4, 3)}, (torch.randn(4, 3), torch.tensor([1, 2, 3])))
    return args, {"scale": torch.tensor(2.0)}


def test_nested_arguments_and_results() -> None:
    model = Nested().eval()
    args, kwargs = nested_call()
    graph = graphprune.trace(model, args, kwargs)
    assert graph.signature.names == ("first.a", "second.0", "second.1", "scale")
    args, kwargs = nested_call()
    assert_equal(graph(*args, **kwargs), model(*args, **kwargs))
    assert_equal(graph.module(*args, **kwargs), model(*args, **kwargs))
    assert_equal(graph.module(args[0], second=args[1], **kwargs), model(*args, **kwargs))


def test_a_flag_fixed_at_capture() -> None:
    model = Nested().eval()
    args, kwargs = nested_call()
    graph = graphprune.trace(model, args, {**kwargs, "flag": True})
    assert_equal(graph(*args, **kwargs, flag=True), model(*args, **kwargs))
    with pytest.raises(InputError, match=r"'flag' was fixed to True at capture and cannot be False"):
        graph(*args, **kwargs, flag=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, k: (a, {}), "missing argument 'scale'"),
        (lambda a, k: (a, {**k, "other": torch.ones(1)}), "captured without argument 'other'"),
        (lambda a, k: ((a[0], [a[1]]), k), "argument 'second' has structure"),
        (lambda a, k: (a, {**k, "scale": 3}), "'scale' must be a tensor, got int"),
        (lambda a, k: ((*a, 1, 2, 3), k), "5 positional arguments given"),
        (lambda a, k: (a, {**k, "first": a[0]}), "'first' given twice"),
    ],
)
def test_calls_that_do_not_fit(change: Any, message: str) -> None:
    args, kwargs = nested_call()
    graph = graphprune.trace(Nested().eval(), args, kwargs)
    args, kwargs = change(args, kwargs)
    with pytest.raises(InputError, match=message):
        graph(*args, **kwargs)


def test_keywords_alone() -> None:
    class Keywords(Call):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return ids.float() if mask is None else ids.float() * mask

    model = Keywords()
    inputs = {"ids": torch.tensor([[1, 2]]), "mask": torch.tensor([[True, False]])}
    assert_equal(graphprune.trace(model, inputs)(**inputs), model(**inputs))
    graph = graphprune.trace(model, inputs["ids"])
    assert_equal(graph(inputs["ids"], mask=None), model(inputs["ids"]))
    with pytest.raises(InputError, match="captured without argument 'mask'"):
        graph(**inputs)


def test_integers_booleans_and_scalars() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 3)

        def forward(self, ids: torch.Tensor, keep: torch.Tensor, factor: torch.Tensor) -> Any:
            return self.embedding(ids) * keep[..., None] * factor, ids + 1, keep.logical_not()

    model = Table()
    inputs = (torch.tensor([[1, 6]]), torch.tensor([[True, False]]), torch.tensor(2.0))
    graph = graphprune.trace(model, inputs)
    other = (torch.tensor([[0, 3]]), torch.tensor([[True, True]]), torch.tensor(-1.0))
    assert_equal(graph(*other), model(*other))
    assert re.search(r"ids: i64\[1, 2\]\nkeep: bool\[1, 2\]\nfactor: f32\[\]", str(graph))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_precisions(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU()).to(dtype)
    x = torch.randn(2, 3).to(dtype)
    graph = graphprune.trace(model, x)
    assert_equal(graph(x), model(x))
    assert {t.dtype for t in graph.tensors.values()} == {dtype}


def test_an_input_that_nobody_reads_and_one_returned() -> None:
    class Odd(Call):
        def forward(self, x: torch.Tensor, unused: torch.Tensor) -> Any:
            return x, self.linear.bias, 3

    model, inputs = Odd(), (torch.randn(2), torch.randn(5))
    assert_equal(graphprune.trace(model, inputs)(*inputs), model(*inputs))


def test_a_parameter_called_as_an_input_is() -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.input = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([3.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.x + self.input

    model = Clash()
    graph = graphprune.trace(model, torch.ones(4))
    assert_equal(graph(torch.full((4,), 5.0)), torch.full((4,), 13.0))
    assert_equal(graph.module(torch.full((4,), 5.0)), model(torch.full((4,), 5.0)))


# ---- tensors ---------------------------------------------------------------------------------------------


def test_ties_by_every_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.again = nn.ModuleList([self.head])
            self.head.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.again[0](self.embedding(ids))

    model = Tied()
    graph = graphprune.trace(model, torch.tensor([1, 2]))
    assert set(graph.parameters) == {"embedding.weight"}
    assert graph.tied == dict.fromkeys(("head.weight", "again.0.weight"), "embedding.weight")
    assert len(graph.readers("embedding.weight")) == 2
    assert set(graph.module.state_dict()) == set(model.state_dict())


def test_a_shared_module_is_one_set_of_tensors() -> None:
    layer = nn.Linear(3, 3)
    graph = graphprune.trace(nn.Sequential(layer, nn.ReLU(), layer), torch.ones(1, 3))
    assert set(graph.parameters) == {"0.weight", "0.bias"}
    assert len(graph.readers("0.weight")) == 2


def test_buffers_keep_their_persistence() -> None:
    class Buffers(nn.Module):
        kept: torch.Tensor
        derived: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.ones(2))
            self.register_buffer("derived", torch.ones(2), persistent=False)
            self.plain = torch.full((2,), 4.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.kept + self.derived + self.plain

    model = Buffers()
    graph = graphprune.trace(model, torch.ones(2))
    assert_equal(graph(torch.zeros(2)), model(torch.zeros(2)))
    assert "kept" in graph.persistent
    assert "derived" not in graph.persistent
    assert set(graph.module.state_dict()) == {"kept"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(value: float) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[1].get_parameter("weight").data[0, 1] = value
    with pytest.raises(InputError, match=r"weights hold NaN or infinity: 1\.weight; repair the checkpoint"):
        graphprune.trace(model, torch.ones(1, 3))


def test_a_mask_of_minus_infinity_is_no_broken_weight() -> None:
    class Masked(nn.Module):
        mask: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.triu(torch.full((3, 3), float("-inf")), 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.mask).softmax(-1)

    assert_equal(graphprune.trace(Masked(), torch.ones(3, 3))(torch.ones(3, 3)), Masked()(torch.ones(3, 3)))


# ---- errors ------------------------------------------------------------------------------------------------


def test_control_flow_names_the_users_line() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:  # this line
                return x
            return -x

    line = next(
        i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "# this line" in text
    )
    with pytest.raises(CaptureError, match="data-dependent Python control flow") as caught:
        graphprune.trace(Branches(), torch.ones(3))
    assert f"{Path(__file__).name}:{line}" in str(caught.value)
    assert caught.value.exit_code == 4


def test_inputs_that_the_model_does_not_take() -> None:
    with pytest.raises(
        InputError, match=r"does not run on these example inputs.*shapes cannot be multiplied"
    ):
        graphprune.trace(nn.Linear(3, 2), torch.ones(1, 4))


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (lambda x: x, torch.ones(1), "expected an nn.Module or an ExportedProgram, got function"),
        (nn.Linear(3, 2), 3, "example_inputs must be a tensor, a tuple"),
        (nn.Linear(3, 2), torch.ones(0, 3), r"is empty \(shape \(0, 3\)\)"),
    ],
)
def test_wrong_arguments(model: Any, inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        graphprune.trace(model, inputs)


# ---- dynamic batch -----------------------------------------------------------------------------


@pytest.mark.parametrize("example", [1, 2, 5])
def test_dynamic_batch(example: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)
    ).eval()
    graph = graphprune.trace(model, torch.randn(example, 3, 5, 5), dynamic_batch=True)
    assert graph.is_dynamic
    assert not graphprune.trace(model, torch.randn(example, 3, 5, 5)).is_dynamic
    for batch in (1, 7):
        x = torch.randn(batch, 3, 5, 5)
        assert_equal(graph(x), model(x))


def test_dynamic_batch_of_several_inputs() -> None:
    class Pair(Call):
        def forward(self, x: torch.Tensor, y: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return (x + y.reshape(x.shape[0], -1)) @ table

    model = Pair()
    graph = graphprune.trace(
        model, (torch.randn(2, 6), torch.randn(2, 2, 3), torch.randn(6, 4)), dynamic_batch=True
    )
    for batch in (1, 7):
        inputs = (torch.randn(batch, 6), torch.randn(batch, 2, 3), torch.randn(6, 4))
        assert_equal(graph(*inputs), model(*inputs))


def test_a_batch_that_is_baked_in() -> None:
    class Baked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(int(x.shape[0]) * 3).reshape(2, 3) * 2

    with pytest.raises(CaptureError, match=r"cannot keep the batch dimension symbolic.*dynamic_batch=False"):
        graphprune.trace(Baked(), torch.randn(2, 3), dynamic_batch=True)


# ---- exported programs, wrappers, provenance -----------------------------------------------------


def test_exported_programs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).eval()
    x = torch.randn(2, 3, 5, 5)
    graph = graphprune.trace(torch.export.export(model, (x,), strict=False))
    assert_equal(graph(x), model(x))
    assert set(graph.parameters) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    module = graph.module.train()
    assert not torch.equal(module(x), module(x)), "dropout follows the mode here, too"


def test_exported_programs_with_keywords_and_a_dynamic_batch() -> None:
    class Two(Call):
        def forward(self, x: torch.Tensor, *, y: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + y

    model = Two()
    shapes = {"x": {0: torch.export.Dim.DYNAMIC}, "y": {0: torch.export.Dim.DYNAMIC}}
    inputs = (torch.randn(4, 3),), {"y": torch.randn(4, 2)}
    program = torch.export.export(model, *inputs, dynamic_shapes=shapes, strict=False)
    graph = graphprune.trace(program)
    x, y = torch.randn(7, 3), torch.randn(7, 2)
    assert_equal(graph(x, y=y), model(x, y=y))


def test_regions_without_gradients_are_inlined() -> None:
    class Regions(Call):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                y = x * 2
                y.add_(1)
            return self.linear(y)

    model, x = Regions(), torch.randn(2, 3)
    graph = graphprune.trace(model, x)
    assert "wrap" not in str(graph)
    assert_equal(graph(x), model(x))


def test_every_operator_knows_its_module_and_line() -> None:
    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin()  # sine

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    graph = graphprune.trace(Outer(), torch.ones(1))
    (node,) = graph.find(torch.ops.aten.sin.default)
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "# sine" in text)
    assert source_line(node) == f"{__file__}:{line}"
    assert graph.where(node) == f"sin in module 'inner' at {__file__}:{line}"


def test_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        graph = graphprune.trace(model, torch.empty(4, 3))
    assert graph.is_meta
    assert isinstance(graph, Graph)


def test_equal_graphs_have_equal_fingerprints() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 2), nn.ReLU()), torch.ones(1, 3)
    one, two = graphprune.trace(model, x), graphprune.trace(model, x)
    assert one.fingerprint() == two.fingerprint() == one.copy().fingerprint()
    two.set_tensor("0.bias", torch.zeros(2))
    assert one.fingerprint() != two.fingerprint()
