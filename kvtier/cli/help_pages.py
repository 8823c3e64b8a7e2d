"""Shows the help of a command without importing it: as `docs/make_tables.py` wrote it down in `help_pages.json`.

A command imports what it works with, numpy for example, and would need most of a second before it says what it takes. A
test compares what was written down with what each command says of itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

PAGES = Path(__file__).with_name("help_pages.json")
_HELP = "--help"


def command_of_page(name: str, arguments: Sequence[str]) -> TyperCommand | None:
    """Return a command that only shows help, if nothing else is asked for; None if the command itself is needed.

    Args:
        arguments: what follows the command's name.
    """
    if not arguments or arguments[-1] != _HELP or any(one.startswith("-") for one in arguments[:-1]):
        return None
    page = json.loads(PAGES.read_text(encoding="utf-8")).get(" ".join([name, *arguments[:-1]]))
    return None if page is None else _Page(name, arguments[:-1], page)


def page_of(command: Any, path: str) -> dict[str, Any]:
    """Return the help of a command as JSON values.

    Args:
        path: the command's name, after the name of its group if it has one.
    """
    context = typer.Context(command, info_name=path)
    recorder = _Recorder()
    command.format_options(context, recorder)
    return {"usage": command.collect_usage_pieces(context), "help": command.help, "sections": recorder.sections}


class _Recorder:
    """Takes the part of a formatter, and keeps what is written."""

    width = 1_000_000
    """So that nothing is cut; whoever shows it folds it."""

    def __init__(self) -> None:
        self.sections: list[tuple[str, list[tuple[str, str]]]] = []

    @contextmanager
    def section(self, title: str) -> Iterator[None]:
        self.sections.append((title, []))
        yield

    def write_dl(self, rows: Sequence[tuple[str, str]], **_: Any) -> None:
        self.sections[-1][1].extend(rows)


class _Page(TyperCommand):
    def __init__(self, name: str, inner: Sequence[str], page: dict[str, Any]) -> None:
        """Args: inner: the command's name within its group, if it has one."""
        settings = {"allow_extra_args": bool(inner)}
        super().__init__(name, help=page["help"], context_settings=settings, rich_markup_mode=None)
        self._inner, self._page = inner, page

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        formatter.write_usage(" ".join([ctx.command_path, *self._inner]), " ".join(self.collect_usage_pieces(ctx)))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return list(self._page["usage"])

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for title, rows in self._page["sections"]:
            with formatter.section(title):
                formatter.write_dl([tuple(row) for row in rows])
