"""What the records of a slab say, found out many at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvtier.keys import MAX_KEY_BYTES, MIN_KEY_BYTES, OffloadKey
from kvtier.stores.seal import CHECKED_BYTES, HEADER_BYTES, HEADER_DTYPE, MAGIC, BlockHeaders
from kvtier.stores.slab.geometry import SlabGeometry
from kvtier.types import FailureCause

RECORDS_PER_READ = 1 << 16
_KEY_OFFSET = HEADER_DTYPE.fields["key"][1] if HEADER_DTYPE.fields else 0
_FINGERPRINT_WORDS = slice(5, 9)
"""Where the fingerprint is in a record seen as 4-byte words."""


@dataclass
class Inventory:
    """What the records say.

    Attributes:
        slots, sequences, keys: the valid records, side by side; oldest first after `sort`.
        broken: slots whose record is neither empty nor valid.
        causes: how many of those, by cause.
    """

    slots: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    sequences: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    keys: list[OffloadKey] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    causes: Counter[FailureCause] = field(default_factory=Counter)

    @property
    def last_sequence(self) -> int:
        """The highest sequence of a valid record; 0 if there is none."""
        return int(self.sequences.max(initial=0))

    def reject(self, slot: int, cause: FailureCause) -> None:
        """Note a record that must go."""
        self.broken.append(slot)
        self.causes[cause] += 1

    def sort(self) -> None:
        """Put the valid records in the order in which they were written."""
        if (np.diff(self.sequences) < 0).any():
            self.keep(np.argsort(self.sequences, kind="stable"))

    def keep(self, positions: NDArray[np.int64]) -> None:
        """Keep the valid records at `positions` only, in their order."""
        self.slots, self.sequences = self.slots[positions], self.sequences[positions]
        self.keys = [self.keys[position] for position in positions.tolist()]

    def drop_unbacked(self, geometry: SlabGeometry, lengths: Sequence[int]) -> None:
        """Reject records whose payload lies beyond the end of its data file; `lengths` are those of the files."""
        segments, indices = np.divmod(self.slots, geometry.slots_per_segment)
        backed = (indices + 1) * geometry.block_bytes <= np.asarray(lengths, np.int64)[segments]
        for slot in self.slots[~backed].tolist():
            self.reject(slot, FailureCause.CORRUPT)
        if not backed.all():
            self.keep(np.flatnonzero(backed))

    def drop_odd_keys(self) -> None:
        """Reject records whose keys have another length than the latest one's: one index holds one length."""
        lengths = np.fromiter(map(len, self.keys), np.int64, len(self.keys))
        odd = lengths != lengths[-1:]
        for slot in self.slots[odd].tolist():
            self.reject(slot, FailureCause.FOREIGN)
        if odd.any():
            self.keep(np.flatnonzero(~odd))

    def drop_superseded(self) -> None:
        """Of records with one key, keep the latest; the others are no failures."""
        if len(set(self.keys)) < len(self.keys):
            latest = dict(zip(self.keys, range(len(self.keys)), strict=True))
            kept = np.sort(np.fromiter(latest.values(), np.int64, len(latest)))
            self.broken += np.delete(self.slots, kept).tolist()
            self.keep(kept)

    def batches(self, size: int = RECORDS_PER_READ) -> Iterator[tuple[list[int], list[OffloadKey]]]:
        """Yield (slots, keys) of the valid records, `size` at a time."""
        for start in range(0, len(self.keys), size):
            yield self.slots[start : start + size].tolist(), self.keys[start : start + size]


def add_records(inventory: Inventory, raw: bytes, first: int, seal: BlockHeaders, block_bytes: int) -> None:
    """Sort the records in `raw`, which start at slot `first`, into the inventory, in the order of slots."""
    used = np.flatnonzero(np.frombuffer(raw, "<u8").reshape(-1, HEADER_BYTES // 8).any(axis=1))
    if not len(used):
        return
    records = _those(np.frombuffer(raw, HEADER_DTYPE), used)
    plausible = _plausible(records, used + first, seal, block_bytes)
    candidates = _those(records, np.flatnonzero(plausible))
    matrix = candidates.view("u1").reshape(-1, HEADER_BYTES)
    bodies = _rows(matrix[:, :CHECKED_BYTES])
    found = np.fromiter(map(xxhash.xxh3_64_intdigest, bodies), np.uint64, len(bodies))
    intact = found == candidates["header_checksum"]
    valid = _those(candidates, np.flatnonzero(intact))
    sequences = valid["sequence_low"].astype(np.int64) | (valid["sequence_high"].astype(np.int64) << 32)
    inventory.slots = np.concatenate([inventory.slots, valid["slot"]])
    inventory.sequences = np.concatenate([inventory.sequences, sequences])
    inventory.keys += _keys(valid.view("u1").reshape(-1, HEADER_BYTES), valid["key_length"])
    plausible[plausible] = intact
    for index in used[~plausible].tolist():
        parsed = seal.parse(raw[index * HEADER_BYTES : (index + 1) * HEADER_BYTES])
        inventory.reject(index + first, parsed if isinstance(parsed, FailureCause) else FailureCause.FOREIGN)


def _those(records: NDArray[np.void], positions: NDArray[np.intp]) -> NDArray[np.void]:
    """Return the records at `positions`, which rise; as a rule that is all of them, and no copy."""
    return records if len(positions) == len(records) else records[positions]


def _rows(matrix: NDArray[np.uint8]) -> list[bytes]:
    """Return the rows of a matrix of bytes."""
    rows: list[bytes] = np.ascontiguousarray(matrix).view(f"V{matrix.shape[1]}")[:, 0].tolist()
    return rows


def _keys(records: NDArray[np.uint8], lengths: NDArray[np.uint8]) -> list[OffloadKey]:
    """Return the keys of records, a row of bytes each; as a rule all have one length."""
    if not len(lengths):
        return []
    longest = int(lengths.max())
    keys = _rows(records[:, _KEY_OFFSET : _KEY_OFFSET + longest])
    if (lengths != longest).any():
        keys = [key[:length] for key, length in zip(keys, lengths.tolist(), strict=True)]
    return cast(list[OffloadKey], keys)


def marked_by(seal: BlockHeaders, records: NDArray[np.void]) -> NDArray[np.bool_]:
    """Return which records say that they are of this kind and namespace."""
    marked = np.frombuffer(seal.fingerprint[: seal.marked_bytes], "<u4")
    words = records.view("<u4").reshape(-1, HEADER_BYTES // 4)[:, _FINGERPRINT_WORDS][:, : len(marked)]
    ours: NDArray[np.bool_] = (words == marked).all(axis=1)
    ours &= (records["magic"] == MAGIC) & (records["version"] == seal.version)
    return ours


def _plausible(
    records: NDArray[np.void], slots: NDArray[np.int64], seal: BlockHeaders, block_bytes: int
) -> NDArray[np.bool_]:
    """Return which records would be valid if their checksum is right."""
    ours = marked_by(seal, records)
    key_length = records["key_length"]
    ours &= (records["slot"] == slots) & (records["payload_length"] == block_bytes)
    ours &= (key_length >= MIN_KEY_BYTES) & (key_length <= MAX_KEY_BYTES)
    return ours
