"""The file `headers` of a slab: the record of slot *s* at byte 128 * s, zeros for an empty slot."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

from kvtier.stores.seal import HEADER_BYTES, BlockHeaders
from kvtier.stores.slab.directory import open_private
from kvtier.stores.slab.geometry import SlabGeometry
from kvtier.stores.slab.inventory import RECORDS_PER_READ, Inventory
from kvtier.stores.slab.segments import allocate


class HeaderFile:
    """Reads and writes records by slot. Threads may share it. Every error of the system is an OSError."""

    def __init__(self, path: Path, geometry: SlabGeometry) -> None:
        self._geometry = geometry
        self._descriptor = open_private(path)
        try:
            size = os.fstat(self._descriptor).st_size
            if size > geometry.headers_bytes:
                os.ftruncate(self._descriptor, geometry.headers_bytes)
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
        length, parts = count * HEADER_BYTES, []
        done = 0
        while done < length and (part := os.pread(self._descriptor, length - done, slot * HEADER_BYTES + done)):
            parts.append(part)
            done += len(part)
        return b"".join(parts).ljust(length, b"\0")

    def write(self, slot: int, records: bytes) -> None:
        """Write side by side records from `slot` on."""
        done = 0
        while done < len(records):
            done += os.pwrite(self._descriptor, records[done:], slot * HEADER_BYTES + done)

    def clear(self, slots: Iterable[int]) -> None:
        """Empty the records of `slots`."""
        for _, pairs in itertools.groupby(enumerate(sorted(slots)), lambda pair: pair[1] - pair[0]):
            run = [slot for _, slot in pairs]
            self.write(run[0], bytes(len(run) * HEADER_BYTES))

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def take_inventory(self, seal: BlockHeaders) -> Inventory:
        """Read every record; payloads are not looked at, checksums not yet. The inventory comes sorted."""
        num_slots = self._geometry.num_slots
        inventory = Inventory(seal, self._geometry.block_bytes, num_slots)
        for first in range(0, num_slots, RECORDS_PER_READ):
            inventory.add(self.read(first, min(RECORDS_PER_READ, num_slots - first)), first)
        inventory.sort()
        return inventory
