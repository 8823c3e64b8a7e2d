"""Where commands end: what cannot be done is one line and an exit code, whichever command met it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from kvtier.errors import KVTierError
from kvtier.foreign_text import one_line

EXIT_NO_READER = 1
"""Nobody reads the output any more, as behind `| head`; rich ends a program so, too."""
EXIT_UNUSABLE = 2
EXIT_INTERRUPTED = 130


class Commands(TyperGroup):
    """The commands; their errors of kvtier's and of the system's kind are told in one line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        """Run one command."""
        try:
            result = super().invoke(ctx)
            _flush(sys.stdout)  # a full disk, or a reader that went away, shows here at the latest
            return result
        except BrokenPipeError:
            raise typer.Exit(_end("", EXIT_NO_READER)) from None
        except (KVTierError, OSError) as error:
            raise typer.Exit(_end(f"kvtier {ctx.invoked_subcommand}: {describe(error)}", EXIT_UNUSABLE)) from None
        except MemoryError:
            raise typer.Exit(_end(f"kvtier {ctx.invoked_subcommand}: not enough memory", EXIT_UNUSABLE)) from None
        except KeyboardInterrupt:
            raise typer.Exit(_end(f"kvtier {ctx.invoked_subcommand}: interrupted", EXIT_INTERRUPTED)) from None


def describe(error: Exception) -> str:
    """Return what an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return one_line(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return one_line(error) or type(error).__name__


def prepare_streams() -> None:
    """Make standard streams what commands rely on.

    A closed one is opened on nothing: the next file would get its number, and a line for people would end in it. And
    characters that the terminal's encoding lacks are escaped, not refused.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _end(text: str, code: int) -> int:
    """Say why a command ends, if there is anything to say; no stream fails again when the interpreter flushes it."""
    if text:
        with contextlib.suppress(OSError):
            typer.echo(text, err=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            _flush(stream)
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def _flush(stream: Any) -> None:
    if stream is not None and not stream.closed:
        stream.flush()
