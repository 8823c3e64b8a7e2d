"""Progress messages of the demonstration."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from kvtier.foreign_text import one_line


class Narrator:
    """Shows the steps: a spinner while a step runs (only on a terminal), then one line."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Show a step while it runs; print its line only if it succeeds."""
        if self._quiet:
            yield
            return
        started = time.perf_counter()
        what = one_line(what)
        with self._console.status(Text(f"{what} ...")):
            yield
        seconds = f"{time.perf_counter() - started:.1f} s"
        self._console.print(Text.assemble(("ok", "green"), f" {what} ", (seconds, "dim")))

    def say(self, text: str) -> None:
        """Print lines of text, for example of a model: as they are, without what would control a terminal."""
        if not self._quiet:
            for line in text.splitlines():
                self._console.print(Text(one_line(line)))
