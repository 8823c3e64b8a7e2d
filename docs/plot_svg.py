"""Plots as SVG documents that stand alone: bars beside each other, and lines.

A document has its own ground, so that it can be read whatever the page's colours are. It is dark where the
reader's system is.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any

from kvtier.simulator.axes import Axis
from kvtier.simulator.charts import Series, drawing
from kvtier.simulator.looks import DARK, LIGHT, style

WIDTH = 720.0
_NAMES, _VALUES = 232.0, 80.0
"""Room for the names of bars, on the left, and for their values, on the right."""
_BAR, _GAP, _HEAD, _EDGE = 18.0, 5.0, 30.0, 16.0
_STYLE = f"""
:root {{ --card: #f6f8fa; --text: #1b1f24; --faint: #596473; --line: #d9dee5; {style(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --card: #191f27; --text: #e6e9ee; --faint: #9ba8b7; --line: #2c343f;
  {style(DARK)} }} }}
text {{ font: 14px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--text); }}
.faint, .axis-text {{ fill: var(--faint); }} .title {{ font-weight: 600; font-size: 15px; }}
.group {{ font-weight: 600; }} .axis {{ stroke: var(--line); fill: none; }}
"""
_FILLS = {
    "kvtier": 'fill="var(--c0)"',
    "limit": 'fill="var(--card)" stroke="var(--faint)" stroke-dasharray="4 3"',
    "other": 'fill="var(--c7)" fill-opacity="0.55"',
}
"""How bars look: those of kvtier in colour, raw limits hollow, all others grey."""


def bars(figures: dict[str, Any]) -> str:
    """Return groups of bars below each other, each with its name and its value.

    Args:
        figures: `title`; `unit`; `decimals`; `series`, by name what each is: "kvtier", "limit" or "other"; `groups`, by
            name the values of the series, null where one was not measured.
    """
    highest = max(value for values in figures["groups"].values() for value in values if value is not None)
    room = WIDTH - _NAMES - _VALUES - _EDGE
    drawn, top = [], 2 * _HEAD
    for group, values in figures["groups"].items():
        drawn.append(_text(group, _EDGE, top + 13, "group"))
        top += 22
        for (name, kind), value in zip(figures["series"].items(), values, strict=True):
            if value is None:
                continue
            length = max(2.0, room * value / highest)
            middle = top + _BAR - 4
            drawn.append(_text(name, _NAMES - 8, middle, anchor="end"))
            drawn.append(f'<rect x="{_NAMES}" y="{top}" width="{length:.1f}" height="{_BAR}" rx="2" {_FILLS[kind]}/>')
            drawn.append(_text(f"{value:,.{figures['decimals']}f}", _NAMES + length + 6, middle))
            top += _BAR + _GAP
        top += 10
    return _document(figures, drawn, top + 4)


def lines(figures: dict[str, Any]) -> str:
    """Return lines over a logarithmic axis, with a legend.

    Args:
        figures: `title`; `unit`, of y; `decimals`; `x` with `title` and `values`; `series`, by name the values of y;
            `low` and `high`, the ends of y; `dashed`, the name of the line with which the others are compared.
    """
    places = figures["x"]["values"]
    x = Axis(figures["x"]["title"], lambda value: f"{value:g}", places[0], places[-1], logarithmic=True)
    y = Axis(figures["unit"], lambda value: f"{value:g}", figures["low"], figures["high"])
    series = [
        Series(name, list(zip(places, values, strict=True)), dashed=name == figures.get("dashed"))
        for name, values in figures["series"].items()
    ]
    chart, legend = drawing(x, y, series)
    place = f'x="{_EDGE}" y="{1.4 * _HEAD}" width="{WIDTH - 2 * _EDGE:.0f}" height="392"'
    drawn = [f'<svg {place} viewBox="0 0 560 320">{"".join(chart)}</svg>']
    at, top = _EDGE + 40, 1.4 * _HEAD + 412
    for name, key in legend:
        width = 52 + 8.2 * len(name)
        if at + width > WIDTH:
            at, top = _EDGE + 40, top + 24
        drawn.append(f'<svg x="{at:.0f}" y="{top - 11}" width="30" height="12">{key}</svg>')
        drawn.append(_text(name, at + 38, top))
        at += width
    return _document(figures, drawn, top + 18)


def _document(figures: dict[str, Any], drawn: Sequence[str], height: float) -> str:
    title, unit = figures["title"], figures["unit"]
    head = [_text(title, _EDGE, 26, "title")]
    if "x" not in figures:  # else the axis has it
        head.append(_text(unit, _EDGE, 46, "faint"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">\n<style>{textwrap.dedent(_STYLE)}</style>\n'
        f'<rect width="100%" height="100%" rx="8" fill="var(--card)" stroke="var(--line)"/>\n'
        + "\n".join([*head, *drawn])
        + "\n</svg>\n"
    )


def _text(text: str, x: float, y: float, kind: str = "", anchor: str = "start") -> str:
    words = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"{words}>{escape(text)}</text>'
