"""Progress messages of the demonstration."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


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
        with self._console.status(f"{what} ..."):
            yield
        self._console.print(f"[green]ok[/green] {what} [dim]{time.perf_counter() - started:.1f} s[/dim]")

    def say(self, text: str) -> None:
        """Print a line without interpreting rich's markup in it."""
        if not self._quiet:
            self._console.print(text, markup=False, highlight=False)
