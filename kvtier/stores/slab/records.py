"""The file of a slab's records. The record of slot *s* is at byte 128 * s; zeros mean an empty slot."""

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
"""Errors of a sector that the device cannot read. Other errors do not mean that the stored bytes are bad."""
_RECORDS_PER_READ = 1 << 14
_RECORDS_PER_SECTOR = mmap.PAGESIZE // HEADER_BYTES
MAX_UNREADABLE = 64 * _RECORDS_PER_SECTOR
"""Most records in bad sectors before a read gives up: a device may try each bad sector for half a minute."""


class RawRecords(NamedTuple):
    """Whole records from slot `first` on; the records of `unreadable` slots are zeros."""

    first: int
    raw: bytes
    unreadable: Sequence[int] = ()


class RecordFile:
    """Reads and writes records by slot; a context manager. Threads may share it. Its methods raise OSError."""

    def __init__(self, descriptor: int) -> None:
        """Args: descriptor: of the file; `close` closes it."""
        self._descriptor = descriptor
        self.status = os.fstat(descriptor)
        """What the file was when it was opened; its device and number stay."""

    @classmethod
    def open(cls, namespace: Folder, flags: int = os.O_RDONLY) -> Self:
        """Open the file of records in a namespace's folder; raise as `Folder.open_file`."""
        return cls(namespace.open_file(HEADERS_NAME, flags))

    @classmethod
    def make(cls, namespace: Folder, geometry: SlabGeometry, min_free: int = 0) -> Self:
        """Open or create the file for reading and writing, with the length that the geometry needs.

        Its space is allocated, too, unless that would leave less than `min_free` bytes of the filesystem free.
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
        """Whether the file was not deleted."""
        return os.fstat(self._descriptor).st_nlink > 0

    @property
    def num_slots(self) -> int:
        """Number of records that fit the file."""
        return min(os.fstat(self._descriptor).st_size // HEADER_BYTES, MAX_SLOT + 1)

    def read(self, slot: int, count: int) -> bytes:
        """Return `count` records from `slot` on, with zeros after the end of the file."""
        length = count * HEADER_BYTES
        try:
            raw = os.pread(self._descriptor, length, slot * HEADER_BYTES)
        except OSError:  # a bad sector, or a device that fails: the careful way below knows
            raw = b""
        if len(raw) == length:
            return raw
        found = self._read_records(slot, count)
        if found.unreadable:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return found.raw.ljust(length, b"\0")

    def write(self, slot: int, records: bytes) -> None:
        """Write records of neighbouring slots, from `slot` on."""
        done = 0
        while done < len(records):
            done += os.pwrite(self._descriptor, records[done:], slot * HEADER_BYTES + done)

    def clear(self, slots: Iterable[int]) -> None:
        """Write zeros to the records of `slots`; slots after the end of the file are ignored."""
        end = os.fstat(self._descriptor).st_size // HEADER_BYTES
        existing = sorted(slot for slot in slots if slot < end)
        for _, pairs in itertools.groupby(enumerate(existing), lambda pair: pair[1] - pair[0]):
            run = [slot for _, slot in pairs]
            self.write(run[0], bytes(len(run) * HEADER_BYTES))

    def each(self, num_slots: int) -> Iterator[RawRecords]:
        """Yield the records of the first `num_slots` slots in order, without holes of the file.

        A sector that cannot be read makes only its own records unreadable; the caller clears these, which rewrites the
        sector. If many sectors cannot be read, this raises OSError: the device may work again later, so its records
        must not be cleared.
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
        """Return slot and payload length of the last record that is not empty; zeros if there is none."""
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
        """Return `count` records from slot `first` on, fewer at the end of the file; skip bad sectors."""
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
                    raise  # not just a bad sector: the device is failing
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
        """Return the first slot from `first` on that is not in a hole of the file, at most `end`."""
        try:
            found = os.lseek(self._descriptor, first * HEADER_BYTES, os.SEEK_DATA) // HEADER_BYTES
        except OSError as error:
            # ENXIO: only a hole follows. Other errors: the filesystem does not know holes, so everything is read.
            return end if error.errno == errno.ENXIO else min(first, end)
        # Reads begin at a sector's start, so that a bad sector and its records are found together.
        return min(max(first, found // _RECORDS_PER_SECTOR * _RECORDS_PER_SECTOR), end)


def used_records(raw: bytes) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """Return the positions of the records in `raw` that are not empty."""
    return np.flatnonzero(np.frombuffer(raw, "<u8").reshape(-1, HEADER_BYTES // 8).any(axis=1))
