"""What an optimizer remembers of a parameter (momentum, Adam's averages) when entries of it go.

An optimizer keeps, for every parameter, tensors of the parameter's shape, factored ones with a 1 where a
dimension was summed over (Adafactor), and numbers (how many steps). The first two follow the parameter: they
are zero where it is masked (:func:`forget`), and keep the positions that it keeps (:func:`follow`). Anything
else an optimizer may hold cannot be cut, and is refused. So is an optimizer that holds another network's
parameters (:func:`require_held`): it would train nothing, and say nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from ..errors import InputError


@dataclass(frozen=True, eq=False)
class Cut:
    """What becomes of one parameter.

    Attributes:
        name: its qualified name.
        old: the parameter before.
        new: the parameter after, ``None`` if nothing of it is left.
        kept: for every dimension the positions that stay, ``None`` where all do.
    """

    name: str
    old: Parameter
    new: Parameter | None
    kept: Sequence[Tensor | None]

    def of(self, value: Tensor) -> Tensor:
        """What is kept of a tensor of the old parameter's shape, or with a 1 in place of a dimension."""
        if value.dim() != self.old.dim():
            return value
        for dim, where in enumerate(self.kept):
            if where is not None and value.shape[dim] == self.old.shape[dim]:
                value = value.index_select(dim, where.to(value.device))
        return value


def require_held(optimizer: Optimizer, module: nn.Module, beside: Iterable[Parameter] | None = None) -> None:
    """Say that an optimizer does not train a module; one that trains a part of it (a head) is fine.

    Args:
        beside: what it may train beside the module. Where this is given, an optimizer that lacks parameters
            of the module and holds unknown ones instead is refused, too: they were replaced meanwhile.

    Raises:
        InputError: it holds no trainable parameter of the module, or others in the place of some.
    """
    trained = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    missing = [name for key, name in trained.items() if key not in {id(p) for p in held}]
    kind = type(optimizer).__name__
    if missing and len(missing) == len(trained):
        raise InputError(
            f"the {kind} given holds none of the {len(trained)} trainable parameters of the module "
            f"({missing[0]!r}, …), so it would train nothing of it: make it of module.parameters(); those of "
            "the original model, or from before a removal without optimizer=, are other ones"
        )
    if beside is None or not missing:
        return
    known = {id(p) for p in [*module.parameters(), *beside]}
    if any(p.requires_grad and id(p) not in known for p in held):
        raise InputError(
            f"the {kind} given lacks {len(missing)} trainable parameters of the module ({missing[0]!r}, …) "
            "and holds others that the module does not have, as one does from before a removal: give Shrink "
            "and train.remove the optimizer, or make it anew of module.parameters(); what is not to be "
            "trained takes requires_grad_(False)"
        )


def forget(optimizer: Optimizer, parameter: Parameter, mask: Tensor) -> None:
    """Zero what the optimizer remembers of the entries that a mask (ones and zeros) takes away."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.mul_(mask)


def refusal(optimizer: Optimizer, cuts: Sequence[Cut]) -> None:
    """Say why an optimizer's state cannot follow; nothing is changed.

    The states of all its parameters are looked at: L-BFGS keeps one vector for the whole network, and keeps
    it for the first.

    Raises:
        InputError: it holds a state that is neither a number nor of its parameter's shape.
    """
    names = {id(cut.old): repr(cut.name) for cut in cuts}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                if not _follows(value, parameter):
                    shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
                    name = names.get(id(parameter), "a parameter that stays")
                    raise InputError(
                        f"{type(optimizer).__name__} keeps {key!r}{shape} for {name} {list(parameter.shape)}"
                        ", which cannot be cut with the network; shrink between trainings, each with a new "
                        "optimizer, or use one whose state has the parameter's shape"
                    )


def follow(optimizer: Optimizer, cuts: Sequence[Cut]) -> None:
    """Put the new parameters in the place of the old ones, with what is left of their state.

    Raises:
        InputError: as of :func:`refusal`, before anything is changed.
    """
    refusal(optimizer, cuts)
    by_old = {cut.old: cut for cut in cuts}
    for group in optimizer.param_groups:
        members = [by_old[p].new if p in by_old else p for p in group["params"]]
        if "param_names" in group:
            names = zip(group["param_names"], members, strict=True)
            group["param_names"] = [name for name, p in names if p is not None]
        # In place: an optimizer may know the list by another name, as L-BFGS does.
        group["params"][:] = [p for p in members if p is not None]
    for cut in cuts:
        known = optimizer.state.pop(cut.old, None)
        if known is not None and cut.new is not None:
            optimizer.state[cut.new] = {
                key: cut.of(value) if isinstance(value, Tensor) else value for key, value in known.items()
            }


def _follows(value: Any, parameter: Tensor) -> bool:
    if not isinstance(value, Tensor):
        return not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
    if value.numel() == 1:
        return True
    return value.dim() == parameter.dim() and all(
        have in (full, 1) for have, full in zip(value.shape, parameter.shape, strict=True)
    )
