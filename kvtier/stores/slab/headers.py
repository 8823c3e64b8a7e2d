"""The file `headers` of a slab: the record of slot *s* at byte 128 * s, zeros for an empty slot."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterable

from kvtier.stores.integrity.header import HEADER_BYTES, BlockHeaders
from kvtier.stores.own_files import Folder
from kvtier.stores.slab.inventory import Inventory
from kvtier.stores.slab.layout import HEADERS_NAME, SlabGeometry
from kvtier.stores.slab.raw_records import MOST_UNREADABLE, RECORDS_PER_READ, read_raw
from kvtier.stores.slab.segments import allocate, has_space


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

    def take_inventory(self, headers: BlockHeaders) -> Inventory:
        """Read every record; payloads are not looked at, checksums not yet. The inventory comes sorted.

        A sector that cannot be read costs its own records: who clears them writes it anew as a whole. Of a device
        that fails in many places nothing is given up: it may be back tomorrow.

        Raises:
            OSError: the records cannot be read.
        """
        num_slots = self._geometry.num_slots
        inventory = Inventory(headers, self._geometry.block_bytes, num_slots)
        num_unreadable = 0
        for first in range(0, num_slots, RECORDS_PER_READ):
            found = read_raw(self._descriptor, first, min(RECORDS_PER_READ, num_slots - first))
            num_unreadable += len(found.unreadable)
            if num_unreadable > min(MOST_UNREADABLE, num_slots // 2):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            inventory.add(found)
        inventory.sort()
        return inventory


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
