"""The ``[iterate]`` table of a recipe: pruning and training in rounds, before what the recipe builds.

Data, loss, optimizer and terms of a distillation are Python objects, named as calibration inputs are:
``module:attribute``, found from the recipe's own directory.

>>> parse({"data": "training:batches", "loss": "training:loss", "params": 0.3}, "recipe").params
0.3
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, RecipeError, suggestion
from .frontend.sources import load_object
from .textual import make_pass

if TYPE_CHECKING:
    from .train.rounds import Iterated


@dataclass(frozen=True)
class Iterating:
    """What :func:`graphprune.train.iterate` takes, as a recipe can say it; ``None`` is its default.

    Attributes:
        data: ``module:attribute`` of (inputs, targets) batches, or of a function that returns them.
        loss: of a function of outputs and targets.
        optimizer: of a function from a list of parameters to an optimizer.
        distil: of a list of terms (:mod:`graphprune.train.distill`).
        temperature: of soft targets of the original; they are a term where this is given.
        alpha: share of the soft targets in the loss; needs ``temperature`` or ``distil``.
        macs, params, per_round, epochs, lr, clip, repair: as there.
        directory: where the state goes.
        pruning: a table of options of ``prune-channels`` but budgets.
    """

    data: str
    loss: str
    optimizer: str | None = None
    distil: str | None = None
    temperature: float | None = None
    alpha: float | None = None
    macs: float | None = None
    params: float | None = None
    per_round: float | None = None
    epochs: int | None = None
    lr: float | None = None
    clip: float | None = None
    repair: bool | None = None
    directory: str | None = None
    pruning: Mapping[str, Any] = field(default_factory=dict)


_TEXTS = ("data", "loss", "optimizer", "distil", "directory")
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(_TEXTS, ((str,), "a text")),
    **dict.fromkeys(
        ("temperature", "alpha", "macs", "params", "per_round", "lr", "clip"), ((int, float), "a number")
    ),
    "epochs": ((int,), "a whole number"),
    "repair": ((bool,), "true or false"),
    "pruning": ((dict,), "a table of options of prune-channels"),
}


def parse(table: Any, name: str) -> Iterating:
    """The table as read from TOML; ``name`` is what errors call the recipe.

    Raises:
        RecipeError: a key is unknown, missing or without effect, or a value is of the wrong kind.
    """
    if not isinstance(table, Mapping):
        raise RecipeError(f"{name}: iterate must be a table, [iterate]")
    known = [f.name.replace("_", "-") for f in fields(Iterating)]
    values: dict[str, Any] = {}
    for key, value in table.items():
        plain = key.replace("_", "-")
        if plain not in known:
            raise RecipeError(
                f"{name}: unknown key {key!r} in [iterate]{suggestion(plain, known)}; "
                f"known: {', '.join(sorted(known))}"
            )
        kinds, words = _TYPES[plain.replace("-", "_")]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise RecipeError(f"{name}: {key} in [iterate] must be {words}, not {value!r}")
        values[plain.replace("-", "_")] = value
    missing = [key for key in ("data", "loss") if key not in values]
    if missing:
        raise RecipeError(f"{name}: [iterate] needs {' and '.join(missing)}, each as module:attribute")
    if "alpha" in values and "temperature" not in values and "distil" not in values:
        raise RecipeError(
            f"{name}: alpha in [iterate] is a share of soft targets, and there are none; give temperature as "
            "well"
        )
    values["pruning"] = {key.replace("-", "_"): v for key, v in values.get("pruning", {}).items()}
    try:
        make_pass("prune-channels", values["pruning"])
    except RecipeError as error:
        raise RecipeError(f"{name}: [iterate.pruning]: {error}") from error
    return Iterating(**values)


def run(
    asked: Iterating, model: Any, example_inputs: Any, example_kwargs: Any, *, base: Path,
    say: Callable[[str], None], **options: Any,
) -> Iterated:  # fmt: skip
    """Load what the table names, and prune and train.

    Args:
        base: what it is relative to.
        say: called with a line of text as each stage starts.
        options: further ones of :func:`graphprune.train.iterate`.

    Raises:
        SourceError: something is not where the table says.
        InputError: see there.
    """
    from .train.distill import SoftTargets
    from .train.iterate import iterate

    data = load_object(asked.data, base)
    data = data() if callable(data) else data
    terms = [] if asked.distil is None else load_object(asked.distil, base)
    terms = terms() if callable(terms) else terms
    if not isinstance(terms, Sequence):
        raise InputError(f"distil in [iterate], {asked.distil}, must be a list of terms, not {terms!r}")
    terms = [*terms]
    if asked.temperature is not None:
        terms.append(SoftTargets(temperature=asked.temperature))
    names = ("alpha", "macs", "params", "per_round", "epochs", "lr", "clip", "repair")
    settings = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    called = {name: getattr(asked, name) for name in ("data", "loss", "optimizer", "distil")}
    optimizer = None if asked.optimizer is None else load_object(asked.optimizer, base)
    return iterate(
        model, example_inputs, data, load_object(asked.loss, base), example_kwargs=example_kwargs,
        optimizer=optimizer, distil=terms, pruning=asked.pruning, progress=say,
        names={f"[iterate] {name}": text for name, text in called.items() if text is not None},
        directory=None if asked.directory is None else base / asked.directory, **settings, **options,
    )  # fmt: skip
