"""What a network of the zoo is, and how its weights are made fit for testing.

Freshly initialised networks hide mistakes: a normalisation with mean 0, variance 1, weight 1 and bias 0
is the identity whatever its channel order, a zero bias may be dropped unnoticed, and a layer scale of
1e-6 makes a whole residual branch invisible. `prepare` therefore makes every parameter matter.

>>> from torch import nn
>>> norm = prepare(nn.BatchNorm2d(4), seed=0)
>>> bool((norm.running_mean != 0).all() and (norm.weight != 1).all() and (norm.bias != 0).all())
True
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Module = TypeVar("Module", bound=nn.Module)

NO_EXPORT = "no-export"

_NORM = re.compile("norm", re.IGNORECASE)
_SCALE = re.compile(r"gamma|layer_?scale|lambda|(^|\.)ls\d*($|\.)|scale$|alpha$", re.IGNORECASE)


@dataclass(frozen=True)
class Network:
    """A small network with example inputs.

    `build` returns it in eval mode, the same weights every time; `inputs` and `kwargs` return the same
    example arguments every time. `requires` names the packages `build` imports; `note` says why, where
    the tag `no-export` says that torch.export does not capture it.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    kwargs: Callable[[], dict[str, Any]] = dict
    tags: frozenset[str] = frozenset()
    requires: tuple[str, ...] = ()
    note: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if (NO_EXPORT in self.tags) != bool(self.note):
            raise ValueError(f"{self.name}: the tag {NO_EXPORT!r} and the note with its reason go together")


def seeded(
    name: str, make: Callable[[], Module], settle_on: Callable[[], tuple[Any, ...]] | None = None
) -> Callable[[], Module]:
    """A builder that makes the module under a seed drawn from `name`, prepared, in eval mode.

    `settle_on` gives the arguments to `settle` it with, which deep networks with batch norm need.
    The caller's random state is left alone. Warnings that a model library raises about itself while
    its module is constructed are dropped: the zoo is about the module, not about the library.
    """

    def build() -> Module:
        seed = seed_of(name)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            model = prepare(make(), seed)
            if settle_on is not None:
                settle(model, settle_on(), seed)
            return model

    return build


def seed_of(name: str) -> int:
    """A seed that depends on the name alone (`hash` would change from process to process)."""
    return zlib.crc32(name.encode()) % 2**31


def normal(*shape: int, seed: int = 0) -> Callable[[], tuple[torch.Tensor]]:
    """A function that returns one standard normal float32 input of `shape`, the same every time."""
    return lambda: (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)),)


def prepare(model: Module, seed: int) -> Module:
    """Randomise the norms, then wake what initialisation left without effect; returns it in eval mode."""
    randomise_norms(model, seed)
    wake(model, seed + 1)
    return model.eval()


@torch.no_grad()
def randomise_norms(model: nn.Module, seed: int) -> None:
    """Draw statistics and affine parameters of every normalisation, in place.

    Running means are N(0, 0.2²), running variances U(0.5, 1.5), biases N(0, 0.2²), and weights
    U(0.6, 1.4) with one in eight negative. A weight that is stored as its distance from one (zeros
    initially, as in Gemma) becomes U(-0.4, 0.4).
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if (
            isinstance(module, _BatchNorm)
            and module.running_mean is not None
            and module.running_var is not None
        ):
            module.running_mean.normal_(0.0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        if not _NORM.search(type(module).__name__):
            continue
        own = dict(module.named_parameters(recurse=False))
        weight, bias = own.get("weight"), own.get("bias")
        if weight is not None and weight.ndim == 1:
            offset = not isinstance(module, _BatchNorm) and bool((weight == 0).all()) and bias is None
            weight.uniform_(-0.4, 0.4, generator=generator) if offset else _signed(weight, generator)
        if bias is not None and bias.ndim == 1:
            bias.normal_(0.0, 0.2, generator=generator)


@torch.no_grad()
def wake(model: nn.Module, seed: int) -> None:
    """Give every parameter an effect that a test can see, in place.

    Layer scales and other gains below 0.2 become order one; biases, tokens and tables that are zero
    become N(0, 0.2²); weights of linear layers and convolutions whose gain (standard deviation times
    the root of the fan-in) is below 0.6 are scaled up to 1, so that deep networks still see their input.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        largest = float(parameter.abs().max())
        if _SCALE.search(name) and largest < 0.2:
            _signed(parameter, generator)
        elif parameter.ndim < 2 and largest == 0:
            parameter.normal_(0.0, 0.2, generator=generator)
        elif largest == 0:
            fan_in = max(parameter[0].numel(), 1)
            parameter.normal_(0.0, max(fan_in**-0.5, 0.05), generator=generator)
    for module in model.modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None or weight.ndim < 2 or "Embedding" in type(module).__name__:
            continue
        # transformers' Conv1D keeps its weight as [in, out]
        fan_in = weight.shape[0] if type(module).__name__ == "Conv1D" else weight[0].numel()
        gain = float(weight.std()) * fan_in**0.5 if weight.numel() > 1 else 1.0
        if 0 < gain < 0.6:
            weight.mul_(1.0 / gain)


@torch.no_grad()
def settle(model: nn.Module, args: tuple[Any, ...], seed: int) -> None:
    """Set the running statistics near those of the layer's input under `args`, in one forward pass.

    Statistics drawn without regard to the input let a network of fifty layers explode, or forget its
    input. So each batch norm takes, just before it is computed, a quarter of every channel's mean plus
    N(0, 0.2²) root mean squares, and the variance around that over all channels times U(0.5, 1.5).

    A quarter, because centring is what makes a deep network with batch norm chaotic (Yang et al. 2019,
    "A mean field theory of batch normalization"): with whole means, rounding errors grow a thousandfold
    in Inception-v4; without any, its output no longer depends on its input.
    """
    generator = torch.Generator().manual_seed(seed)

    def take(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, _BatchNorm)
        if module.running_mean is None or module.running_var is None:
            return
        x = inputs[0].transpose(0, 1).flatten(1)
        rms = x.square().mean().sqrt().clamp(min=1e-3)
        centre = 0.25 * x.mean(1) + 0.2 * rms * torch.randn(x.shape[0], generator=generator)
        scale = (x - centre[:, None]).square().mean()
        module.running_mean.copy_(centre)
        module.running_var.copy_(scale * (0.5 + torch.rand(x.shape[0], generator=generator)))

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    handles = [module.register_forward_pre_hook(take) for module in norms]
    try:
        if norms:
            model(*args)
    finally:
        for handle in handles:
            handle.remove()


def _signed(parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Fill with U(0.6, 1.4), one value in eight negative."""
    sign = torch.where(torch.rand(parameter.shape, generator=generator) < 0.125, -1.0, 1.0)
    parameter.uniform_(0.6, 1.4, generator=generator).mul_(sign)
