"""Tables of a page. On narrow screens each row becomes a list of names and values, so that nothing is cut off."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

NOTHING = ("", "-")
"""Cells that a list leaves out."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], best: int | None = None) -> str:
    """Return a table; row number `best` is highlighted."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(_row(header, row, is_best=index == best) for index, row in enumerate(rows))
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(header: Sequence[str], row: Sequence[str], is_best: bool) -> str:
    cells = (
        f'<td data-name="{escape(name)}"{" class=empty" if cell in NOTHING else ""}>{escape(cell)}</td>'
        for name, cell in zip(header, row, strict=True)
    )
    return ('<tr class="best">' if is_best else "<tr>") + "".join(cells) + "</tr>"


def figures_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the table behind a chart, folded until the reader opens it."""
    return f"<details><summary>Figures</summary>{table(header, rows)}</details>"
