"""What a build may cost and how far it may stray: the limits that ``graphprune check`` holds an artifact to.

>>> Limits(max_bytes="12MB", max_latency_ratio=1.05).max_bytes
12000000
>>> Limits(min_agreement=0.98, max_latency_ratio=1.1).relative
('max-latency-ratio', 'min-agreement')
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from ..errors import InputError

_SIZE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*([kMG]?i?B)?\s*", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Limits:
    """The limits of a build; ``None`` is no limit. Failed certificates break every build.

    Attributes:
        max_bytes: of the artifact's deployment files together; a number, or a text such as ``"12MB"``.
        max_bytes_ratio: the same, to the other artifact's.
        max_latency_ratio: latency to the other artifact's, both measured here in turns.
        min_agreement: share of answers that are the other artifact's, 0 to 1.
        min_sqnr: of the outputs against the other artifact's, dB.
        min_integers: share of the multiply-accumulates that the runtime computes in int8, 0 to 1.

    Raises:
        InputError: a number is out of range.
    """

    max_bytes: int | str | None = None
    max_bytes_ratio: float | None = None
    max_latency_ratio: float | None = None
    min_agreement: float | None = None
    min_sqnr: float | None = None
    min_integers: float | None = None

    def __post_init__(self) -> None:
        if self.max_bytes is not None:
            object.__setattr__(self, "max_bytes", byte_count(self.max_bytes))
        for name, value in self.given.items():
            if not math.isfinite(value):
                raise InputError(f"limit {name} must be a finite number, got {value}")
            if name.endswith("ratio") and value <= 0:
                raise InputError(f"limit {name} is a ratio to the other artifact's, above 0; got {value:g}")
            if name in ("min-agreement", "min-integers") and not 0 <= value <= 1:
                raise InputError(f"limit {name} is a share, 0 to 1; got {value:g}")

    @property
    def given(self) -> dict[str, float]:
        """The limits that are set, by the names of their options."""
        values = {field.name.replace("_", "-"): getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def relative(self) -> tuple[str, ...]:
        """Those that compare with another artifact."""
        return tuple(n for n in self.given if n.endswith("ratio") or n in ("min-agreement", "min-sqnr"))

    @property
    def running(self) -> tuple[str, ...]:
        """Those that run the artifacts on inputs."""
        return tuple(n for n in self.relative if n != "max-bytes-ratio")


def byte_count(size: int | str) -> int:
    """A size as users write it: ``12000000``, ``"12MB"`` (10^6), ``"1.5MiB"`` (2^20), ``"300 kB"``.

    Raises:
        InputError: it is none of these, or nothing is left of it.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is not None:
            size = int(float(match[1]) * _UNITS[(match[2] or "").lower()])
    if isinstance(size, bool) or not isinstance(size, int):
        raise InputError(
            f"size {size!r} is not understood; write bytes, or a text such as '12MB' or '1.5MiB'"
        )
    if size < 1:
        raise InputError(f"limit max-bytes must be at least 1, got {size}")
    return size
