"""The file `headers` of a slab, for engine and tools: the record of slot *s* at byte 128 * s, zeros for an empty slot.

It is read past holes, and past sectors that the device cannot read any more.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.own_files import Folder
from kvtier.stores.slab.layout import HEADERS_NAME, SlabGeometry
from kvtier.stores.slab.segments import allocate, has_space

RECORDS_PER_READ = 1 << 14
MEDIUM_ERRORS = frozenset({errno.EIO, errno.EBADMSG, errno.ENODATA, errno.EREMOTEIO, errno.EILSEQ})
"""What a device says of a sector that it cannot read: other errors are no fault of what is stored."""
_RECORDS_PER_SECTOR = mmap.PAGESIZE // HEADER_BYTES
MAX_UNREADABLE = 64 * _RECORDS_PER_SECTOR
"""Records that bad sectors may cost at once; each of them may take the device half a minute to give up."""


class HeaderFile:
    """Reads and writes records by slot. Threads may share it. Every error of the system is an OSError."""

    def __init__(self, folder: Folder, geometry: SlabGeometry, min_free: int = 0) -> None:
        """Args:
        folder: of the namespace.
        min_free: bytes of the filesystem that stay free: else space is taken with the records only.
        """
        self._geometry = geometry
        self._descriptor = folder.open_file(HEADERS_NAME, os.O_RDWR | os.O_CREAT)
        try:
            os.ftruncate(self._descriptor, geometry.headers_bytes)
            missing = geometry.headers_bytes - os.fstat(self._descriptor).st_blocks * 512
            only_with_records = missing > 0 and min_free and not has_space(self._descriptor, missing + min_free)
            if not only_with_records:
                allocate(self._descriptor, 0, geometry.headers_bytes)
        except OSError:
            os.close(self._descriptor)
            raise

    @property
    def present(self) -> bool:
        """Whether the file still has its name."""
        return os.fstat(self._descriptor).st_nlink > 0

    def read(self, slot: int, count: int) -> bytes:
        """Return `count` records from `slot` on; what lies beyond the end of the file reads as zeros."""
        found = read_raw(self._descriptor, slot, count)
        if found.unreadable:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return found.raw.ljust(count * HEADER_BYTES, b"\0")

    def write(self, slot: int, records: bytes) -> None:
        """Write side by side records from `slot` on."""
        _write(self._descriptor, slot, records)

    def clear(self, slots: Iterable[int]) -> None:
        """Empty the records of `slots`."""
        clear_records(self._descriptor, slots)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def each(self) -> Iterator[RawRecords]:
        """Yield every record, slot by slot.

        A sector that cannot be read costs its own records: who clears them writes it anew as a whole. Of a device
        that fails in many places nothing is given up: it may be back tomorrow.

        Raises:
            OSError: the records cannot be read.
        """
        num_slots = self._geometry.num_slots
        num_unreadable = 0
        for first in range(0, num_slots, RECORDS_PER_READ):
            found = read_raw(self._descriptor, first, min(RECORDS_PER_READ, num_slots - first))
            num_unreadable += len(found.unreadable)
            if num_unreadable > min(MAX_UNREADABLE, num_slots // 2):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            yield found


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
            if error.errno not in MEDIUM_ERRORS or len(unreadable) >= MAX_UNREADABLE:
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


def clear_records(descriptor: int, slots: Iterable[int]) -> None:
    """Empty the records of `slots` in an open file of records; those beyond its end are empty and it does not grow.

    Raises:
        OSError: they cannot be written.
    """
    end = os.fstat(descriptor).st_size // HEADER_BYTES
    there = sorted(slot for slot in slots if slot < end)
    for _, pairs in itertools.groupby(enumerate(there), lambda pair: pair[1] - pair[0]):
        run = [slot for _, slot in pairs]
        _write(descriptor, run[0], bytes(len(run) * HEADER_BYTES))


def _write(descriptor: int, slot: int, records: bytes) -> None:
    """Write side by side records from `slot` on."""
    done = 0
    while done < len(records):
        done += os.pwrite(descriptor, records[done:], slot * HEADER_BYTES + done)
