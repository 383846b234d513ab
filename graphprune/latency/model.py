"""How long a network of any widths takes, from measured times of its operators at a few widths.

For every block of the network (:mod:`graphprune.blocks`) the times at a grid of widths are known, or some of
them: shares of 1/8, 1/4, 1/2, 3/4 and 1 of each of its axes, at widths that pruning can leave. In between,
the *rate* (time over :meth:`~graphprune.blocks.Block.work`, which goes with multiply-accumulates and bytes)
is interpolated linearly on the simplex of grid points around the widths (Kuhn 1960; d + 1 points where the
block's size depends on d axes, against 2^d of a cell), times the work there, and kept between the times of
the simplex' least and largest corner. Widths between two that pruning can leave cost what the wider one does:
runtimes compute in whole blocks of channels. Where not all grid points around are known, a coarser grid does;
where a block was never measured, the median rate of the others.

    latency = call + Σ over blocks of (time alone - call),  call = time of a network that does nothing

That is less or more than the network takes (layouts are converted at the edges of each block, caches hold
other things), so it is good for quotients; :mod:`graphprune.latency` measures the rest.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from ..axes.terms import Atom
from ..blocks import Block, Sizes
from ..fusion import blocks
from ..graph import Graph

FINE = (0.125, 0.25, 0.5, 0.75, 1.0)
COARSE = (0.125, 0.5, 1.0)
HALF = (0.5, 1.0)
WHOLE = (1.0,)
GRIDS = (WHOLE, HALF, COARSE, FINE)
_LEAST = 0.05  # share of a call's time that a block takes at least: below that it is noise

Variable = tuple[Atom, ...]
Corner = tuple[float, Mapping[Atom, int]]
"""How much a grid point counts, and the sizes there."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """A time that a prediction would be better with: the block, at these sizes, about this many ms' worth."""

    block: Block
    sizes: Mapping[Atom, int]
    text: str
    work: float


