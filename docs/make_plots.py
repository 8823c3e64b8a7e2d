"""Draws the plots of the documentation anew, and writes the table behind each; see `make docs`.

The figures are in `figures.json`, as a benchmark printed them. A plot stands on a page between
`<!-- plot NAME: make docs -->` and `<!-- end of plot -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from plot_svg import bars, lines  # noqa: E402

PLOT = re.compile(r"(<!-- plot ([\w-]+): make docs -->\n).*?(<!-- end of plot -->)", re.S)
FIGURES: dict[str, dict[str, Any]] = json.loads((DOCS / "figures.json").read_text(encoding="utf-8"))


def draw(name: str) -> str:
    """Return a plot as an SVG document."""
    figures = FIGURES[name]
    return lines(figures) if "x" in figures else bars(figures)


def on_page(name: str) -> str:
    """Return what stands on the page: the plot, what was measured where, and the table."""
    figures = FIGURES[name]
    header, rows = table_of(figures)
    return "\n".join(
        [
            f"![{figures['title']}: the figures are in the table below](plots/{name}.svg)",
            "",
            '<details markdown="1"><summary>Figures, and how to measure them</summary>',
            "",
            f"{figures['measured']}",
            "",
            row(header),
            "|---" * len(header) + "|",
            *map(row, rows),
            "",
            "</details>",
            "",
        ]
    )


def table_of(figures: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table behind a plot."""
    names = list(figures["series"])
    if "x" in figures:
        return [figures["x"]["title"], *names], [
            [f"{at:g}", *(shown(figures["series"][name][index], figures) for name in names)]
            for index, at in enumerate(figures["x"]["values"])
        ]
    groups = [[group, *(shown(value, figures) for value in values)] for group, values in figures["groups"].items()]
    return [figures["unit"], *names], groups


def shown(value: float | None, figures: dict[str, Any]) -> str:
    """Return a figure as text; "" for none."""
    return "" if value is None else f"{value:,.{figures['decimals']}f}"


def row(cells: Iterable[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def up_to_date(text: str) -> str:
    """Return a page with its plots' parts written anew."""
    return PLOT.sub(lambda found: f"{found[1]}{on_page(found[2])}{found[3]}", text)


def pages() -> Sequence[Path]:
    """Return the pages that may have plots."""
    return sorted(DOCS.glob("*.md"))


def main() -> None:
    """Write plots and pages anew."""
    for name in FIGURES:
        (DOCS / "plots" / f"{name}.svg").write_text(draw(name), encoding="utf-8")
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (made := up_to_date(text)) != text:
            page.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
