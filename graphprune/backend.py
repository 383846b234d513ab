"""What a backend is: the contract between a graph and a runtime.

A backend is one file under ``graphprune.backends`` (or a plugin) with a class that satisfies
:class:`Backend`. ``lower`` turns a graph into files, ``open`` turns files into something callable,
``audit`` says what the runtime really executes. Files are bytes by relative name, so that an artifact is
the same whether it is in memory or in a directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from .graph import Graph
from .integers import Scheme
from .target import Target


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape (symbolic sizes as strings) and dtype (``"float32"``) of one flat input or output."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class Lowered:
    """A graph as a runtime's files.

    Attributes:
        backend: registry name of the backend that made it.
        files: content by relative file name.
        inputs: specification of the flat inputs, in order.
        outputs: of the flat outputs, in order; an output that is not a tensor stands as its value.
        versions: package → version of what the files depend on.
        notes: what the reader of a report should know.
    """

    backend: str
    files: Mapping[str, bytes]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[Any, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AuditRow:
    """One operator as the runtime executes it.

    Attributes:
        name: the operator's name in the runtime's own graph.
        operator: its kind there (``QLinearConv``, ``FusedConv`` …).
        precision: what it computes in (``float32``, ``int8`` …).
        macs: its multiply-accumulates, 0 if unknown or none.
        reason: why it is not what was asked for, else empty.
        fell_back: whether it computes in float although the graph has it in integers.
    """

    name: str
    operator: str
    precision: str
    macs: int = 0
    reason: str = ""
    fell_back: bool = False


@dataclass(frozen=True)
class Audit:
    """Every operator of a lowered artifact as the runtime executes it; ``notes`` say how it was found out."""

    rows: tuple[AuditRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Operator kind → how many, most frequent first."""
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row.operator] = counts.get(row.operator, 0) + 1
        return _most_first(counts)

    @property
    def macs(self) -> dict[str, int]:
        """Precision → multiply-accumulates computed in it, most first."""
        macs: dict[str, int] = {}
        for row in self.rows:
            if row.macs:
                macs[row.precision] = macs.get(row.precision, 0) + row.macs
        return _most_first(macs)


def integer_share(macs: Mapping[str, int]) -> float:
    """The share of multiply-accumulates by precision that are in integers, 0 to 1."""
    whole = sum(macs.values())
    return sum(n for kind, n in macs.items() if kind == "int8") / whole if whole else 0.0


def _most_first(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


class Runner(Protocol):
    """An opened artifact: flat tensors in, flat outputs out."""

    def __call__(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        """Run once. Raises InputError when the inputs do not fit the specification."""


class Backend(Protocol):
    """A runtime. Instances are made without arguments and hold no state.

    Class attributes:
        name: the registry's.
        extra: of this package, that installs the runtime; ``None`` where the core does.
        integers: what it runs in integers, in place of what a target by name says; ``None`` leaves that.
        floats: what it can compute in where the graph has float32 (:attr:`Target.floats`); float32 where a
            backend does not have this attribute.
    """

    name: ClassVar[str]
    extra: ClassVar[str | None]
    integers: ClassVar[Scheme | None]

    def lower(self, graph: Graph, target: Target) -> Lowered:
        """The graph as files for ``target``. Raises BackendError naming the operator it cannot lower."""

    def open(
        self, files: Mapping[str, bytes], inputs: Sequence[TensorSpec], outputs: Sequence[Any],
        target: Target, threads: int | None = None,
    ) -> Runner:  # fmt: skip
        """A runner over the files, on this host. ``threads=None`` leaves the runtime's default."""

    def unrunnable(self, target: Target) -> str | None:
        """Why this host cannot run artifacts for ``target``, or ``None`` when it can."""

    def audit(self, lowered: Lowered, target: Target) -> Audit:
        """What the runtime executes once it has optimised the artifact."""
