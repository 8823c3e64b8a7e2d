"""Decides which records of a slab are valid, at an engine's start and for tools. It handles many records at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvtier.keys import MAX_KEY_BYTES, MIN_KEY_BYTES, OffloadKey
from kvtier.stores.integrity.header import CHECKED_BYTES, HEADER_BYTES, HEADER_DTYPE, MAGIC, BlockHeaders
from kvtier.stores.slab.layout import SlabGeometry
from kvtier.stores.slab.records import RawRecords, used_records
from kvtier.types import FailureCause

_RECORDS_PER_BATCH = 1 << 14
_MIN_RECORDS = 1 << 20
_MAX_JUDGED = 64
"""Most payloads that a start reads to decide between records of the same key, and as many to find a valid newest
one."""
_KEY_OFFSET = HEADER_DTYPE.fields["key"][1] if HEADER_DTYPE.fields else 0
_FINGERPRINT_WORDS = slice(5, 9)
"""Place of the fingerprint in a record of 4-byte words."""
_KEY_WORDS = slice(6, 15)
"""Place of the key in a record of 8-byte words. The key begins in the middle of the first."""
_MULTIPLIERS = np.random.default_rng().integers(0, 2**64, 9, np.uint64) | np.uint64(1)

Judge = Callable[[int, OffloadKey], FailureCause | None]
"""Verifies the payload of a slot against its key's record; returns why it failed, None if it is valid or unknown."""


