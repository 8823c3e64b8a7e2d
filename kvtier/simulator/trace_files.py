"""Opens files of traces, plain or compressed with gzip, and reads them in bounded pieces."""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from kvtier.errors import TraceError

MAX_DOCUMENT_BYTES = 64 << 20
"""Largest line or document; a request or a conversation is far smaller."""
_GZIP = b"\x1f\x8b"
_MAX_EXPANSION = 200
"""Largest ratio of expanded to compressed bytes; traces have 5 to 50, and gzip can reach 1,000."""
_FREE_BYTES = 4 << 20
"""Expanded bytes that are always allowed, in addition to the ratio."""
_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def is_trace_name(path: Path) -> bool:
    """Return whether a file of a folder counts as a part of a trace, by its name."""
    return path.name.endswith(_SUFFIXES)


def check_regular(path: Path) -> None:
    """Refuse pipes, devices and sockets, which may block a reader or never end.

    Raises:
        TraceError: the path is no regular file, or does not exist.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise TraceError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise TraceError(f"{path}: {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}")


@contextmanager
def open_trace(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading; a compressed file is decompressed.

    Raises:
        TraceError: the file cannot be opened or, while the caller reads it, cannot be read or decompressed.
    """
    check_regular(path)
    try:
        with path.open("rb") as raw:
            is_compressed = raw.read(len(_GZIP)) == _GZIP
            raw.seek(0)
            if is_compressed:
                with gzip.GzipFile(fileobj=raw) as file:
                    yield io.BufferedReader(_Expanding(file, raw, path))
            else:
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TraceError(f"{path}: damaged or cut, gzip cannot read it ({error})") from None
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}") from None


def read_line(file: IO[bytes], path: Path, number: int) -> bytes:
    """Return the next line, b"" at the end of the file.

    Raises:
        TraceError: the line is longer than `MAX_DOCUMENT_BYTES`.
    """
    line = file.readline(MAX_DOCUMENT_BYTES + 1)
    if len(line) > MAX_DOCUMENT_BYTES:
        raise TraceError(f"{path}:{number}: a line of more than {MAX_DOCUMENT_BYTES >> 20} MiB")
    return line


class _Expanding(io.RawIOBase):
    """Decompressed bytes; raises TraceError if they are far more than the compressed ones (a "zip bomb")."""

    def __init__(self, file: gzip.GzipFile, raw: IO[bytes], path: Path) -> None:
        self._file, self._raw, self._path = file, raw, path
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override] # typeshed's own type is not public
        piece = self._file.read1(len(buffer))
        self._num_bytes += len(piece)
        if self._num_bytes > _FREE_BYTES + _MAX_EXPANSION * self._raw.tell():
            raise TraceError(f"{self._path}: expands to more than {_MAX_EXPANSION} times its compressed bytes")
        buffer[: len(piece)] = piece
        return len(piece)
