"""Charts as SVG: lines, points and stacked areas, each with a legend and a table of its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from kvtier.simulator.axes import Axis
from kvtier.simulator.looks import AreaLook, LineLook
from kvtier.simulator.tables import figures_table

_WIDTH, _HEIGHT = 560.0, 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 74.0, 14.0, 12.0, 44.0
_MOST_MARKS, _FEW_MARKS = 40, 8
"""A line with more points than the first has about as many marks as the second, so that it can be seen below them."""

Point = tuple[float, float]


class Data(NamedTuple):
    """The table behind a chart."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        dashed: the line is a reference, drawn in the text's colour and without points.
        line: whether the points are joined.
        look: number of its look; None: its place in the chart.
    """

    name: str
    points: Sequence[Point]
    dashed: bool = False
    line: bool = True
    look: int | None = None


def line_chart(title: str, x: Axis, y: Axis, series: Sequence[Series], data: Data | None = None) -> str:
    """Return a figure with one line, or one cloud of points, per series, a legend and a table.

    Args:
        data: the table; if absent, it has every point.
    """
    drawn, legend = drawing(x, y, series)
    return _figure(title, drawn, legend, data or _data_of(x, y, series))


def drawing(x: Axis, y: Axis, series: Sequence[Series]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return a chart's elements of SVG, and its legend as (name, picture)."""
    looks = [
        LineLook.reference() if one.dashed else LineLook.of(index if one.look is None else one.look)
        for index, one in enumerate(series)
    ]
    drawn = [_frame(x, y)]
    for index, (one, look) in enumerate(zip(series, looks, strict=True)):
        spots = [(_x(x, a), _y(y, b)) for a, b in one.points]
        if one.line and len(spots) > 1:
            drawn.append(look.line(spots, len(series) - 1 - index))
        every = 1 if len(spots) <= _MOST_MARKS else len(spots) // _FEW_MARKS
        for at in range(index % every, len(spots), every):
            drawn.append(look.mark(*spots[at], _said(one.name, x, y, one.points[at])))
    return drawn, [(one.name, look.key(one.line)) for one, look in zip(series, looks, strict=True)]


def area_chart(
    title: str,
    x: Axis,
    y: Axis,
    names: Sequence[str],
    rows: Sequence[tuple[float, Sequence[float]]],
    first_look: int = 0,
) -> str:
    """Return a figure of stacked areas, with a legend and a table.

    Args:
        names: of the areas; the first one is lowest, and the last one is what no tier brought.
        rows: (x, height of each area), in the order of x.
        first_look: number of the first area's look; the others follow.
    """
    looks = [AreaLook.of(first_look + index) for index in range(len(names) - 1)] + [AreaLook.computed()]
    drawn = [_frame(x, y)]
    below = [0.0] * len(rows)
    for index, look in enumerate(looks):
        above = [low + heights[index] for low, (_, heights) in zip(below, rows, strict=True)]
        edge = [(at, high) for (at, _), high in zip(rows, above, strict=True)]
        edge += [(at, low) for (at, _), low in zip(reversed(rows), reversed(below), strict=True)]
        drawn.append(look.area(" ".join(f"{_x(x, a):.1f},{_y(y, b):.1f}" for a, b in edge)))
        below = above
    legend = [(name, look.key()) for name, look in zip(names, looks, strict=True)]
    data = Data([x.title, *names], [[x.write(at), *map(y.write, heights)] for at, heights in rows])
    return _figure(title, drawn, legend, data)


def _data_of(x: Axis, y: Axis, series: Sequence[Series]) -> Data:
    """Return a row per x, a column per series."""
    values = [dict(one.points) for one in series]
    places = sorted({at for one in values for at in one})
    rows = [[x.write(at), *(y.write(one[at]) if at in one else "" for one in values)] for at in places]
    return Data([x.title, *(one.name for one in series)], rows)


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.place(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return _HEIGHT - _BOTTOM - axis.place(value) * (_HEIGHT - _TOP - _BOTTOM)


def _said(name: str, x: Axis, y: Axis, point: Point) -> str:
    return f"<title>{escape(f'{name}: {x.write(point[0])}, {y.write(point[1])}')}</title>"


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
        f'<text class="note" transform="translate(14 {(_TOP + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.title)}</text>"
    )
    return "".join(parts)


def _figure(title: str, drawn: Sequence[str], legend: Sequence[tuple[str, str]], data: Data) -> str:
    entries = "".join(f"<span>{key}{escape(name)}</span>" for name, key in legend)
    view = f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{escape(title)}">'
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{view}{''.join(drawn)}</svg>"
        f'<div class="legend">{entries}</div>{figures_table(data.header, data.rows)}</figure>'
    )
