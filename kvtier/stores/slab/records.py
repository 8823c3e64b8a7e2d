"""The file of a slab's records, for engine and tools: that of slot *s* is at byte 128 * s, and zeros if it is empty."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np

from kvtier.stores.integrity.header import HEADER_BYTES, HEADER_DTYPE, MAX_SLOT
from kvtier.stores.own_files import Folder
from kvtier.stores.slab.layout import HEADERS_NAME, SlabGeometry
from kvtier.stores.slab.segments import allocate, has_space

MEDIUM_ERRORS = frozenset({errno.EIO, errno.EBADMSG, errno.ENODATA, errno.EREMOTEIO, errno.EILSEQ})
"""What a device answers for a sector that it cannot read; any other error says nothing about what is stored."""
_RECORDS_PER_READ = 1 << 14
_RECORDS_PER_SECTOR = mmap.PAGESIZE // HEADER_BYTES
MAX_UNREADABLE = 64 * _RECORDS_PER_SECTOR
"""Records that bad sectors may cost at once. A device may take half a minute to give up on each sector."""


class RawRecords(NamedTuple):
    """Whole records from slot `first` on, zeros for those in `unreadable` slots."""

    first: int
    raw: bytes
    unreadable: Sequence[int] = ()


class RecordFile:
    """Reads and writes records by slot; a context. Threads may share it. Every error of the system is an OSError."""

    def __init__(self, descriptor: int) -> None:
        """Args: descriptor: of the file; closed by `close`."""
        self._descriptor = descriptor
        self.status = os.fstat(descriptor)
        """What the file was when it was opened; its device and number stay."""

    @classmethod
    def open(cls, namespace: Folder, flags: int = os.O_RDONLY) -> Self:
        """Open the file of records in a namespace's folder; errors as `Folder.open_file`."""
        return cls(namespace.open_file(HEADERS_NAME, flags))

    @classmethod
    def make(cls, namespace: Folder, geometry: SlabGeometry, min_free: int = 0) -> Self:
        """Open the file for reading and writing, and give it the length and the space that the geometry needs.

        Args:
            min_free: bytes of the filesystem that stay free. Where they would not, a record takes its space when it
                is first written.
        """
        records = cls.open(namespace, os.O_RDWR | os.O_CREAT)
        try:
            descriptor, length = records._descriptor, geometry.headers_bytes
            os.ftruncate(descriptor, length)
            missing = length - os.fstat(descriptor).st_blocks * 512
            if missing <= 0 or not min_free or has_space(descriptor, missing + min_free):
                allocate(descriptor, 0, length)
        except OSError:
            records.close()
            raise
        return records

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    @property
    def is_present(self) -> bool:
        """Whether the file still has its name."""
        return os.fstat(self._descriptor).st_nlink > 0

    @property
    def num_slots(self) -> int:
        """Records that the file has room for."""
        return min(os.fstat(self._descriptor).st_size // HEADER_BYTES, MAX_SLOT + 1)

    def read(self, slot: int, count: int) -> bytes:
        """Return `count` records from `slot` on, zeros beyond the end of the file."""
        found = self._read_records(slot, count)
        if found.unreadable:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return found.raw.ljust(count * HEADER_BYTES, b"\0")

    def write(self, slot: int, records: bytes) -> None:
        """Write neighbours from `slot` on."""
        done = 0
        while done < len(records):
            done += os.pwrite(self._descriptor, records[done:], slot * HEADER_BYTES + done)

    def clear(self, slots: Iterable[int]) -> None:
        """Empty the records of `slots`; the file does not grow."""
        end = os.fstat(self._descriptor).st_size // HEADER_BYTES
        existing = sorted(slot for slot in slots if slot < end)
        for _, pairs in itertools.groupby(enumerate(existing), lambda pair: pair[1] - pair[0]):
            run = [slot for _, slot in pairs]
            self.write(run[0], bytes(len(run) * HEADER_BYTES))

    def each(self, num_slots: int) -> Iterator[RawRecords]:
        """Yield the records of the first `num_slots` slots in order, without those that were never written.

        A sector that cannot be read costs its own records only: clearing all of them writes it anew. If a device fails
        in many places, this raises instead: the device may work again tomorrow, and its records must not be cleared.
        """
        num_unreadable = 0
        first = self._next_written(0, num_slots)
        while first < num_slots:
            found = self._read_records(first, min(_RECORDS_PER_READ, num_slots - first))
            num_unreadable += len(found.unreadable)
            if num_unreadable > min(MAX_UNREADABLE, num_slots // 2):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            yield found
            first = self._next_written(first + _RECORDS_PER_READ, num_slots)

    def last_used(self) -> tuple[int, int]:
        """Return slot and payload length of the last record that is not empty; zeros if all are."""
        end = self.num_slots
        while end:
            start = max(0, end - _RECORDS_PER_READ)
            if self._next_written(start, end) < end:
                raw = self._read(start, end - start)
                used = used_records(raw[: len(raw) // HEADER_BYTES * HEADER_BYTES])
                if used.size:
                    last = int(used[-1])
                    record = np.frombuffer(raw, HEADER_DTYPE, count=1, offset=last * HEADER_BYTES)[0]
                    return start + last, int(record["payload_length"])
            end = start
        return 0, 0

    def _read_records(self, first: int, count: int) -> RawRecords:
        """Return `count` records from slot `first` on, fewer at the end of the file; past bad sectors."""
        try:
            raw = self._read(first, count)
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
                part = self._read(start, wanted)
            except OSError as error:
                if error.errno not in MEDIUM_ERRORS or len(unreadable) >= MAX_UNREADABLE:
                    raise  # this is no bad sector, the device is failing
                part = bytes(wanted * HEADER_BYTES)
                unreadable += range(start, start + wanted)
            parts.append(part)
        raw = b"".join(parts)
        return RawRecords(first, raw[: len(raw) // HEADER_BYTES * HEADER_BYTES], unreadable)

    def _read(self, first: int, count: int) -> bytes:
        """Return the bytes of records, fewer at the end of the file."""
        length, parts, done = count * HEADER_BYTES, [], 0
        while done < length and (part := os.pread(self._descriptor, length - done, first * HEADER_BYTES + done)):
            parts.append(part)
            done += len(part)
        return b"".join(parts)

    def _next_written(self, first: int, end: int) -> int:
        """Return the first slot from `first` on that is in no hole of the file; `end` if there is none before it."""
        try:
            found = os.lseek(self._descriptor, first * HEADER_BYTES, os.SEEK_DATA) // HEADER_BYTES
        except OSError as error:
            # ENXIO: only holes follow. Other errors come from filesystems that cannot tell: then everything is read.
            return end if error.errno == errno.ENXIO else min(first, end)
        # Reads start at a sector, so that the records of a bad one are recognised as its own.
        return min(max(first, found // _RECORDS_PER_SECTOR * _RECORDS_PER_SECTOR), end)


def used_records(raw: bytes) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """Return the positions of the records in `raw` that are not empty."""
    return np.flatnonzero(np.frombuffer(raw, "<u8").reshape(-1, HEADER_BYTES // 8).any(axis=1))
