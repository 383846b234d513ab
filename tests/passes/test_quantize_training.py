"""Fake quantizers, training through them, and back to integers."""

from __future__ import annotations

import copy

import pytest
import torch
from graphprune.passes.quantize.training import QuantizeAware, convert, prepare
from torch import Tensor, nn

from graphprune.errors import InputError, PassError
from graphprune.pipeline import Context
from graphprune.quantization.fake import fake_quantize

from .quantizing import Inverted, Residual, Words, audit, images, lossless, noise, run


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_gradients_are_those_of_torch(axis: int) -> None:
    """Oracle: PyTorch's own learnable fake quantizers."""
    torch.manual_seed(0)
    x = torch.randn(5, 7)
    size = 1 if axis < 0 else x.shape[axis]
    scale, zero = torch.rand(size) * 0.2 + 0.05, torch.randint(-2, 3, (size,)).float()
    # PyTorch asks whether the rounded number is in range, the paper whether the number itself is.
    shape = [-1 if d == axis else 1 for d in range(2)]
    place = x / scale.reshape(shape) + zero.reshape(shape)
    x = x.masked_fill(((place > 3) & (place < 3.6)) | ((place < -4) & (place > -4.6)), 0.0)
    grad = torch.randn(5, 7)
    results = []
    for ours in (True, False):
        a, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
        if ours:
            y = fake_quantize(a, s, zero, axis, -4, 3, 0.5)
        elif axis < 0:
            y = torch._fake_quantize_learnable_per_tensor_affine(a, s, zero, -4, 3, 0.5)
        else:
            y = torch._fake_quantize_learnable_per_channel_affine(a, s, zero, axis, -4, 3, 0.5)
        y.backward(grad)
        results.append((y.detach(), a.grad, s.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [Residual, Inverted])
def test_untrained_it_is_what_quantize_gives(model: type[nn.Module]) -> None:
    torch.manual_seed(1)
    graph = lossless(model(), torch.randn(1, 3, 16, 16))
    data = images(1, 3, 16, 16)
    aware = prepare(graph, calibration=data)
    probe = images(1, 3, 16, 16, seed=9, count=1)[0]
    with torch.no_grad():
        found = aware.module(probe)
    converted = convert(aware)
    torch.testing.assert_close(found, converted.run(probe)[0], rtol=1e-2, atol=1e-2)
    assert set(audit(converted).macs) == {"int8"}
    plain = run("quantize", graph, data).graph
    assert [n.target for n in converted.nodes] == [n.target for n in plain.nodes]


def toy() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    x = torch.randn(256, 12)
    return model, x, model(x).argmax(1)


def fit(module: nn.Module, x: Tensor, y: Tensor, steps: int = 150) -> None:
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    module.eval()


def right(network: object, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((network(x).argmax(1) == y).float().mean())  # type: ignore[operator]


def test_two_bits_are_recovered_and_survive_conversion() -> None:
    model, x, y = toy()
    aware = prepare(model, (x[:2],), calibration=[x], bits=2)
    before = right(aware.module, x, y)
    scales = aware.module.get_parameter("0.weight_scale").detach().clone()
    fit(aware.module, x, y)
    assert before < 0.9 < right(aware.module, x, y)
    graph = convert(aware)
    integers = graph.tensors["0.weight.integers"]
    assert set(integers.unique().tolist()) <= {-1, 0, 1}
    assert not torch.equal(graph.tensors["0.weight.scale"], scales)
    trained = torch.cat([graph.run(pair)[0] for pair in x.split(2)])
    assert float((trained.argmax(1) == y).float().mean()) > 0.9


def test_what_was_prepared_is_not_changed_by_training_or_conversion() -> None:
    model, x, y = toy()
    graph = lossless(model, x[:2])
    before, weights = graph.fingerprint(), [p.detach().clone() for p in model.parameters()]
    aware = prepare(graph, calibration=[x])
    fit(aware.module, x, y, steps=3)
    convert(aware)
    assert graph.fingerprint() == before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))


def test_ranges_that_grow_in_training_do_not_bring_activations_back() -> None:
    """A ReLU6 that integers reach beyond would stay behind its convolution, and both would run in float."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad():
        model[0].weight.mul_(20)
    graph, data = lossless(model, torch.randn(1, 3, 16, 16)), images(1, 3, 16, 16)
    aware = prepare(graph, calibration=data)
    with torch.no_grad():
        for name, scale in aware.module.named_parameters():
            if name.endswith("_scale") and "weight" not in name:
                scale.mul_(1.5)
    converted = convert(aware)
    assert set(audit(converted).macs) == {"int8"}
    assert not [n for n in converted.nodes if n.name.startswith(("relu6", "hardtanh"))]
    assert noise(converted, graph, data[0]) < 0.05


def test_copies_and_wrapped_modules_convert() -> None:
    model, x, y = toy()
    aware = prepare(model, (x[:2],), calibration=[x], bits=4)
    twin = copy.deepcopy(aware.module)
    fit(twin, x, y, steps=20)

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module):
            super().__init__()
            self.module = module

    plain, wrapped = convert(aware, twin), convert(aware, Wrapper(twin))
    assert plain.fingerprint() == wrapped.fingerprint() != convert(aware).fingerprint()
    with pytest.raises(InputError, match="not the one that was prepared"):
        convert(aware, nn.Linear(2, 2))


def test_an_exploded_training_is_refused() -> None:
    model, x, _ = toy()
    aware = prepare(model, (x[:2],), calibration=[x])
    with torch.no_grad():
        aware.module.get_parameter("0.weight")[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"'0\.weight' is not finite"):
        convert(aware)


def test_it_compiles_and_exports() -> None:
    model, x, _ = toy()
    aware = prepare(model, (x[:2],), calibration=[x], bits=4)
    program = torch.export.export(aware.module, (x[:2],))
    found = program.module()(x[:2])
    found = found[0] if isinstance(found, tuple) else found
    torch.testing.assert_close(found, aware.module(x[:2]))


def test_a_vocabulary_trains_in_float_and_ends_as_integers() -> None:
    torch.manual_seed(3)
    ids = torch.randint(0, 50, (1, 6))
    graph = lossless(Words(), ids)
    aware = prepare(graph, calibration=[torch.randint(0, 50, (1, 6)) for _ in range(8)])
    converted = convert(aware)
    assert [t.dtype for t in converted.tensors.values() if t.shape == (50, 32)] == [torch.int8]
    assert noise(converted, graph, ids) < 0.05


def test_as_a_pass() -> None:
    model, x, y = toy()
    graph = lossless(model, x[:2])
    context = Context(calibration=[x])
    done = QuantizeAware(function=lambda module: fit(module, x, y, steps=30), bits=3).run(graph, context)
    assert done.changed
    assert set(audit(done.graph).macs) == {"int8"}
    with pytest.raises(PassError, match="needs a function"):
        QuantizeAware().run(graph, context)
