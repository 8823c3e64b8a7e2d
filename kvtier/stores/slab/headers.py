"""The file `headers` of a slab: the record of slot *s* at byte 128 * s, zeros for an empty slot."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvtier.keys import MAX_KEY_BYTES, MIN_KEY_BYTES, OffloadKey
from kvtier.namespace import FORMAT_VERSION
from kvtier.stores.seal import CHECKED_BYTES, HEADER_BYTES, HEADER_DTYPE, MAGIC, Seal
from kvtier.stores.slab.directory import open_private
from kvtier.stores.slab.geometry import SlabGeometry
from kvtier.stores.slab.segments import allocate
from kvtier.types import FailureCause

RECORDS_PER_READ = 1 << 16
_KEY_OFFSET = HEADER_DTYPE.fields["key"][1] if HEADER_DTYPE.fields else 0
_FINGERPRINT_WORDS = slice(5, 9)
"""Where the fingerprint is in a record seen as 4-byte words."""


@dataclass
class Inventory:
    """What the records say.

    Attributes:
        slots, sequences, keys: the valid records, side by side.
        broken: slots whose record is neither empty nor valid.
        causes: how many of those, by cause.
    """

    slots: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    keys: list[OffloadKey] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    causes: Counter[FailureCause] = field(default_factory=Counter)

    def reject(self, slot: int, cause: FailureCause) -> None:
        """Note a record that must go."""
        self.broken.append(slot)
        self.causes[cause] += 1


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
        length = count * HEADER_BYTES
        return os.pread(self._descriptor, length, slot * HEADER_BYTES).ljust(length, b"\0")

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

    def take_inventory(self, seal: Seal) -> Inventory:
        """Read every record; payloads are not looked at."""
        inventory = Inventory()
        for first in range(0, self._geometry.num_slots, RECORDS_PER_READ):
            count = min(RECORDS_PER_READ, self._geometry.num_slots - first)
            _add_records(inventory, self.read(first, count), first, seal, self._geometry.block_bytes)
        return inventory


def _add_records(inventory: Inventory, raw: bytes, first: int, seal: Seal, block_bytes: int) -> None:
    """Sort the records in `raw`, which start at slot `first`, into the inventory."""
    used = np.flatnonzero(np.frombuffer(raw, "<u8").reshape(-1, HEADER_BYTES // 8).any(axis=1))
    if not len(used):
        return
    records = np.frombuffer(raw, HEADER_DTYPE)[used]
    plausible = _plausible(records, used + first, seal, block_bytes)
    candidates = records[plausible]
    bodies: list[bytes] = (
        candidates.view("u1")
        .reshape(-1, HEADER_BYTES)[:, :CHECKED_BYTES]
        .copy()
        .view(f"V{CHECKED_BYTES}")[:, 0]
        .tolist()
    )
    found = np.fromiter(map(xxhash.xxh3_64_intdigest, bodies), np.uint64, len(bodies))
    intact = found == candidates["header_checksum"]
    sequences = candidates["sequence_low"].astype(np.int64) | (candidates["sequence_high"].astype(np.int64) << 32)
    key_ends = candidates["key_length"].astype(np.int64) + _KEY_OFFSET
    inventory.slots += candidates["slot"][intact].tolist()
    inventory.sequences += sequences[intact].tolist()
    inventory.keys += [
        OffloadKey(body[_KEY_OFFSET:end])
        for body, end in zip(itertools.compress(bodies, intact), key_ends[intact].tolist(), strict=True)
    ]
    plausible[plausible] = intact
    for index in used[~plausible].tolist():
        parsed = seal.parse(raw[index * HEADER_BYTES : (index + 1) * HEADER_BYTES])
        inventory.reject(index + first, parsed if isinstance(parsed, FailureCause) else FailureCause.FOREIGN)


def _plausible(records: NDArray[np.void], slots: NDArray[np.int64], seal: Seal, block_bytes: int) -> NDArray[np.bool_]:
    """Return which records would be valid if their checksum is right."""
    words = records.view("<u4").reshape(-1, HEADER_BYTES // 4)[:, _FINGERPRINT_WORDS]
    ours: NDArray[np.bool_] = (words == np.frombuffer(seal.fingerprint, "<u4")).all(axis=1)
    key_length = records["key_length"]
    ours &= (records["magic"] == MAGIC) & (records["version"] == FORMAT_VERSION)
    ours &= (records["slot"] == slots) & (records["payload_length"] == block_bytes)
    ours &= (key_length >= MIN_KEY_BYTES) & (key_length <= MAX_KEY_BYTES)
    return ours


def batches(
    inventory: Inventory, kept: Sequence[int], size: int = RECORDS_PER_READ
) -> Iterator[tuple[Sequence[int], Sequence[OffloadKey]]]:
    """Yield (slots, keys) of the records at the positions `kept`, `size` at a time."""
    for start in range(0, len(kept), size):
        part = kept[start : start + size]
        yield [inventory.slots[position] for position in part], [inventory.keys[position] for position in part]
