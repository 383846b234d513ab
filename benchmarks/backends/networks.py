"""The networks of the matrix, as batches: the ones that quantization is timed on, and CREPE.

>>> setup = Setup("bert-mini", 2)
>>> [list(t.shape) for t in setup.inputs()]
[[2, 128], [2, 128]]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.quantization.cases import Case, accuracy_case, speed_case

NAMES = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet-lite0", "vit_tiny",
    "bert-mini", "crepe-tiny",
)  # fmt: skip
BATCHES = (1, 8)
CALIBRATION = 16  # samples: nothing but time is measured of the numbers


@dataclass(frozen=True)
class Setup:
    """A network at a batch size."""

    name: str
    batch: int

    @property
    def case(self) -> Case:
        """Where the network and its samples come from."""
        return accuracy_case(self.name) if self.name.startswith("crepe") else speed_case(self.name)

    @property
    def folder(self) -> str:
        """A name for files."""
        return f"{self.name}-b{self.batch}"

    def model(self) -> nn.Module:
        """In evaluation mode, the same every time."""
        return self.case.build().eval()

    def inputs(self) -> tuple[Tensor, ...]:
        """One batch."""
        return self.calibration()[0]

    def calibration(self) -> list[tuple[Tensor, ...]]:
        """Batches of :data:`CALIBRATION` samples in all, at least one."""
        count = max(CALIBRATION, self.batch)
        columns = [torch.cat(parts) for parts in zip(*self.case.samples(count), strict=True)]
        return list(zip(*(column[:count].split(self.batch) for column in columns), strict=True))
