"""Our side of the MNIST comparison: trained with plain torch, pruned and rounded while it trains, deployed.

Every artifact is stored compressed, and scored as it comes back from its one file.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from graphprune.passes.quantize.training import convert, prepare
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from benchmarks.published.mnist_data import Network
from graphprune.contents import STORED
from graphprune.graph import Graph
from graphprune.result import Result
from graphprune.train import Distillation, Polynomial, Shrink, SoftTargets, Sparsify

BATCH = 32
# Of the network that loses channels, too; chosen on 500 of the training images, trained on the others.
CHANNELS = 0.66  # of the parameters that go with whole channels: 12 become 4
FINAL = 0.6  # of what is left of the linear layer
LONGER = 8  # times as many epochs, the learning rate falling to zero
BITS = 4
TEMPERATURE = 3.0
RATE = 1e-3

Data = dict[str, Tensor]


def train(data: Data, folder: Path, seed: int, baseline_epochs: int, epochs: int) -> dict[str, Any]:
    """Every variant as an artifact in ``folder``; name → accuracy, bytes stored and unpacked."""
    torch.manual_seed(seed)
    rows: dict[str, Any] = {}
    examples = [data["train_x"][i : i + BATCH] for i in range(0, 512, BATCH)]
    batches = len(data["train_x"]) // BATCH

    def note(name: str, file: str, result: Result) -> None:
        place = result.save(folder / file, overwrite=True, compress="zstd", reference=False)
        stored = place / STORED
        right = graphprune.load(stored, threads=1)(data["test_x"]).argmax(1) == data["test_y"]
        unpacked = sum(entry["bytes"] for entry in graphprune.load(place).manifest["files"].values())
        rows[name] = {
            "accuracy": float(right.float().mean()), "bytes": stored.stat().st_size, "unpacked": unpacked,
            "file": f"{file}/{STORED}", "backend": result.report.backend,
        }  # fmt: skip

    def traced(model: nn.Module) -> Any:
        return graphprune.trace(model.eval(), examples[0], dynamic_batch=True).module

    def deployed(model: nn.Module) -> Result:
        return graphprune.optimize(
            model, examples[0], dynamic_batch=True, backend="onnxruntime", measure=False, threads=1
        )

    def sparse(module: Any, teacher: nn.Module | None, only: tuple[str, ...] = ()) -> Masks:
        optimizer = torch.optim.Adam(module.parameters(), RATE)
        count = epochs if teacher is None else LONGER * epochs
        end = count * batches // (1 if teacher is None else 2)
        final = 0.8 if teacher is None else FINAL
        schedule = Polynomial(initial=0.5, final=final, end=end // 100 * 100, frequency=100)
        sparsify = Sparsify(module, schedule, optimizer=optimizer, only=only)
        fit(module, data, count, seed, optimizer, [sparsify], teacher)
        masks = {name: mask.clone() for name, mask in sparsify.masks.items()}
        sparsify.strip()
        return masks

    def rounded(
        module: Any, masks: Masks, teacher: nn.Module | None, bits: int = 8
    ) -> tuple[Graph, nn.Module]:
        graph = graphprune.trace(module.eval(), examples[0], dynamic_batch=True)
        aware = prepare(graph, calibration=examples, bits=bits)
        optimizer = torch.optim.Adam(aware.module.parameters(), RATE)
        count = epochs if teacher is None else LONGER * epochs
        fit(aware.module, data, count, seed, optimizer, [Hold(aware.module, masks)], teacher)
        return convert(aware), aware.module

    baseline = Network()
    kept = folder / "baseline.pt"
    if kept.exists():
        baseline.load_state_dict(torch.load(kept, weights_only=True))
    else:
        fit(baseline, data, baseline_epochs, seed, torch.optim.Adam(baseline.parameters(), RATE))
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(baseline.state_dict(), kept)
    note("baseline, deployed", "baseline", deployed(baseline))

    module = traced(copy.deepcopy(baseline))
    masks = sparse(module, None)
    note("pruned, deployed", "pruned", deployed(module))
    note("QAT, deployed", "qat", deployed(rounded(traced(copy.deepcopy(baseline)), {}, None)[0].module))
    note("pruned + QAT, deployed", "pruned-qat", deployed(rounded(module, masks, None)[0].module))

    module = traced(copy.deepcopy(baseline))
    optimizer = torch.optim.Adam(module.parameters(), RATE)
    schedule = Polynomial(final=CHANNELS, end=epochs * batches // 50 * 50, frequency=50)
    shrink = Shrink(module, schedule, optimizer=optimizer, budget="params")
    fit(module, data, LONGER * epochs, seed, optimizer, [shrink], baseline)
    masks = sparse(module, baseline, ("dense",))  # the filters left have few weights
    graph, aware = rounded(module, masks, baseline, BITS)
    note("channels + pruned + QAT, deployed", "small", deployed(in_float(module, graph, aware)))
    return rows


Masks = dict[str, Tensor]


class Hold:
    """Zeros stay zeros while rounding is trained."""

    def __init__(self, module: nn.Module, masks: Masks):
        self._held = [(module.get_parameter(name), mask) for name, mask in masks.items()]

    @torch.no_grad()
    def step(self) -> None:
        """After the optimizer's."""
        for parameter, mask in self._held:
            parameter.mul_(mask)


def fit(
    module: nn.Module,
    data: Data,
    epochs: int,
    seed: int,
    optimizer: torch.optim.Optimizer,
    after: Sequence[Any] = (),
    teacher: nn.Module | None = None,
) -> None:
    """A plain loop.

    With a teacher, seven tenths of the loss are its softened answers, the images are :func:`moved`, and the
    rate falls.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = data["train_x"], data["train_y"]
    count = len(images) // BATCH
    taught = None
    if teacher is not None:
        taught = Distillation(teacher.eval(), module, [SoftTargets(temperature=TEMPERATURE)], alpha=0.7)
    steps = epochs * count
    done = 0
    module.train()
    with taught or nullcontext():
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for chosen in order[: count * BATCH].split(BATCH):
                batch, truth = images[chosen], labels[chosen]
                if taught is not None:
                    batch = moved(batch)
                outputs = module(batch)
                loss = F.cross_entropy(outputs, truth)
                if taught is not None:
                    loss = taught.loss(batch, outputs, truth, loss)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if taught is not None:
                    done += 1
                    for group in optimizer.param_groups:
                        group["lr"] = RATE * (1 - done / steps)
                for one in after:
                    one.step()
    module.eval()


def moved(images: Tensor) -> Tensor:
    """Each of ``[n, height, width]`` by -1, 0 or 1 pixels up and sideways, at random."""
    count, height, width = images.shape
    rows, columns = torch.randint(0, 3, (2, count, 1))
    wide = F.pad(images, (1, 1, 1, 1))
    which = torch.arange(count)[:, None, None]
    return wide[which, (rows + torch.arange(height))[:, :, None], (columns + torch.arange(width))[:, None, :]]


def in_float(module: Any, graph: Graph, aware: nn.Module) -> Any:
    """A float network with the values that the graph's integers stand for: few bits stored, floats run."""
    result = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if parameter.dim() > 1:
                scale = graph.tensors[f"{name}.scale"].reshape(-1, *[1] * (parameter.dim() - 1))
                parameter.copy_(graph.tensors[f"{name}.integers"] * scale)
            else:
                parameter.copy_(aware.get_parameter(name))
    return result.eval()
