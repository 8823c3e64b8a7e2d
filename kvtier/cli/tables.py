"""Tables for a terminal. In a narrow one they fold; rich alone would cut what does not fit."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.table import Table


def folding_table(headings: Iterable[str], left: Iterable[str] = (), title: str | None = None) -> Table:
    """Return a table without rows.

    Args:
        headings: of the columns, which are numbers and so to the right.
        left: headings of the columns that are text.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    texts = set(left)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in texts else "right", overflow="fold")
    return table
