"""How lines and areas of a chart look: by colour, and by dashes, marks or patterns for who does not see the colour.

The colours are told apart by people with the common kinds of colour blindness, too; a test computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LIGHT = ("#0072b2", "#d55e00", "#008060", "#b0468c", "#7a5d00", "#3b3f9e", "#1596a8", "#59636f")
"""Colours `--c0` to `--c7` on white. The last one is for what was computed, and for references."""
DARK = ("#58b4f2", "#ff9149", "#3fd0a4", "#ee9ccb", "#e8c84c", "#a9a6ff", "#7fe0ea", "#aab4c0")
"""The same colours on dark ground."""

_DASHES = ((), (9.0, 3.0), (2.0, 3.0), (9.0, 3.0, 2.0, 3.0), (14.0, 3.0, 2.0, 3.0, 2.0, 3.0))
"""Lengths of strokes and gaps. Each pattern is used with all colours before the next: forty lines look different."""
_REFERENCE = (5.0, 5.0)
_MARKS = (
    '<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6"',
    '<rect x="{left:.1f}" y="{top:.1f}" width="6.6" height="6.6"',
    '<path d="M{x:.1f} {top:.1f}l4.2 7.4h-8.4z"',
    '<path d="M{x:.1f} {high:.1f}l4.8 4.8l-4.8 4.8l-4.8 -4.8z"',
    '<path d="M{x:.1f} {low:.1f}l4.2 -7.4h-8.4z"',
)
"""Shapes of the points: circle, square, triangle, diamond, triangle that stands on its head."""
COMPUTED = len(LIGHT) - 1
"""Number of the look of what no tier brought."""

PATTERNS = "".join(
    f'<pattern id="area{index}" width="8" height="8" patternUnits="userSpaceOnUse">'
    f'<rect width="8" height="8" fill="var(--c{index})"/>{stripes}</pattern>'
    for index, stripes in enumerate(
        (
            "",
            '<path d="M-2 2l4 -4M0 8l8 -8M6 10l4 -4" stroke="var(--card)" stroke-width="2"/>',
            '<circle cx="2" cy="2" r="1.5" fill="var(--card)"/><circle cx="6" cy="6" r="1.5" fill="var(--card)"/>',
            '<path d="M0 2h8M0 6h8" stroke="var(--card)" stroke-width="1.5"/>',
            '<path d="M2 0v8M6 0v8" stroke="var(--card)" stroke-width="1.5"/>',
            '<path d="M0 0l8 8M8 0l-8 8" stroke="var(--card)" stroke-width="1.2"/>',
        )
    )
)
"""Definitions of the areas' patterns, once per document; they use the document's `--card` and colours."""
_NUM_PATTERNS = 6
_KEY_WIDTH, _KEY_HEIGHT = 30, 12


def style(colours: Sequence[str]) -> str:
    """Return CSS declarations of the colours."""
    return " ".join(f"--c{index}: {colour};" for index, colour in enumerate(colours))


@dataclass(frozen=True)
class LineLook:
    """Colour, dashes and points of a line, in a chart and in its legend."""

    colour: str
    dashes: Sequence[float] = ()
    shape: str = ""

    @classmethod
    def of(cls, index: int) -> LineLook:
        """Return the look of a chart's line `index`."""
        dashes = _DASHES[index // len(LIGHT) % len(_DASHES)]
        return cls(f"var(--c{index % len(LIGHT)})", dashes, _MARKS[index % len(_MARKS)])

    @classmethod
    def reference(cls) -> LineLook:
        """Return the look of a line with which others are compared: dashes in the text's colour, without points."""
        return cls("var(--text)", _REFERENCE)

    def line(self, places: Sequence[tuple[float, float]], num_above: int = 0) -> str:
        """Return the line through places of the drawing.

        Args:
            num_above: lines that are drawn after this one. It is wider than they are, so that it shows where they hide
                it.
        """
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashes = f' stroke-dasharray="{" ".join(f"{length:g}" for length in self.dashes)}"' if self.dashes else ""
        width = 2 + 0.9 * min(num_above, 3)
        return f'<polyline points="{path}" fill="none" stroke="{self.colour}" stroke-width="{width:g}"{dashes}/>'

    def mark(self, x: float, y: float, inside: str = "") -> str:
        """Return a point of the line; "" for a reference.

        Args:
            inside: elements of SVG, such as a title.
        """
        if not self.shape:
            return ""
        begin = self.shape.format(x=x, y=y, left=x - 3.3, top=y - 3.3, high=y - 4.8, low=y + 3.3)
        return f'{begin} fill="{self.colour}">{inside}</{begin[1:].split()[0]}>'

    def key(self, has_line: bool = True) -> str:
        """Return the legend's picture of the line."""
        middle = _KEY_HEIGHT / 2
        line = self.line([(0, middle), (_KEY_WIDTH, middle)]) if has_line else ""
        return _key(line + self.mark(_KEY_WIDTH / 2, middle))


@dataclass(frozen=True)
class AreaLook:
    """The fill of an area, in a chart and in its legend."""

    fill: str

    @classmethod
    def of(cls, index: int) -> AreaLook:
        """Return the look of area `index`; there are six patterns."""
        return cls(f"url(#area{index % _NUM_PATTERNS})")

    @classmethod
    def computed(cls) -> AreaLook:
        """Return the look of what no tier brought: pale and without a pattern."""
        return cls(f"color-mix(in srgb, var(--c{COMPUTED}) 28%, var(--card))")

    def area(self, path: str) -> str:
        """Return the area within a path of the drawing."""
        return f'<polygon points="{path}" style="fill:{self.fill}" stroke="var(--card)" stroke-width="1"/>'

    def key(self) -> str:
        """Return the legend's picture of the area."""
        return _key(self.area(f"0,0 {_KEY_WIDTH},0 {_KEY_WIDTH},{_KEY_HEIGHT} 0,{_KEY_HEIGHT}"))


def _key(drawn: str) -> str:
    size = f'width="{_KEY_WIDTH}" height="{_KEY_HEIGHT}"'
    return f'<svg class="key" {size} viewBox="0 0 {_KEY_WIDTH} {_KEY_HEIGHT}" aria-hidden="true">{drawn}</svg>'
