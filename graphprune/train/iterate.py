"""Prune a little, train a little, and again, until a budget is met; a killed run goes on where it stood.

What is removed in small steps with training between costs less than the same at once (Han et al., *Learning
both Weights and Connections*, NIPS 2015; Renda, Frankle and Carbin, *Comparing Rewinding and Fine-tuning*,
ICLR 2020). A round removes a share of what the budget counts, 5 to 10 %, is repaired in closed form, and
trained for 3 to 5 epochs at a tenth of the learning rate the network was trained with, where asked for with
the unpruned network as its teacher. With ``r`` the share a round removes, round ``i`` leaves

    max(budget, whole · (1 - r)^i).

Every round follows from the network before it, the data and the seed alone: ranking, repair and every epoch
draw from generators that start anew. So what is on disk after a round's pruning and after each of its epochs
is all that a run needs, and one that was killed ends with the bits of one that was not (on the same
machine, torch and number of threads; other ones are noted).

>>> import torch
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
>>> batches = [(x := torch.randn(32, 4), x[:, :2]) for _ in range(4)]
>>> result = iterate(model, torch.zeros(2, 4), batches, torch.nn.functional.mse_loss, params=0.5,
...                  per_round=0.25, epochs=1, lr=1e-3)
>>> [round.parameters for round in result.rounds]
[310, 226, 198]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from math import ceil, inf, log
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from graphprune.calibration import replayed
from graphprune.errors import InputError, MissingExtraError
from graphprune.frontend.capture import capture
from graphprune.graph import Graph
from graphprune.plans.budget import absolute
from graphprune.plans.candidates import RESOURCES
from graphprune.plans.plan import CostModel
from graphprune.target import Target, get
from graphprune.textual import make_pass

from .distill import Term
from .iterative_run import Run
from .rounds import Iterated
from .saved import held


def iterate(
    model: nn.Module,
    example_inputs: Any,
    data: Iterable[Any],
    loss: Callable[[Any, Any], torch.Tensor],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    macs: float | None = None,
    params: float | None = None,
    per_round: float = 0.1,
    epochs: int = 4,
    lr: float = 1e-4,
    clip: float | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    distil: Sequence[Term] = (),
    alpha: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    calibration: Iterable[Any] | None = None,
    importance: Any = "auto",
    pruning: Mapping[str, Any] = MappingProxyType({}),
    repair: bool = True,
    target: str | Target = "cpu",
    dynamic_batch: bool = True,
    directory: str | Path | None = None,
    seed: int = 0,
    names: Mapping[str, str] = MappingProxyType({}),
    progress: Callable[[str], None] | None = None,
) -> Iterated:
    """Prune to a budget in rounds with training between them; the model itself is never changed.

    Args:
        model: the trained network.
        example_inputs, example_kwargs: as ``graphprune.optimize`` takes them.
        data: (inputs, targets) batches, read anew every epoch; what it shuffles and draws has to come from
            torch's, NumPy's or Python's global generators, or its own ``generator`` attribute.
        loss: of outputs and targets, a mean over samples.
        macs, params: budgets, a fraction of what the model has (a float up to 1.0) or an absolute number.
        per_round: the share of what is left that a round removes; 0.05 to 0.1 is usual.
        epochs: of training in every round; 3 to 5 is usual.
        lr: learning rate of the default optimizer, AdamW; a tenth of what the network was trained with.
        clip: largest norm of all gradients together.
        optimizer: makes another from a list of parameters; every round starts with a new one.
        distil: terms (:mod:`graphprune.train.distill`) by which the original teaches what is left of it.
        alpha: share of the soft targets among them in the loss; needs terms.
        evaluate: ``module -> float``, for the table; decides nothing.
        calibration: inputs for ranking and repair; by default the first 512 of the training data.
        importance: what ``prune-channels`` ranks by.
        pruning: further options of it but budgets, as in ``{"align": 4, "ignored": ("head",)}``. Widths
            keep the target's alignment, so a round of a small network may go further than its share.
        repair: refit what is left, in closed form, before it is trained.
        target: whose alignment widths keep.
        dynamic_batch: keep the batch size open, which data with a smaller last batch asks for.
        directory: where the state goes, after pruning and after each epoch. With the state of a run of the
            same settings in it, that run goes on; of a finished one, its result is returned. What is
            compared of callables and data is in :mod:`graphprune.train.identity`.
        seed: of everything random.
        names: what a recipe calls data, loss and the other objects: further settings that a state is of.
        progress: called with a line of text as each stage starts.

    Raises:
        InputError: no budget, an option out of range or unknown, no data, or a directory that cannot be
            written or holds the state of another run; before anything is pruned.
        GraphpruneError: the loss became infinite or not a number, or the state could not be written; what
            was written before stands, and the same call goes on from there.
        MissingExtraError: accelerate is not installed.
    """
    asked = {name: value for name, value in (("macs", macs), ("params", params)) if value is not None}
    _check_numbers(asked, per_round, epochs, lr, clip, seed)
    _check_objects(data, loss, optimizer, evaluate)
    _check_teaching(distil, alpha)
    _check_process()
    options = _options(pruning, importance)
    start = capture(model, example_inputs, example_kwargs, dynamic_batch=dynamic_batch)
    place = None if directory is None else Path(directory)
    run = Run(
        start, _budgets(start, asked, per_round), asked, data, loss, per_round, epochs, lr, clip, optimizer,
        distil, alpha, evaluate, replayed(calibration), options, repair, get(target), seed, names, place,
        progress or (lambda line: None),
    )  # fmt: skip
    with held(place):
        return run.all()


def _check_numbers(
    asked: Mapping[str, Any], per_round: float, epochs: int, lr: float, clip: float | None, seed: int
) -> None:
    if not asked:
        raise InputError("give a budget to go to, macs= or params=")
    if not isinstance(per_round, Real) or not 0 < per_round < 1:
        raise InputError(f"per_round is the share a round removes, above 0 and below 1, not {per_round!r}")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise InputError(f"epochs must be a whole number from 0, not {epochs!r}")
    for name, value in (("lr", lr), ("clip", clip)):
        if value is not None and not (isinstance(value, Real) and 0 < value < inf):
            raise InputError(f"{name} must be a number above 0, not {value!r}")
    if not isinstance(seed, Integral):
        raise InputError(f"seed must be a whole number, not {seed!r}")


def _check_objects(data: Any, loss: Any, optimizer: Any, evaluate: Any) -> None:
    if isinstance(data, Iterator):
        raise InputError(
            "data can be read once only, and every epoch reads it anew: pass a list, a DataLoader or an "
            "object whose __iter__ starts anew"
        )
    if isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            "every round's network has other parameters: pass a function that makes the optimizer, as in "
            "lambda parameters: torch.optim.SGD(parameters, 1e-3)"
        )
    for name, value in (("loss", loss), ("optimizer", optimizer), ("evaluate", evaluate)):
        if not callable(value) and (value is not None or name == "loss"):
            raise InputError(f"{name} must be a function, not {value!r}")


def _check_teaching(distil: Any, alpha: float | None) -> None:
    terms = distil if isinstance(distil, Sequence) else None
    if terms is None or not all(isinstance(term, Term) for term in terms):
        raise InputError(
            f"distil must be a list of terms, as in [SoftTargets(temperature=4.0)], not {distil!r}"
        )
    if alpha is not None and not terms:
        raise InputError(
            f"alpha={alpha} is a share of soft targets, and there are none: give terms as well, as in "
            "distil=[SoftTargets(temperature=4.0)]"
        )


def _check_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("the rounds run in one process, and this is one of several (WORLD_SIZE)")
    if find_spec("accelerate") is None:
        raise MissingExtraError("accelerate", "train", "iterate")


def _options(pruning: Mapping[str, Any], importance: Any) -> dict[str, Any]:
    """Options of ``prune-channels``, all of which it knows."""
    budgets = [name for name in (*RESOURCES, "latency") if name in pruning]
    if budgets:
        raise InputError(
            f"pruning holds the budget {budgets[0]}, and every round has its own: give macs= or params= "
            "beside pruning"
        )
    if "importance" in pruning and importance != "auto":
        raise InputError("importance is given twice: beside pruning and in it")
    options = {"importance": importance, **pruning}
    make_pass("prune-channels", options)
    return options


def _budgets(graph: Graph, asked: Mapping[str, Any], per_round: float) -> list[dict[str, int]]:
    """The budgets of every round, absolute; the last one's are those asked for."""
    whole = CostModel(graph).totals({})
    limits = {name: (limit, whole[RESOURCES[name]]) for name, limit in absolute(whole, asked).items()}
    shares = [log(max(1.0, limit) / all_) / log(1 - per_round) for limit, all_ in limits.values()]
    count = max(0, ceil(max(shares) - 1e-9))
    return [
        {
            name: max(1, int(max(limit, all_ * (1 - per_round) ** i if i < count else 0) + 1e-6))
            for name, (limit, all_) in limits.items()
        }
        for i in range(1, count + 1)
    ]