class Inventory:
    """The valid records of a slab, in the order in which they were written.

    Checksums of records are verified last and in batches, so that the first blocks can be used early. Only if records
    contradict each other, all checksums are verified first.

    Attributes:
        broken: slots whose records must be emptied.
        cause_of: by slot, why its record is invalid; superseded records are broken but not in here.
    """

    def __init__(self, headers: BlockHeaders, block_bytes: int, num_slots: int) -> None:
        self.broken: list[int] = []
        self.cause_of: dict[int, FailureCause] = {}
        self._headers = headers
        self._block_bytes = block_bytes
        self._read = np.empty(min(num_slots, _MIN_RECORDS), HEADER_DTYPE)  # untouched pages take no memory
        self._num_read = 0
        self._is_verified = False
        self._mixed = [np.empty(0, np.uint64)]
        self._kept: NDArray[np.intp] = np.empty(0, np.intp)

    def __len__(self) -> int:
        """Return the number of valid records."""
        return len(self._kept)

    @property
    def slots(self) -> NDArray[np.int64]:
        """The slots of the valid records."""
        return self._read["slot"][self._kept].astype(np.int64)

    @property
    def causes(self) -> dict[FailureCause, int]:
        """Number of invalid records by cause."""
        return dict(Counter(self.cause_of.values()))

    @property
    def num_superseded(self) -> int:
        """Number of records that a later record of the same key replaces."""
        return len(self.broken) - len(self.cause_of)

    @property
    def last_sequence(self) -> int:
        """The sequence of the newest valid record; 0 if there is none."""
        return int(_sequences(self._read[self._kept[-1:]]).max(initial=0))

    def reject(self, slot: int, cause: FailureCause) -> None:
        """Mark a slot's record as broken."""
        self.broken.append(slot)
        self.cause_of[slot] = cause

    def add(self, found: RawRecords) -> None:
        """Add records; unreadable ones are broken."""
        raw, first = found.raw, found.first
        for slot in found.unreadable:
            self.reject(slot, FailureCause.IO_ERROR)
        used = used_records(raw)
        if not len(used):
            return
        records = _those(np.frombuffer(raw, HEADER_DTYPE), used)
        plausible = _plausible(records, used + first, self._headers, self._block_bytes)
        for index in used[~plausible].tolist():
            self._reject_raw(raw[index * HEADER_BYTES : (index + 1) * HEADER_BYTES], index + first)
        records = _those(records, np.flatnonzero(plausible))
        end = self._num_read + len(records)
        if end > len(self._read):
            self._read.resize(end + end // 4, refcheck=False)  # no view exists here that a move could invalidate
        self._read[self._num_read : end] = records
        self._num_read = end
        self._mixed.append(_mixed_keys(records))

    def sort(self) -> None:
        """Keep all records that were added, in the order in which they were written."""
        records = self._read[: self._num_read]
        sequences = _sequences(records)
        in_order = not (np.diff(sequences) < 0).any()
        self._kept = np.arange(len(records)) if in_order else np.argsort(sequences, kind="stable")

    def drop_odd_keys(self) -> None:
        """Reject records whose keys have another length than the newest one's: an index has keys of one length."""
        if len(np.bincount(self._lengths()).nonzero()[0]) > 1:
            self.verify()
            lengths = self._lengths()
            self._keep(lengths == lengths[-1:], FailureCause.FOREIGN)

    def drop_unbacked(self, geometry: SlabGeometry, lengths: Mapping[int, int]) -> None:
        """Reject records whose payload is beyond the end of its data file; `lengths` has the bytes of each file."""
        segments, indices = np.divmod(self.slots, geometry.slots_per_segment)
        numbers = sorted(lengths)
        ends = np.asarray([*(lengths[number] for number in numbers), 0], np.int64)
        places = np.searchsorted(numbers, segments) if numbers else np.zeros(len(segments), np.intp)
        is_there = np.asarray([*numbers, -1])[places] == segments
        backed = is_there & ((indices + 1) * geometry.block_bytes <= ends[places])
        self._keep(backed, FailureCause.CORRUPT)

    def drop_superseded(self, judge: Judge | None = None) -> None:
        """Among records of the same key, keep the latest with a valid payload.

        Args:
            judge: verifies the payloads of a limited number of records; with None, the latest record is kept.
        """
        if not _has_equals(np.concatenate(self._mixed)[self._kept]):
            return
        self.verify()
        keys, slots = _keys(self._read[self._kept]), self.slots.tolist()
        earlier = Counter(keys)
        found: set[OffloadKey] = set()
        stays = np.zeros(len(keys), np.bool_)
        num_judged = 0
        for position in range(len(keys) - 1, -1, -1):
            key, slot = keys[position], slots[position]
            earlier[key] -= 1
            if key in found:
                self.broken.append(slot)
                continue
            if judge is not None and earlier[key] and num_judged < _MAX_JUDGED:
                num_judged += 1
                if (cause := judge(slot, key)) is not None:
                    self.reject(slot, cause)
                    continue
            found.add(key)
            stays[position] = True
        self._kept = self._kept[stays]

    def drop_bad_newest(self, judge: Judge) -> None:
        """Reject the newest records while their payloads are not valid, up to a limit.

        Sequences continue after the newest record's. If a forged record had the highest one, they would wrap to zero.
        """
        for _ in range(_MAX_JUDGED):
            newest = self._read[self._kept[-1:]]
            if not len(newest):
                break
            slot = int(newest["slot"][0])
            cause = judge(slot, _keys(newest)[0])
            if cause is None:
                break
            self.reject(slot, cause)
            self._kept = self._kept[:-1]

    def verify(self) -> None:
        """Verify the checksums of all records now, and reject those that are wrong."""
        if not self._is_verified:
            masks = [self._verified(self._read[batch]) for batch in self._batches()]
            self._keep(np.concatenate([*masks, np.empty(0, np.bool_)]), FailureCause.CORRUPT)
            self._is_verified = True

    def batches(self) -> Iterator[tuple[list[int], list[OffloadKey]]]:
        """Yield (slots, keys) of the valid records. `broken` is complete after the last batch."""
        for batch in self._batches():
            records = self._read[batch]
            if not self._is_verified:
                intact = self._verified(records)
                for slot in records["slot"][~intact].tolist():
                    self.reject(slot, FailureCause.CORRUPT)
                records = _those(records, np.flatnonzero(intact))
            yield records["slot"].tolist(), _keys(records)

    def _batches(self) -> Iterator[NDArray[np.intp]]:
        """Yield the positions of the records that are kept, in batches that fit the processor's cache."""
        kept = self._kept
        for start in range(0, len(kept), _RECORDS_PER_BATCH):
            yield kept[start : start + _RECORDS_PER_BATCH]

    def _lengths(self) -> NDArray[np.uint8]:
        lengths: NDArray[np.uint8] = self._read["key_length"][self._kept]
        return lengths

    def _keep(self, mask: NDArray[np.bool_], cause: FailureCause) -> None:
        """Keep the records where `mask` is True. The others are rejected for `cause`."""
        if mask.all():
            return
        for slot in self.slots[~mask].tolist():
            self.reject(slot, cause)
        self._kept = self._kept[mask]

    def _verified(self, records: NDArray[np.void]) -> NDArray[np.bool_]:
        """Return a mask of the records with the right checksum."""
        bodies = _rows(records.view("u1").reshape(-1, HEADER_BYTES)[:, :CHECKED_BYTES])
        found = np.fromiter(map(xxhash.xxh3_64_intdigest, bodies), np.uint64, len(bodies))
        intact: NDArray[np.bool_] = found == records["header_checksum"]
        return intact

    def _reject_raw(self, record: bytes, slot: int) -> None:
        parsed = self._headers.parse(record)
        self.reject(slot, parsed if isinstance(parsed, FailureCause) else FailureCause.FOREIGN)


def take_inventory(
    found: Iterable[RawRecords],
    headers: BlockHeaders,
    geometry: SlabGeometry,
    lengths: Mapping[int, int],
    judge: Judge | None = None,
) -> Inventory:
    """Return the inventory of a slab.

    Args:
        found: all records of the slab.
        lengths: bytes of the data files, by number.
        judge: verifies payloads; with None, no payload is read, and the checksums of all records are verified first.

    Raises:
        OSError: `found` raises it.
    """
    inventory = Inventory(headers, geometry.block_bytes, geometry.num_slots)
    for records in found:
        inventory.add(records)
    inventory.sort()
    if judge is None:
        inventory.verify()
    inventory.drop_odd_keys()
    inventory.drop_unbacked(geometry, lengths)
    inventory.drop_superseded(judge)
    if judge is not None:
        inventory.drop_bad_newest(judge)
    return inventory


def payload_length(found: Iterable[RawRecords], headers: BlockHeaders) -> int:
    """Return the most frequent payload length among the first records of this namespace; 0 if there are none."""
    for some in found:
        records = np.frombuffer(some.raw, HEADER_DTYPE)
        lengths, counts = np.unique(records["payload_length"][_marked_by(headers, records)], return_counts=True)
        if len(lengths):
            return int(lengths[np.argmax(counts)])
    return 0


def _those(records: NDArray[np.void], positions: NDArray[np.intp]) -> NDArray[np.void]:
    """Return the records at ascending `positions`; usually these are all records, and nothing is copied."""
    return records if len(positions) == len(records) else records[positions]


def _has_equals(values: NDArray[np.uint64]) -> bool:
    """Return whether a value occurs twice. Sorting is twenty times as fast as a Python set."""
    ordered = np.sort(values)
    return bool((ordered[1:] == ordered[:-1]).any())


def _mixed_keys(records: NDArray[np.void]) -> NDArray[np.uint64]:
    """Return a hash of each key. If two hashes are equal, the caller compares the keys."""
    words = records.view("<u8").reshape(-1, HEADER_BYTES // 8)[:, _KEY_WORDS]
    mixed: NDArray[np.uint64] = np.einsum("rw,w->r", words[:, 1:], _MULTIPLIERS[1:])
    mixed += (words[:, 0] >> np.uint64(32)) * _MULTIPLIERS[0]  # the lower half of this word is not part of the key
    return mixed


def _sequences(records: NDArray[np.void]) -> NDArray[np.int64]:
    sequences: NDArray[np.int64] = records["sequence_high"].astype(np.int64)
    sequences <<= 32
    sequences |= records["sequence_low"]
    return sequences


def _rows(matrix: NDArray[np.uint8]) -> list[bytes]:
    """Return the rows of a matrix of bytes."""
    rows: list[bytes] = np.ascontiguousarray(matrix).view(f"V{matrix.shape[1]}")[:, 0].tolist()
    return rows


def _keys(records: NDArray[np.void]) -> list[OffloadKey]:
    """Return the keys of records; usually all have the same length."""
    if not len(records):
        return []
    lengths = records["key_length"]
    longest = int(lengths.max())
    matrix = records.view("u1").reshape(-1, HEADER_BYTES)
    keys = _rows(matrix[:, _KEY_OFFSET : _KEY_OFFSET + longest])
    if (lengths != longest).any():
        keys = [key[:length] for key, length in zip(keys, lengths.tolist(), strict=True)]
    return cast(list[OffloadKey], keys)


def _marked_by(headers: BlockHeaders, records: NDArray[np.void]) -> NDArray[np.bool_]:
    """Return a mask of the records with this namespace's magic, version and fingerprint."""
    marked = np.frombuffer(headers.mark, "<u4")
    words = records.view("<u4").reshape(-1, HEADER_BYTES // 4)[:, _FINGERPRINT_WORDS][:, : len(marked)]
    ours: NDArray[np.bool_] = (words == marked).all(axis=1)
    ours &= (records["magic"] == MAGIC) & (records["version"] == headers.version)
    return ours


def _plausible(
    records: NDArray[np.void], slots: NDArray[np.int64], headers: BlockHeaders, block_bytes: int
) -> NDArray[np.bool_]:
    """Return a mask of the records that are valid if their checksums are right."""
    ours = _marked_by(headers, records)
    key_length = records["key_length"]
    ours &= (records["slot"] == slots) & (records["payload_length"] == block_bytes)
    ours &= (key_length >= MIN_KEY_BYTES) & (key_length <= MAX_KEY_BYTES)
    return ours
