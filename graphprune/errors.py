"""Every error that graphprune raises on purpose.

Each one says what was wrong, where, and what to do next. The command line prints the message
on one line and exits with :attr:`GraphpruneError.exit_code`; anything else that escapes is a defect.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def described(error: BaseException) -> str:
    """Kind and first line of an error that is not one of these.

    >>> described(RuntimeError("no device\\nsecond line")), described(MemoryError())
    ('RuntimeError: no device', 'MemoryError')
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class GraphpruneError(Exception):
    """Base of all deliberate errors. ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class InputError(GraphpruneError):
    """The model, its inputs or an option cannot be used as given."""

    exit_code = 3


class SourceError(InputError):
    """A model source (``module:callable``, ``.pt2``, ``timm:NAME`` …) does not lead to a model."""


class RecipeError(InputError):
    """A recipe or a pipeline text does not parse, or holds an unknown key."""


class TargetError(InputError):
    """A target is unknown, or cannot do what was asked of it."""


class CaptureError(GraphpruneError):
    """``torch.export`` cannot turn the model into a graph."""

    exit_code = 4


class AxisError(GraphpruneError):
    """A question about an axis, a parameter or a plan that does not fit the network."""

    exit_code = 3


class PassError(GraphpruneError):
    """A pass failed or was placed where it may not stand. Names the pass and, if known, the node."""

    exit_code = 5

    def __init__(self, pass_name: str, message: str, node: str | None = None):
        self.pass_name, self.node = pass_name, node
        super().__init__(f"pass {pass_name!r}{f' at node {node!r}' if node else ''}: {message}")


class VerificationError(GraphpruneError):
    """A certificate failed: the rewritten network or the lowered artifact is not the original."""

    exit_code = 6


class BackendError(GraphpruneError):
    """A runtime cannot lower, open or run what it was given."""

    exit_code = 7


class MissingExtraError(BackendError):
    """An optional dependency is not installed. Names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str):
        self.package, self.extra = package, extra
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed: "
            f"pip install 'graphprune[{extra}]'"
        )


class ArtifactError(GraphpruneError):
    """An artifact directory is incomplete, altered, of a newer format, or cannot be written."""

    exit_code = 8
