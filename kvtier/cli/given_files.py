"""Files that a user names for a command: read whole, but no more than expected, and never waited for without end."""

from __future__ import annotations

import json
import os
import select
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvtier.errors import ConfigError, describe
from kvtier.sizes import format_size

SILENT_SECONDS = 10.0
"""Longest time without a byte from a pipe. `--config <(command)` is a pipe, too, and the command may take a while."""
_PIECE_BYTES = 1 << 20
_MAX_DIGITS = 400
"""Of an integer; the largest float has 309, and Python refuses to print some thousands."""


def read_given(option: str, path: str | Path, most: int, expected: str) -> bytes:
    """Return the content of a file, or of a pipe such as `<(command)` in a shell.

    Args:
        option: the argument's name, for errors.
        most: bytes of the largest content that is read.
        expected: what the file should be, in words, for errors.

    Raises:
        ConfigError: it cannot be read, is neither a file nor a pipe, is longer, or is a pipe into which nobody writes.
    """
    try:
        # opening a FIFO would wait for somebody who writes
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            content = b"".join(_pieces(descriptor, most))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(option, str(path), f"{expected} expected ({describe(error)})") from None
    except ValueError as error:  # no file can have this name, or its content is refused
        raise ConfigError(option, str(path), f"{expected} expected ({error})") from None
    if len(content) > most:
        raise ConfigError(option, str(path), f"{expected} expected, of at most {format_size(most)}")
    return content


def parse_json(text: str | bytes) -> Any:
    """Return the value of JSON.

    Raises:
        ValueError: this is no JSON, is nested too deeply, or has an object with a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    except UnicodeDecodeError:
        raise ValueError("not valid JSON: no text in UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def twice(names: Sequence[str]) -> str | None:
    """Return the least name that is there twice; None if all differ."""
    return min((name for name, times in Counter(names).items() if times > 1), default=None)


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; refuse a key that is there twice: one of its values would be ignored."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{twice([name for name, _ in pairs])!r} is there twice: keep one")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits: at most {_MAX_DIGITS} allowed")
    return int(digits)


def _pieces(descriptor: int, most: int) -> Iterator[bytes]:
    """Yield a file's content, and more than `most` bytes of none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is neither a file nor a pipe, or a pipe stays silent.
    """
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind not in (stat.S_IFREG, stat.S_IFIFO):
        raise ValueError("a folder" if kind == stat.S_IFDIR else "neither a file nor a pipe")
    left = most + 1
    while left:
        if kind == stat.S_IFIFO:
            _wait_for_writer(descriptor)
        piece = os.read(descriptor, min(left, _PIECE_BYTES))
        if not piece:
            return
        left -= len(piece)
        yield piece


def _wait_for_writer(descriptor: int) -> None:
    """Wait until a pipe has bytes, or its end.

    Raises:
        ValueError: it has neither for `SILENT_SECONDS`.
    """
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    # a FIFO that nobody has opened to write has no event at all; without poll, reading would take it for ended
    if not poller.poll(1000 * SILENT_SECONDS):
        raise ValueError(f"a pipe into which nobody writes: nothing came for {SILENT_SECONDS:g} s")
