"""Reads a file of records as it is, past holes and past sectors that the device cannot read any more."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvtier.stores.integrity.header import HEADER_BYTES

RECORDS_PER_READ = 1 << 14
MEDIUM_ERRORS = frozenset({errno.EIO, errno.EBADMSG, errno.ENODATA, errno.EREMOTEIO, errno.EILSEQ})
"""What a device says of a sector that it cannot read: other errors are no fault of what is stored."""
_RECORDS_PER_SECTOR = mmap.PAGESIZE // HEADER_BYTES
MOST_UNREADABLE = 64 * _RECORDS_PER_SECTOR
"""Records that bad sectors may cost at once; each of them may take the device half a minute to give up."""


class RawRecords(NamedTuple):
    """Whole records from slot `first` on; of those in `unreadable` slots nothing is known, zeros stand for them."""

    first: int
    raw: bytes
    unreadable: Sequence[int] = ()


def read_raw(descriptor: int, first: int, count: int) -> RawRecords:
    """Return `count` records from slot `first` on, fewer at the end of the file.

    Raises:
        OSError: they cannot be read, for another reason than sectors that are damaged.
    """
    try:
        raw = _read(descriptor, first, count)
    except OSError as error:
        if error.errno not in MEDIUM_ERRORS:
            raise
    else:
        return RawRecords(first, raw[: len(raw) // HEADER_BYTES * HEADER_BYTES])
    parts: list[bytes] = []
    unreadable: list[int] = []
    for start in range(first, first + count, _RECORDS_PER_SECTOR):
        wanted = min(_RECORDS_PER_SECTOR, first + count - start)
        try:
            part = _read(descriptor, start, wanted)
        except OSError as error:
            if error.errno not in MEDIUM_ERRORS or len(unreadable) >= MOST_UNREADABLE:
                raise  # this is no bad sector, the device is failing
            part = bytes(wanted * HEADER_BYTES)
            unreadable += range(start, start + wanted)
        parts.append(part)
    raw = b"".join(parts)
    return RawRecords(first, raw[: len(raw) // HEADER_BYTES * HEADER_BYTES], unreadable)


def all_records(descriptor: int) -> Iterator[RawRecords]:
    """Yield the records of a file, slot by slot; what was never written is left out."""
    first = 0
    while (start := _next_data(descriptor, first)) is not None:
        first = start
        found = read_raw(descriptor, first, RECORDS_PER_READ)
        count = len(found.raw) // HEADER_BYTES
        if count:
            yield found
        if count < RECORDS_PER_READ:
            return
        first += count


def has_data(descriptor: int, first: int, end: int) -> bool:
    """Return whether anything was ever written to the records from slot `first` up to `end`."""
    found = _next_data(descriptor, first)
    return found is not None and found < end


def _next_data(descriptor: int, first: int) -> int | None:
    """Return the first slot from `first` on that is in no hole; None if there is none."""
    try:
        return max(first, os.lseek(descriptor, first * HEADER_BYTES, os.SEEK_DATA) // HEADER_BYTES)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        if error.errno != errno.EINVAL:  # of a filesystem that knows no holes
            raise
        return first


def _read(descriptor: int, first: int, count: int) -> bytes:
    """Return the bytes of records, fewer at the end of the file."""
    length, parts, done = count * HEADER_BYTES, [], 0
    while done < length and (part := os.pread(descriptor, length - done, first * HEADER_BYTES + done)):
        parts.append(part)
        done += len(part)
    return b"".join(parts)
