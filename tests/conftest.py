"""Fixtures and hooks every test shares.

The operator schemas must exist before anything imports torchvision, and timm and transformers import it
too, so they are declared here, at the moment pytest loads this file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.zoo import torchvision_schemas

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may reach for a download
torchvision_schemas.declare()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Latency tables and tuning databases of tests are not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Name the markers the zoo uses, so that this directory also runs on its own."""
    config.addinivalue_line("markers", "slow: minutes long; left out of the quick run")
    config.addinivalue_line("markers", "network: builds a whole network of a model library")
