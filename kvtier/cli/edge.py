"""How every command ends: an error becomes one line on stderr and an exit code."""

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
"""The reader of the output has gone, as with `| head`. rich uses the same code."""
EXIT_UNUSABLE = 2
EXIT_INTERRUPTED = 130


class Commands(TyperGroup):
    """The group of commands. It reports errors of kvtier and of the operating system in one line on stderr."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands with what each does, uncut."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help or "") for name, command in self.commands.items()])

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            # stdout is buffered: a full disk or a reader that went away may show only here
            _flush(sys.stdout)
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
    """Return the message of an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return one_line(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return one_line(error) or type(error).__name__


def prepare_streams() -> None:
    """Open closed standard streams on /dev/null, and escape characters that the terminal's encoding lacks, and bytes
    that are no text in it.

    The kernel gives a new file the lowest free number. With a closed stream that would be 0, 1 or 2, and messages would
    be written into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the kernel gives it the lowest free number, which is this one
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _end(text: str, code: int) -> int:
    """Print `text`, if any, to stderr, and return `code`.

    A stream that cannot be flushed is redirected to /dev/null: the interpreter flushes it again at its exit, and would
    print a second error.
    """
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
