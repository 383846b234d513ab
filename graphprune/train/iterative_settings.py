"""What an iterative run was started with, to be compared when it goes on; read before anything is trained.

Everything is text; :mod:`graphprune.train.identity` has what of a function, an optimizer or a batch is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphprune.errors import InputError

from . import identity
from .batches import pair, samples
from .randomness import seeded

if TYPE_CHECKING:
    from .iterative_run import Run

_MACHINE = ("torch", "threads")  # where these differ a run may go on, with a note


def settings(run: Run) -> dict[str, Any]:
    """What a state must have been written with for this run to go on from it; and on what machine.

    Raises:
        InputError: data or calibration hold nothing, or what should make an optimizer makes none.
    """
    compared = {
        **run.names,
        "budgets": run.asked, "per_round": run.per_round, "epochs": run.epochs,
        "clip": run.clip, "alpha": run.alpha,
        "repair": run.repair, "seed": run.seed, "distil": run.distil, "pruning": run.pruning,
        "loss": run.loss, "evaluate": run.evaluate,
    }  # fmt: skip
    target = run.target
    return {
        "network": run.start.fingerprint(),
        "optimizer": _optimizer(run),
        **{name: identity.described(value) for name, value in compared.items()},
        "target": f"{target.name} (widths of {target.channel_alignment} and {target.linear_alignment})",
        **_data(run),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }


def compare(theirs: Mapping[str, Any], mine: Mapping[str, Any], directory: Path | None) -> list[str]:
    """Notes on the settings of a state in ``directory`` that a run with others of its own goes on from.

    Raises:
        InputError: it is another run's; names the first setting that differs, with both values.
    """
    changed = [name for name in mine if theirs.get(name) != mine[name]]
    for name in changed:
        if name in _MACHINE:
            continue
        what = f"{name}={theirs.get(name)}, and this run has {mine[name]}"
        if name == "network":
            what = "another network"
        elif name in ("data", "calibration") and theirs.get(name) and mine[name]:
            what += " (the same data draws from the global generators and its `generator` attribute only)"
        raise InputError(
            f"{directory} holds the state of a run of {what}; give another directory, or remove it"
        )
    return [
        f"{name} was {theirs.get(name)} before and is {mine[name]}: the last bits may differ from a run that "
        "was not stopped"
        for name in changed
    ]


def _optimizer(run: Run) -> str | None:
    """The optimizer as it would be for the whole network; every round makes its own."""
    if not run.epochs:
        return None
    parameters = [p for p in run.start.module.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("the network has no parameter that can be trained (requires_grad)")
    with seeded(run.seed):
        made = (run.optimizer or partial(torch.optim.AdamW, lr=run.lr))(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise InputError(
            f"optimizer made a {type(made).__name__}: it is called with a list of parameters, and has to "
            "return a torch.optim.Optimizer"
        )
    return identity.optimizer(made)


def _data(run: Run) -> dict[str, str | None]:
    """How data and calibration inputs begin."""
    texts: dict[str, str | None] = {"data": None, "calibration": None}
    if run.epochs or run.calibration is None:  # else nobody reads them
        first = _first(run.data, "data", "(inputs, targets) batches", run.seed)
        samples(pair(first, 0)[0])
        texts["data"] = identity.batch(run.data, first)
    if run.calibration is not None:
        texts["calibration"] = identity.batch(
            run.calibration, _first(run.calibration, "calibration", "inputs", run.seed)
        )
    return texts


def _first(values: Any, name: str, what: str, seed: int) -> Any:
    """The first of what is read later; every generator is as it was afterwards.

    Raises:
        InputError: there is none.
    """
    if isinstance(values, (torch.Tensor, str, bytes, Mapping)):
        raise InputError(
            f"{name} is a single {type(values).__name__}; it must be an iterable of {what}: put it in a list"
        )
    if not hasattr(values, "__iter__") and not hasattr(values, "__getitem__"):
        raise InputError(f"{name} must be an iterable of {what}, not {values!r}")
    generator = getattr(values, "generator", None)
    own = generator if isinstance(generator, torch.Generator) else torch.Generator()
    state = own.get_state()
    own.manual_seed(seed)
    try:
        with seeded(seed) as numbers:
            numbers.epoch(-1, process=0)
            return next(iter(values))
    except StopIteration:
        raise InputError(f"{name} holds no {what}: reading it ended at once") from None
    finally:
        own.set_state(state)
