"""Draw the diagrams of docs/axes.md as SVG: ``python docs/draw_axes.py`` writes docs/images/axes-*.svg.

A dimension is a bar of cells, one a position. Cells of one colour belong to one axis, the number in a cell is
the axis's position, and hatched cells are those that go when that position is removed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

IMAGES = Path(__file__).parent / "images"
BLUE, ORANGE, GREEN, PURPLE, GREY = "#9cc8ea", "#f4c27d", "#a9d8a4", "#cdb3e6", "#d4d7dc"
CELL, HEIGHT = 24, 24


@dataclass
class Picture:
    """An SVG under construction; y runs downwards, everything in pixels."""

    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def text(
        self, x: float, y: float, words: str, *, anchor: str = "start", size: int = 13, mono: bool = False
    ) -> None:
        family = "ui-monospace, Menlo, Consolas, monospace" if mono else "system-ui, sans-serif"
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" font-family="{family}" text-anchor="{anchor}" '
            f'fill="#1f2328">{escape(words)}</text>'
        )

    def bar(
        self, x: float, y: float, cells: list[tuple[str, str]], gone: Iterable[int] = (), gaps: int = 0
    ) -> None:
        """Cells ``(text, colour)`` from left to right; a wider gap after every ``gaps`` cells."""
        hatched = set(gone)
        for index, (words, colour) in enumerate(cells):
            left = x + index * CELL + (6 * (index // gaps) if gaps else 0)
            fills = [colour, "url(#gone)"] if index in hatched else [colour]
            for fill in fills:
                self.parts.append(
                    f'<rect x="{left}" y="{y}" width="{CELL}" height="{HEIGHT}" '
                    f'fill="{fill}" stroke="#57606a"/>'
                )
            self.text(left + CELL / 2, y + 16.5, words, anchor="middle", size=11)

    def link(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#57606a" stroke-width="1.5" '
            'marker-end="url(#arrow)"/>'
        )

    def save(self, name: str, title: str) -> None:
        body = "\n".join(self.parts)
        (IMAGES / f"axes-{name}.svg").write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">\n<title>{escape(title)}</title>\n'
            '<defs><pattern id="gone" width="6" height="6" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)"><rect width="2.5" height="6" fill="#b3261e" '
            'fill-opacity="0.55"/></pattern>'
            '<marker id="arrow" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
            '<path d="M0 0 L8 4 L0 8 z" fill="#57606a"/></marker></defs>\n'
            f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>\n{body}\n</svg>\n'
        )


def cells(count: int, colour: str, start: int = 0) -> list[tuple[str, str]]:
    return [(str(start + i), colour) for i in range(count)]


def terms() -> None:
    p = Picture(560, 290)
    p.text(20, 28, "Atom(6): six positions that go one by one")
    p.bar(20, 38, cells(6, BLUE), {2})
    p.text(20, 98, "Product(Atom(3), Atom(4)), seen as its first factor: a head takes its row along")
    p.bar(20, 108, [(str(i), ORANGE) for i in range(3) for _ in range(4)], set(range(4, 8)), gaps=4)
    p.text(20, 158, "…and as its second: a head width goes in every head")
    p.bar(20, 168, [(str(j), GREEN) for _ in range(3) for j in range(4)], {1, 5, 9}, gaps=4)
    p.text(20, 228, "Concat(Atom(5), Atom(3)): two axes side by side")
    p.bar(20, 238, [*cells(5, BLUE), *cells(3, PURPLE)], {3, 5})
    p.save("terms", "Atom, Product and Concat as bars of cells, with the cells that a removal takes")


def residual() -> None:
    p = Picture(620, 210)
    p.text(20, 36, "first.weight[0]", mono=True)
    p.bar(180, 20, cells(6, BLUE), {4})
    p.text(20, 86, "outer.weight[0]", mono=True)
    p.bar(180, 70, cells(6, BLUE), {4})
    p.text(20, 186, "head.weight[1]", mono=True)
    p.bar(180, 170, cells(6, BLUE), {4})
    p.text(350, 62, "x + outer(inner(x))", mono=True)
    p.link(340, 32, 440, 120)
    p.link(340, 82, 430, 120)
    p.text(370, 136, "the sum has one type: one axis")
    p.link(430, 144, 340, 180)
    p.save("residual", "A residual sum makes one axis of what it adds, and of what reads it")


def fused() -> None:
    p = Picture(700, 250)
    p.text(20, 28, "qkv.weight[0] = Atom(18), until split and view say what it is:")
    p.bar(20, 38, [(str(i), GREY) for i in range(18)])
    p.text(20, 98, "split into three: Concat(q, k, v)")
    p.bar(20, 108, [*cells(6, BLUE), *cells(6, ORANGE), *cells(6, GREEN)], gaps=6)
    p.text(20, 158, "view as 2 heads of 3, and heads meet in q · kᵀ · v: one axis of heads in all three")
    heads = [(str(h), PURPLE) for _ in range(3) for h in range(2) for _ in range(3)]
    p.bar(20, 168, heads, {3, 4, 5, 9, 10, 11, 15, 16, 17}, gaps=6)
    p.text(
        20,
        222,
        "Removing head 1 takes three rows of q, of k and of v, and three columns of the output projection.",
        size=12,
    )
    p.save("fused", "A fused projection becomes Concat of three Products that share their heads")


def grouped_queries() -> None:
    p = Picture(620, 190)
    p.text(20, 36, "key heads")
    p.bar(160, 20, cells(2, ORANGE), {1})
    p.text(20, 96, "query heads")
    p.bar(160, 80, [(str(h), ORANGE) for h in range(2) for _ in range(3)], {3, 4, 5}, gaps=3)
    p.text(340, 96, "= Product(key heads 2, repeats 3)")
    p.link(172, 44, 196, 78)
    p.link(196, 44, 272, 78)
    p.text(20, 146, "Removing key head 1 takes its three query heads along;", size=12)
    p.text(20, 166, "removing a repeat takes one query head from each key head.", size=12)
    p.save("grouped-queries", "Query heads are the product of key heads and repeats")


def rotary() -> None:
    p = Picture(620, 200)
    p.text(20, 36, "x")
    p.bar(160, 20, [*cells(3, BLUE), *cells(3, GREEN)], gaps=3)
    p.text(340, 36, "Concat(a, b)")
    p.text(20, 86, "cat(−x₂, x₁)")
    p.bar(160, 70, [*cells(3, GREEN), *cells(3, BLUE)], gaps=3)
    p.text(340, 86, "Concat(b, a)")
    p.text(20, 136, "x·cos + cat(−x₂, x₁)·sin")
    p.bar(160, 150, [*cells(3, BLUE), *cells(3, BLUE)], {1, 4}, gaps=3)
    p.text(340, 166, "so a = b: pairs go together")
    p.save("rotary", "Adding Concat(a, b) to Concat(b, a) makes a and b one axis")


def groups() -> None:
    p = Picture(700, 260)
    p.text(20, 28, "Depthwise: groups are the channels, Product(6, 1)")
    p.bar(20, 38, cells(6, BLUE), {2})
    p.text(230, 55, "in")
    p.bar(320, 38, cells(6, BLUE), {2})
    p.text(500, 55, "out, groups 6 → 5")
    p.text(20, 108, "Grouped: in = Product(3 groups, 2), out = Product(3 groups, 3); removing group 1:")
    p.bar(20, 118, [(str(g), ORANGE) for g in range(3) for _ in range(2)], {2, 3}, gaps=2)
    p.bar(320, 118, [(str(g), ORANGE) for g in range(3) for _ in range(3)], {3, 4, 5}, gaps=3)
    p.text(20, 188, "…or position 0 within every group of the input, an axis of its own:")
    p.bar(20, 198, [(str(j), GREEN) for _ in range(3) for j in range(2)], {0, 2, 4}, gaps=2)
    p.bar(320, 198, [(str(j), PURPLE) for _ in range(3) for j in range(3)], gaps=3)
    p.save("groups", "Depthwise and grouped convolutions as products of groups and channels within a group")


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for draw in (terms, residual, fused, grouped_queries, rotary, groups):
        draw()
