"""Reads the records of a recording, up to its end or to where it was cut."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kvtier.errors import TraceError
from kvtier.foreign_text import MAX_QUOTED, one_line
from kvtier.keys import OffloadKey, make_offload_key
from kvtier.recording.format import HASH_BYTES, LENGTH, MAGIC, MAX_SECONDS, RECORD, Header, Record

_GZIP = b"\x1f\x8b"
_MAX_RECORD_BYTES = 1 << 30
"""Size above which a record counts as damaged: a damaged length must not allocate all memory."""


def is_recording(path: Path) -> bool:
    """Return whether a file begins like a recording. True also for a recording that is cut or damaged."""
    try:
        with path.open("rb") as raw:
            begin = raw.read(len(_GZIP))
            if begin != _GZIP:
                return begin == _GZIP[:1]
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw) as file:
                return MAGIC.startswith(_readable(file, len(MAGIC)))
    except OSError:
        return False


def _readable(file: gzip.GzipFile, size: int) -> bytes:
    """Read `size` bytes; fewer if the file is cut or damaged."""
    try:
        return file.read(size)
    except (OSError, EOFError, zlib.error):
        return b""


def read_recording(path: Path) -> tuple[Header, Iterator[Record]]:
    """Return the header, and the records up to the file's end or to where it was cut.

    Args:
        path: of a regular file; reading a pipe could block.

    Raises:
        TraceError: the file is no recording, or its header cannot be read. The iterator raises it for a time that is
            not after the one before, since an engine's clock does not go back.
    """
    file = gzip.open(path, "rb")  # noqa: SIM115 - the iterator closes it
    try:
        begin = file.read(len(MAGIC))
        if not MAGIC.startswith(begin):
            raise TraceError(f"{path}: not a recording of kvtier")
        if begin != MAGIC:
            raise EOFError("it was cut")
        header = msgspec.json.decode(file.read(LENGTH.unpack(file.read(LENGTH.size))[0]), type=Header)
    except (OSError, EOFError, zlib.error, struct.error, msgspec.DecodeError, ValueError) as error:
        file.close()
        raise TraceError(f"{path}: the beginning of this recording cannot be read ({error})") from None
    return _shown(header), _records(file, path)


def _shown(header: Header) -> Header:
    """Return the header with tiers' names that can be shown on a terminal."""
    replace = msgspec.structs.replace
    return replace(header, tiers=tuple(replace(tier, name=one_line(tier.name, MAX_QUOTED)) for tier in header.tiers))


def _records(file: gzip.GzipFile, path: Path) -> Iterator[Record]:
    known: dict[bytes, OffloadKey] = {}
    latest = 0.0
    with file:
        while True:
            try:
                head = file.read(RECORD.size)
                if len(head) < RECORD.size:
                    return
                kind, request, time, num_extra, num_keys, has_groups = RECORD.unpack(head)
                size = num_extra + num_keys * (HASH_BYTES + 2 * has_groups)
                body = file.read(size) if size < _MAX_RECORD_BYTES else b""
            except (OSError, EOFError, zlib.error):  # the engine was killed, or the size limit was reached
                return
            if len(body) < size:
                return
            if not latest <= time <= MAX_SECONDS:
                raise TraceError(f"{path}: a damaged recording (a time of {time:g} s after {latest:g} s)")
            latest = time
            yield Record(kind, request, time, body[:num_extra], _keys(body[num_extra:], num_keys, known))


def _keys(body: bytes, count: int, known: dict[bytes, OffloadKey]) -> list[OffloadKey]:
    groups = body[count * HASH_BYTES :]
    keys = []
    for index in range(count):
        part = body[index * HASH_BYTES : (index + 1) * HASH_BYTES]
        group = groups[2 * index : 2 * index + 2]
        key = known.get(part + group)
        if key is None:
            key = known[part + group] = make_offload_key(part, int.from_bytes(group, "big"))
        keys.append(key)
    return keys
