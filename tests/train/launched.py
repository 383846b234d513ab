"""What two processes train, and one: run by ``accelerate launch`` and imported by the tests.

python -m tests.train.launched FILE writes the trained parameters and what finetune returned.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from graphprune.train import AttentionTransfer, Distillation, Hint, SoftTargets, finetune


class Network(nn.Module):
    """Without batch norm, which would look at each process's part of a batch alone."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, channels, 3), nn.Conv2d(channels, channels, 3)
        self.fc = nn.Linear(channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, 1, 8, 8]`` to ``[n, 3]``."""
        return self.fc(self.conv2(torch.tanh(self.conv1(x))).tanh().mean((2, 3)))


def train(each: int = 1) -> dict[str, Any]:
    """Parameters of student and adapters, losses, scores and steps after three epochs with everything on.

    Args:
        each: how many batches' gradients a step has.
    """
    from accelerate import Accelerator

    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        student, teacher = Network(4), Network(6).eval()
        images, labels = torch.randn(37, 1, 8, 8), torch.randint(3, (37,))
    # Batches of 9: parts of 5 and 4, and a last batch of one sample, which both processes get.
    data = DataLoader(TensorDataset(images, labels), batch_size=9, shuffle=True)
    terms = [SoftTargets(), AttentionTransfer("conv1"), Hint("conv2")]
    distillation = Distillation(teacher, student, terms, example=images[:2])

    def accuracy(module: nn.Module) -> float:
        return float((module(images).argmax(1) == labels).float().mean())

    training = finetune(
        student, data, F.cross_entropy, lr=1e-2, epochs=3, clip=0.5, distillation=distillation,
        penalties=[lambda: 1e-3 * student.conv1.weight.abs().sum()], evaluate=accuracy,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95),
        accelerator=Accelerator(gradient_accumulation_steps=each),
    )  # fmt: skip
    return {
        "parameters": {**student.state_dict(), **distillation.state_dict()},
        "losses": list(training.losses),
        "scores": list(training.scores),
        "steps": training.steps,
    }


def main() -> None:
    """Train, and let the main process write what came out, with the number of processes."""
    from accelerate import PartialState

    found = train()
    state = PartialState()
    if state.is_main_process:
        torch.save({**found, "processes": state.num_processes}, sys.argv[1])


if __name__ == "__main__":
    main()
