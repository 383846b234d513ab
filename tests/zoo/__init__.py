"""The networks that tests and benchmarks share: hand-written blocks, model libraries, real weights.

Building is lazy: listing the zoo imports no model library.

>>> get("tv_resnet18").family
'resnet'
>>> all("torchvision" in network.tags for network in networks("torchvision"))
True
"""

from __future__ import annotations

from functools import lru_cache

from tests.zoo import blocks, real, timm_models, torchvision_models, transformers_models
from tests.zoo.network import NO_EXPORT, Network, prepare, randomise_norms

__all__ = ["NO_EXPORT", "Network", "get", "networks", "prepare", "randomise_norms"]

_SOURCES = (blocks, torchvision_models, timm_models, transformers_models, real)


@lru_cache(maxsize=1)
def _registry() -> dict[str, Network]:
    registry: dict[str, Network] = {}
    for source in _SOURCES:
        for network in source.networks():
            if network.name in registry:
                raise ValueError(f"two networks of the zoo are called {network.name!r}; rename one")
            registry[network.name] = network
    return registry


def networks(tag: str | None = None) -> list[Network]:
    """Every network, or those that carry `tag`, in a fixed order.

    Tags in use: the source (`block`, `torchvision`, `timm`, `transformers`, `real`), the domain
    (`vision`, `text`, `audio`), `classifier`, `segmentation`, and `no-export`.
    """
    return [network for network in _registry().values() if tag is None or tag in network.tags]


def get(name: str) -> Network:
    """The network called `name`; raises KeyError with the nearest names when there is none."""
    registry = _registry()
    if name not in registry:
        import difflib

        near = ", ".join(difflib.get_close_matches(name, registry, n=3)) or "see tests.zoo.networks()"
        raise KeyError(f"no network {name!r} in the zoo; near it: {near}")
    return registry[name]