@dataclass(eq=False)
class LatencyModel:
    """Predicts a network's latency from times of its operators.

    Attributes:
        graph: the network.
        widths: axis → widths that pruning can leave, the full one among them; other axes stay as they are.
        known: text of a block → ms alone, or ``None`` if it was not measured.
        call_ms: what a call of a network that does nothing takes.
    """

    graph: Graph
    widths: Mapping[Atom, Sequence[int]]
    known: Callable[[str], float | None]
    call_ms: Callable[[], float]
    blocks: list[Block] = field(init=False, repr=False)
    _texts: dict[object, str] = field(default_factory=dict, repr=False)
    _work: dict[object, float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.blocks = blocks(self.graph)
        self.widths = {a: sorted({*w, a.size}) for a, w in self.widths.items() if len({*w, a.size}) > 1}

    def __call__(self, sizes: Sizes) -> float:
        """Milliseconds of a call when each axis has ``sizes[axis]`` positions; 0 while nothing is known."""
        sizes = self._possible(sizes)
        found = [(block, self._time(block, sizes)) for block in self.blocks]
        rates = [ms / self._works(block, sizes) for block, ms in found if ms is not None]
        if not rates:
            return 0.0
        rate = statistics.median(rates)
        alone = (rate * self._works(block, sizes) if ms is None else ms for block, ms in found)
        return self.call_ms() + sum(alone)

    def wanted(self, sizes: Sizes, grid: Sequence[float] = FINE) -> Iterator[Wanted]:
        """The times around these sizes that are not known, each once, the largest first."""
        sizes, found = self._possible(sizes), {}
        for block in self.blocks:
            for _, corner in self._corners(block, sizes, grid):
                text = self.text(block, corner)
                if text not in found and self.known(text) is None:
                    found[text] = Wanted(block, corner, text, self._works(block, corner))
        yield from sorted(found.values(), key=lambda want: -want.work)

    def unmeasured(self, sizes: Sizes) -> int:
        """How many blocks have no measured time at any size around these."""
        sizes = self._possible(sizes)
        return sum(self._time(block, sizes) is None for block in self.blocks)

    def saved(self, axis: Atom, sizes: Sizes) -> float:
        """Milliseconds that one position of an axis takes, as the mean down to half of those it has now."""
        sizes = self._possible(sizes)
        now = sizes.get(axis, axis.size)
        narrower = [w for w in self.widths.get(axis, ()) if w < now]
        if not narrower:
            return 0.0
        then = min(narrower, key=lambda width: abs(width - now / 2))
        saved = 0.0
        for block in self.blocks:
            if any(axis in variable for variable in block.variables):
                before, after = self._time(block, sizes), self._time(block, {**sizes, axis: then})
                saved += (before or 0.0) - (after or 0.0)
        return saved / (now - then)

    def text(self, block: Block, sizes: Sizes) -> str:
        """The block's text; made once for each size."""
        key = _key(block, sizes)
        if key not in self._texts:
            try:
                self._texts[key] = block.text(sizes)
            except Exception as error:  # building it raises the same, and then the report names it
                self._texts[key] = f"{block.name} stands for nothing alone: {type(error).__name__}"
        return self._texts[key]

    def _works(self, block: Block, sizes: Sizes) -> float:
        key = _key(block, sizes)
        if key not in self._work:
            self._work[key] = block.work(sizes)
        return self._work[key]

    def _time(self, block: Block, sizes: Sizes) -> float | None:
        """A block's ms without the call, from the finest grid whose points around are known."""
        for grid in reversed(GRIDS):
            corners = self._corners(block, sizes, grid)
            times = [self.known(self.text(block, corner)) for _, corner in corners]
            if any(ms is None for ms in times):
                continue
            alone = [max(ms - self.call_ms(), _LEAST * ms) for ms in times if ms is not None]
            rate = sum(
                share * ms / self._works(block, corner)
                for ms, (share, corner) in zip(alone, corners, strict=True)
            )
            work = self._works(block, sizes)
            if len(alone) == 1:
                return rate * work
            # Narrower than the narrowest that was measured costs less than that.
            beyond = work < min(self._works(block, corner) for _, corner in corners)
            return min(max(rate * work, 0.0 if beyond else min(alone)), max(alone))
        return None

    def _corners(self, block: Block, sizes: Sizes, grid: Sequence[float]) -> list[Corner]:
        """The grid points of the simplex around these sizes; those that count nothing are left out."""
        places: list[tuple[float, Variable, Mapping[Atom, int], Mapping[Atom, int]]] = []
        lowest: dict[Atom, int] = {}
        for variable in block.variables:
            if not any(atom in self.widths for atom in variable):
                continue
            points = self._points(variable, grid)
            here = block.share(variable, sizes)
            below = max((p for p in points if p[0] <= here), key=lambda p: p[0], default=points[0])
            above = min((p for p in points if p[0] >= here), key=lambda p: p[0], default=points[-1])
            between = (here - below[0]) / (above[0] - below[0]) if above[0] > below[0] else 0.0
            places.append((between, variable, below[1], above[1]))
            lowest |= below[1]
        places.sort(key=lambda place: -place[0])
        corners, corner = [], lowest
        left = 1.0
        for between, _, _, above_sizes in places:
            corners.append((left - between, corner))
            corner = {**corner, **above_sizes}
            left = between
        corners.append((left, corner))
        return [(share, sizes) for share, sizes in corners if share > 1e-9]

    def _points(self, variable: Variable, grid: Sequence[float]) -> list[tuple[float, Mapping[Atom, int]]]:
        """(share of the positions, sizes) of a group of axes at each share of a grid, each once."""
        found = {}
        total = sum(atom.size for atom in variable)
        for share in grid:
            sizes = {
                atom: min(widths, key=partial(_distance, atom.size * share))
                for atom in variable
                if (widths := self.widths.get(atom)) is not None
            }
            kept = sum(sizes.get(atom, atom.size) for atom in variable)
            found[kept / total] = sizes
        return sorted(found.items(), key=lambda point: point[0])

    def _possible(self, sizes: Sizes) -> dict[Atom, int]:
        """Widths that pruning can leave, rounded up."""
        return {
            atom: next((w for w in self.widths[atom] if w >= size), atom.size)
            for atom, size in sizes.items()
            if atom in self.widths
        }


def _distance(wish: float, width: int) -> tuple[float, int]:
    return abs(width - wish), width


def _key(block: Block, sizes: Sizes) -> object:
    atoms = (atom for variable in block.variables for atom in variable)
    return block, tuple((id(a), sizes[a]) for a in atoms if a in sizes and sizes[a] != a.size)
