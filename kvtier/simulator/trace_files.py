"""Opens the files of traces, plain or compressed by gzip, and reads them in bounded pieces."""

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
"""Of one line, or of a document over several: longer ones are no request and no conversation."""
_GZIP = b"\x1f\x8b"
_MAX_EXPANSION = 200
"""Times the compressed bytes; traces expand 5 to 50 times, and gzip can do 1,000."""
_FREE_BYTES = 4 << 20
"""Uncompressed, before the expansion is looked at."""
_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def is_trace_name(path: Path) -> bool:
    """Return whether a folder's file is taken for a part of a trace."""
    return path.name.endswith(_SUFFIXES)


def check_regular(path: Path) -> None:
    """Refuse what has no end or makes its reader wait: pipes, devices, sockets.

    Raises:
        TraceError: no regular file, or none that can be looked at.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise TraceError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise TraceError(f"{path}: {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}")


@contextmanager
def open_trace(path: Path) -> Iterator[IO[bytes]]:
    """Give a file's content, decompressed if it is compressed.

    Raises:
        TraceError: it cannot be read; raised for what goes wrong while it is read, too.
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
    """Return the next line, empty at the end.

    Raises:
        TraceError: it is longer than any that means something.
    """
    line = file.readline(MAX_DOCUMENT_BYTES + 1)
    if len(line) > MAX_DOCUMENT_BYTES:
        raise TraceError(f"{path}:{number}: a line of more than {MAX_DOCUMENT_BYTES >> 20} MiB")
    return line


class _Expanding(io.RawIOBase):
    """Decompressed bytes, as long as they are not far too many for the compressed ones."""

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
