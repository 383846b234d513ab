"""Random numbers of a training run, from one seed and the same after a resumption.

Two streams of torch's generator: one that the *data* draws from (shuffling, augmentation), equal in all
processes so that they read the same batches, and one for the *network* (dropout), different in each. Both
start anew every epoch from (seed, epoch), so that an epoch's numbers do not depend on what ran before it.
NumPy's and Python's generators belong to the data. The caller's generators are as they were afterwards.

>>> import torch
>>> with seeded(0) as numbers:
...     numbers.epoch(3, process=0)
...     first = torch.rand(1)
...     with numbers.data():
...         shuffled = torch.randperm(100)
...     second = torch.rand(1)
>>> with seeded(0) as numbers:
...     numbers.epoch(3, process=0)
...     same = torch.equal(torch.rand(2), torch.cat([first, second]))
>>> same
True
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


class Numbers:
    """The two streams of a run; made by :func:`seeded`."""

    def __init__(self, seed: int):
        self._seed = seed
        self._data = torch.get_rng_state()

    def epoch(self, epoch: int, *, process: int) -> None:
        """Start an epoch's streams."""
        seed = _mixed(self._seed, epoch, "data")
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        self._data = torch.get_rng_state()
        torch.manual_seed(_mixed(self._seed, epoch, f"network {process}"))

    @contextmanager
    def data(self) -> Iterator[None]:
        """What runs inside draws from the stream of the data."""
        network = torch.get_rng_state()
        torch.set_rng_state(self._data)
        try:
            yield
        finally:
            self._data = torch.get_rng_state()
            torch.set_rng_state(network)


@contextmanager
def seeded(seed: int) -> Iterator[Numbers]:
    """Streams of their own for a while; every generator is put back afterwards."""
    python, array = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield Numbers(seed)
    finally:
        random.setstate(python)
        numpy.random.set_state(array)


def _mixed(seed: int, epoch: int, stream: str) -> int:
    """A seed for one epoch's stream; a string seeds Python's generator through a hash, which mixes well."""
    return random.Random(f"{seed} {epoch} {stream}").getrandbits(63)
