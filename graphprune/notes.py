"""What a pass says of its work: lines of text, and rankings that are shown with a bar for each row.

>>> Ranking("layers", "loss", (RankingRow("conv1", 0.5, 1.0, chosen=True), RankingRow("fc", 0.1, 0.2))).chosen
('conv1',)
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InputError


@dataclass(frozen=True)
class Note:
    """One thing a pass did or would not do. ``kind`` is ``changed``, ``refused`` or ``info``."""

    kind: str
    where: str
    message: str


@dataclass(frozen=True)
class RankingRow:
    """One place of a ranking.

    Attributes:
        name: what is ranked.
        value: what it is ranked by, in the ranking's unit; shown with one decimal.
        share: length of its bar, 0 to 1.
        remark: what else there is to say.
        chosen: whether the pass made an exception of it; such rows stand out.

    Raises:
        InputError: the share is not between 0 and 1.
    """

    name: str
    value: float
    share: float
    remark: str = ""
    chosen: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"share of {self.name!r} is the length of a bar, 0 to 1, got {self.share}")


@dataclass(frozen=True)
class Ranking:
    """What a pass measured of every candidate, in the order it went by.

    Attributes:
        title: what is ranked, and how.
        unit: heading of the values, as in ``SQNR, dB``.
        rows: all of them, the first place first.
        caption: what the length of a bar means.
    """

    title: str
    unit: str
    rows: tuple[RankingRow, ...]
    caption: str = ""

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the chosen rows, in order."""
        return tuple(row.name for row in self.rows if row.chosen)
