"""One line of a report: what was done, or was not, where, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """One thing a pass did or would not do. ``kind`` is ``changed``, ``refused`` or ``info``."""

    kind: str
    where: str
    message: str
