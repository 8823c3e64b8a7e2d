"""Charts as SVG: lines, points and stacked areas, with axes at round numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 560.0, 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 66.0, 14.0, 12.0, 44.0
_NUM_COLOURS = 8

_DASHES = ((), (9.0, 3.0), (2.0, 3.0), (9.0, 3.0, 2.0, 3.0), (14.0, 3.0, 2.0, 3.0, 2.0, 3.0))
"""Lengths of strokes and gaps. Each pattern is used with all colours before the next: forty lines look different."""
_REFERENCE = (5.0, 5.0)

Point = tuple[float, float]
Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        dashed: the line is a reference, drawn in the text's colour and without points.
        line: whether the points are joined.
    """

    name: str
    points: Sequence[Point]
    dashed: bool = False
    line: bool = True


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        write: returns a number of the axis as text.
        low, high: its ends.
    """

    title: str
    write: Format
    low: float
    high: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Return a value's place between the ends, 0 to 1; values outside are put at the nearer end."""
        low, high = self.low, self.high
        value = min(max(value, low), high)
        if self.logarithmic:
            return math.log(value / low) / math.log(high / low) if high > low else 0.5
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[float]:
        """Return a few round values between the ends."""
        if self.logarithmic:
            return _log_ticks(self.low, self.high)
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, int(self.high / step + 1e-9) + 1)]


def _round_step(raw: float) -> float:
    if raw <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if power * factor >= raw * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    decades = math.log10(high / low)
    if decades > 2.5:
        tens = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        steps = (1.0,) if decades > 4 else (1.0, 3.0)
        return [ten * step for ten in tens for step in steps if low <= ten * step <= high]
    factor = 2.0
    while math.log(high / low) / math.log(factor) > 7:
        factor *= 2
    first = math.ceil(math.log(low) / math.log(factor) - 1e-9)
    ticks = [factor**index for index in range(first, int(math.log(high) / math.log(factor) + 1e-9) + 1)]
    return ticks if len(ticks) > 1 else [low, high]


def line_chart(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """Return a figure with one line, or one cloud of points, per series, and a legend."""
    drawn = [_frame(x, y)]
    looks = [_look(index, one.dashed) for index, one in enumerate(series)]
    for one, look in zip(series, looks, strict=True):
        spots = [(_x(x, a), _y(y, b)) for a, b in one.points]
        if one.line and len(spots) > 1:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in spots)
            dashes = f' stroke-dasharray="{" ".join(f"{length:g}" for length in look.dashes)}"' if look.dashes else ""
            drawn.append(f'<polyline points="{path}" fill="none" stroke="{look.colour}" stroke-width="2"{dashes}/>')
        if not one.dashed and len(spots) <= 40:
            drawn += [
                _spot(a, b, look.colour, one.name, x, y, point) for (a, b), point in zip(spots, one.points, strict=True)
            ]
    return _figure(title, drawn, [(one.name, look) for one, look in zip(series, looks, strict=True)])


@dataclass(frozen=True)
class _Look:
    """Colour and dashes of a line, in a chart and in its legend."""

    colour: str
    dashes: Sequence[float] = ()

    @property
    def swatch(self) -> str:
        """A CSS background for the legend with the line's strokes and gaps."""
        if not self.dashes:
            return self.colour
        stops, at = [], 0.0
        for index, length in enumerate(self.dashes):
            colour = "transparent" if index % 2 else self.colour
            stops.append(f"{colour} {at:g}px {at + length:g}px")
            at += length
        return f"repeating-linear-gradient(90deg,{','.join(stops)})"


def _look(index: int, is_reference: bool = False) -> _Look:
    if is_reference:
        return _Look("var(--text)", _REFERENCE)
    return _Look(f"var(--c{index % _NUM_COLOURS})", _DASHES[index // _NUM_COLOURS % len(_DASHES)])


def area_chart(
    title: str, x: Axis, y: Axis, names: Sequence[str], rows: Sequence[tuple[float, Sequence[float]]]
) -> str:
    """Return a figure of stacked areas; the first name is lowest.

    Args:
        rows: (x, height of each area), in the order of x.
    """
    drawn = [_frame(x, y)]
    below = [0.0] * len(rows)
    for index in range(len(names)):
        above = [low + heights[index] for low, (_, heights) in zip(below, rows, strict=True)]
        edge = [(at, high) for (at, _), high in zip(rows, above, strict=True)]
        edge += [(at, low) for (at, _), low in zip(reversed(rows), reversed(below), strict=True)]
        path = " ".join(f"{_x(x, a):.1f},{_y(y, b):.1f}" for a, b in edge)
        drawn.append(
            f'<polygon points="{path}" fill="var(--c{_AREAS[index]})" fill-opacity="{0.25 if index == 2 else 0.8}"/>'
        )
        below = above
    return _figure(title, drawn, [(name, _look(_AREAS[index])) for index, name in enumerate(names)])


_AREAS = (0, 2, 7)


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.place(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return _HEIGHT - _BOTTOM - axis.place(value) * (_HEIGHT - _TOP - _BOTTOM)


def _spot(a: float, b: float, colour: str, name: str, x: Axis, y: Axis, point: Point) -> str:
    said = escape(f"{name}: {x.write(point[0])}, {y.write(point[1])}")
    return f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"><title>{said}</title></circle>'


def _frame(x: Axis, y: Axis) -> str:
    parts = []
    bottom = _HEIGHT - _BOTTOM
    for tick in y.ticks():
        at = _y(y, tick)
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{escape(y.write(tick))}</text>')
    for tick in x.ticks():
        at = _x(x, tick)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{escape(x.write(tick))}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="note" x="{middle:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x.title)}</text>')
    parts.append(
        f'<text class="note" transform="translate(13 {(_TOP + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.title)}</text>"
    )
    return "".join(parts)


def _figure(title: str, drawn: Sequence[str], legend: Sequence[tuple[str, _Look]]) -> str:
    entries = "".join(f'<span><i style="background:{look.swatch}"></i>{escape(name)}</span>' for name, look in legend)
    view = f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{escape(title)}">'
    caption = f"<figcaption>{escape(title)}</figcaption>"
    return f"<figure>{caption}{view}" + "".join(drawn) + f'</svg><div class="legend">{entries}</div></figure>'
