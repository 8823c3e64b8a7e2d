"""A slab on a local filesystem: payloads at fixed places, and a record of 128 bytes for each.

The payload of a block is written first, its record afterwards. If the process is killed in between, a file is cut or a
bit flips, the record does not match the payload, and the block is a miss. There is no fsync: a power cut may lose the
blocks of the last seconds, but never makes a wrong byte valid.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

from kvtier.abc import SlotStore, StoreContext
from kvtier.errors import StoreError, StoreUnavailableError, describe
from kvtier.keys import OffloadKey
from kvtier.stores.failures import SystemErrors
from kvtier.stores.integrity import open_sealer
from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.integrity.scratch import whole_pages
from kvtier.stores.integrity.sealing import PORTION_BYTES, Sealer
from kvtier.stores.mounts import check_size
from kvtier.stores.slab.directory import SlabDirectory
from kvtier.stores.slab.layout import GROWTH_BYTES, SEGMENT_BYTES, Run, SlabGeometry, coalesce
from kvtier.stores.slab.options import DirectoryOptions
from kvtier.stores.slab.records import RecordFile
from kvtier.stores.slab.recovery import take_inventory
from kvtier.stores.slab.roads import Road, RoadChoice
from kvtier.stores.slab.segments import Segments
from kvtier.stores.vectored import NO_SPACE_ERRORS
from kvtier.types import FailureCause

_SHAPE = attrgetter("nbytes", "c_contiguous")


class SlabStore(SlotStore):
    """Blocks of one namespace in a directory that only this process uses."""

    def __init__(
        self,
        directory: SlabDirectory,
        geometry: SlabGeometry,
        capacity: int,
        min_free: int,
        context: StoreContext,
        sealer: Sealer,
        writes_ahead: bool | None = None,
        road: Road | None = None,
    ) -> None:
        """Args:
        directory: opened for the sealer's namespace. The store closes it, also if this raises OSError.
        sealer: of the blocks.
        writes_ahead: as in `Segments`.
        road: the only one to take; None: straight if the buffers lie in huge pages, else chosen by measuring.
        """
        self._directory = directory
        self._geometry = geometry
        self._capacity = capacity
        self._failures = context.failures
        self._errors = SystemErrors(directory.path, context.failures)
        folder = directory.namespace
        self._segments = Segments(folder, geometry, self._make_room, min_free, writes_ahead)
        self._sealer = sealer
        self._copying_sealer = sealer.through_huge_pages()
        if road is None and (context.huge_pages or self._copying_sealer is sealer):
            road = Road.STRAIGHT
        self._writing, self._reading = RoadChoice(road), RoadChoice(road)
        try:
            self._segments.fit()
            self._make_room(self._segments.lengths)
            self._records = RecordFile.make(folder, geometry, min_free)
        except OSError:
            directory.close()
            raise

    @classmethod
    def open(
        cls,
        options: Mapping[str, Any],
        context: StoreContext,
        segment_bytes: int = SEGMENT_BYTES,
        growth_bytes: int = GROWTH_BYTES,
        writes_ahead: bool | None = None,
        road: Road | None = None,
    ) -> Self:
        """Open a directory.

        Args:
            options: `DirectoryOptions`.
            segment_bytes, growth_bytes: as in `SlabGeometry.of`.
            writes_ahead: as in `Segments`.
            road: as in the constructor.

        Raises:
            ConfigError: the capacity does not hold one block.
            StoreUnavailableError: the secret cannot be read, another process uses the directory, the directory is not
                kvtier's or not writable, or its filesystem is smaller than the capacity.
        """
        _, sealer = open_sealer(options, context.namespace)
        read = DirectoryOptions.read(options)
        geometry = SlabGeometry.of(read.capacity, context.block_bytes, segment_bytes, growth_bytes)
        path = Path(read.path)
        directory = SlabDirectory.open(path, sealer.namespace, read.mount_point, segment_bytes)
        try:
            check_size(path, directory.folder.descriptor, read.capacity, read.min_free)
        except StoreUnavailableError:
            directory.close()
            raise
        try:
            return cls(directory, geometry, read.capacity, read.min_free, context, sealer, writes_ahead, road)
        except OSError as error:
            raise StoreUnavailableError(f"{path}: {describe(error)}") from error

    @property
    def num_slots(self) -> int:
        """Slots that fit the capacity."""
        return self._geometry.num_slots

    @property
    def direct(self) -> bool:
        """Whether page-aligned buffers bypass the page cache."""
        return self._segments.direct

    def recover(self) -> Iterator[tuple[Sequence[int], Sequence[OffloadKey]]]:
        """Read the records; yield batches of (slots, keys), oldest first.

        After the last batch, records that are broken, foreign, superseded or without payload are emptied.

        Raises:
            StoreError: the records cannot be read.
        """
        try:
            found, lengths = self._records.each(self.num_slots), dict(enumerate(self._segments.lengths))
            inventory = take_inventory(found, self._sealer.headers, self._geometry, lengths, self._judge)
            yield from inventory.batches()
            self._records.clear(inventory.broken)
        except OSError as error:
            raise StoreError(f"{self._directory.path}: {describe(error)}") from error
        self._sealer.headers.continue_after(inventory.last_sequence)
        for cause, count in inventory.causes.items():
            self._failures.count(cause, count)

    def write(self, slots: Sequence[int], keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Replace the blocks of the slots; where that fails, count the cause and return False.

        Raises:
            StoreUnavailableError: the directory was removed.
        """
        results, (road, sealer), start = [False] * len(slots), self._road(self._writing), time.perf_counter()
        for run in self._runs(slots, buffers, sealer.most_sealed(self._geometry.block_bytes)):
            self._write_run(sealer, run, keys, buffers, results)
        if all(results):
            self._writing.learn(road, len(buffers) * self._geometry.block_bytes, time.perf_counter() - start)
        return results

    def read_into(self, slots: Sequence[int], keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Fill and verify the buffers; for a block that fails, count the cause, empty its record and return False.

        Raises:
            StoreUnavailableError: the directory was removed.
        """
        results, (road, sealer), start = [False] * len(slots), self._road(self._reading), time.perf_counter()
        for run in self._runs(slots, buffers, sealer.most_opened(self._geometry.block_bytes)):
            self._read_run(sealer, run, keys, buffers, results)
        if all(results):
            self._reading.learn(road, len(buffers) * self._geometry.block_bytes, time.perf_counter() - start)
        return results

    def delete(self, slots: Sequence[int], keys: Sequence[OffloadKey]) -> None:
        """Empty the records of the slots. The payloads stay until others overwrite them.

        Raises:
            StoreUnavailableError: the directory was removed.
            StoreError: the records cannot be written.
        """
        self._directory.check_present(self._records.status)
        try:
            self._records.clear(slot for slot in map(int, slots) if 0 <= slot < self.num_slots)
        except OSError as error:
            raise StoreError(f"{self._directory.path}: {describe(error)}") from error

    def prepare(self) -> tuple[int, int] | None:
        """Write zeros to the space of the next blocks, unless blocks of other namespaces take it."""
        return self._segments.write_ahead(self._has_room)

    def close(self) -> None:
        """Close the files and release the directory."""
        self._segments.close()
        self._records.close()
        self._directory.close()

    def _make_room(self, lengths: Sequence[int]) -> None:
        """Make room for data files of these lengths, at the cost of other namespaces."""
        self._directory.give_way(self._geometry.cost_bytes(lengths), self._capacity)

    def _has_room(self, lengths: Sequence[int]) -> bool:
        """Return whether data files of these lengths fit beside the blocks of other namespaces."""
        return self._directory.has_room(self._geometry.cost_bytes(lengths), self._capacity)

    def _road(self, choice: RoadChoice) -> tuple[Road, Sealer]:
        """Choose a road for the blocks of a call, and the sealer for it. Through the page cache there is no choice."""
        if choice.only is Road.STRAIGHT:
            return Road.STRAIGHT, self._sealer
        road = choice.choose() if self._segments.direct else Road.STRAIGHT
        return road, self._copying_sealer if road is Road.COPIED else self._sealer

    def _runs(self, slots: Sequence[int], buffers: Sequence[memoryview], most: int | None) -> list[Run]:
        """Return runs of the valid slots and buffers; count the invalid ones as failures."""
        self._directory.check_present(self._records.status)
        slots, shapes = list(map(int, slots)), list(map(_SHAPE, buffers))
        num_slots, shape = self._geometry.num_slots, (self._geometry.block_bytes, True)
        usable: Sequence[int] = range(len(slots))
        if min(slots, default=0) < 0 or max(slots, default=0) >= num_slots or shapes != [shape] * len(slots):
            pairs = enumerate(zip(slots, shapes, strict=True))
            usable = [position for position, (slot, own) in pairs if 0 <= slot < num_slots and own == shape]
            self._failures.count(FailureCause.IO_ERROR, len(slots) - len(usable))
        return coalesce(slots, usable, self._geometry, most)

    def _write_run(
        self,
        sealer: Sealer,
        run: Run,
        keys: Sequence[OffloadKey],
        buffers: Sequence[memoryview],
        results: list[bool],
    ) -> None:
        try:
            written = self._send(sealer, run, run.of(keys), run.of(buffers))
        except OSError as error:
            self._write_singly(sealer, run, keys, buffers, results, error)
            return
        for position in run.positions[:written]:
            results[position] = True
        if written < len(run.positions):
            self._failures.count(FailureCause.IO_ERROR, len(run.positions) - written)

    def _send(self, sealer: Sealer, run: Run, keys: Sequence[OffloadKey], payloads: Sequence[memoryview]) -> int:
        """Write the payloads of a run, then their records; return how many were written."""
        block_bytes, count = self._geometry.block_bytes, len(payloads)
        if sealer.seals_portions(block_bytes):
            return self._send_in_portions(sealer, run, keys, payloads)
        stored, records = sealer.seal(keys, payloads, range(run.slot, run.slot + count))
        self._segments.reserve(run.segment, run.offset + count * block_bytes)
        written = self._segments.write(run.segment, run.offset, stored) // block_bytes
        self._records.write(run.slot, b"".join(records[:written]))
        return written

    def _send_in_portions(
        self, sealer: Sealer, run: Run, keys: Sequence[OffloadKey], payloads: Sequence[memoryview]
    ) -> int:
        """Write the one payload of a run, portion by portion; return as `_send`."""
        (key,), (payload,) = keys, payloads
        stream = sealer.seal_stream(key, payload.nbytes, slot=run.slot)
        self._segments.reserve(run.segment, run.offset + payload.nbytes)
        for start in range(0, payload.nbytes, PORTION_BYTES):
            portion = payload[start : start + PORTION_BYTES]
            stored = stream.take(portion)
            stream.note(portion)
            if self._segments.write(run.segment, run.offset + start, [stored]) < portion.nbytes:
                return 0
        self._records.write(run.slot, stream.header())
        return 1

    def _write_singly(
        self,
        sealer: Sealer,
        run: Run,
        keys: Sequence[OffloadKey],
        buffers: Sequence[memoryview],
        results: list[bool],
        error: OSError,
    ) -> None:
        """After a run has failed, write its blocks one by one, until there is no space."""
        if len(run.positions) == 1:
            self._errors.count(error)
            return
        for index, single in enumerate(run.split(self._geometry.block_bytes)):
            self._write_run(sealer, single, keys, buffers, results)
            if error.errno in NO_SPACE_ERRORS and not results[single.positions[0]]:
                self._errors.count(error, len(run.positions) - index - 1)
                return

    def _read_run(
        self,
        sealer: Sealer,
        run: Run,
        keys: Sequence[OffloadKey],
        buffers: Sequence[memoryview],
        results: list[bool],
    ) -> None:
        payloads = run.of(buffers)
        try:
            causes = self._receive(sealer, run, run.of(keys), payloads)
        except OSError as error:
            if len(payloads) == 1:
                self._errors.count(error)
                return
            for single in run.split(self._geometry.block_bytes):
                self._read_run(sealer, single, keys, buffers, results)
            return
        broken = []
        for index, (position, cause) in enumerate(zip(run.positions, causes, strict=True)):
            results[position] = cause is None
            if cause is not None:
                self._failures.count(cause)
                broken.append(run.slot + index)
        if broken:
            self._empty(broken)

    def _judge(self, slot: int, key: OffloadKey) -> FailureCause | None:
        """Verify a slot's payload; return why it failed, None if it is valid or cannot be read now."""
        payload = memoryview(mmap.mmap(-1, whole_pages(self._geometry.block_bytes)))[: self._geometry.block_bytes]
        try:
            (cause,) = self._receive(
                self._copying_sealer, Run(*self._geometry.locate(slot), slot, [0]), [key], [payload]
            )
        except OSError:
            return None
        return cause

    def _receive(
        self, sealer: Sealer, run: Run, keys: Sequence[OffloadKey], payloads: Sequence[memoryview]
    ) -> list[FailureCause | None]:
        """Fill the payloads of a run; return per block None, or why it failed."""
        if sealer.reads_portions(self._geometry.block_bytes):
            return self._receive_in_portions(sealer, run, keys, payloads)
        rooms = sealer.rooms(payloads)
        filled = self._segments.read(run.segment, run.offset, rooms) // self._geometry.block_bytes
        records = self._records.read(run.slot, len(payloads))
        causes = sealer.open(
            [records[start : start + HEADER_BYTES] for start in range(0, len(records), HEADER_BYTES)],
            keys,
            rooms,
            payloads,
            range(run.slot, run.slot + len(payloads)),
        )
        if filled < len(causes):
            causes[filled:] = [cause or FailureCause.CORRUPT for cause in causes[filled:]]
        return causes

    def _receive_in_portions(
        self, sealer: Sealer, run: Run, keys: Sequence[OffloadKey], payloads: Sequence[memoryview]
    ) -> list[FailureCause | None]:
        """Fill the one payload of a run, portion by portion; return as `_receive`."""
        (key,), (payload,) = keys, payloads
        stream = sealer.open_stream(key, payload, run.slot)
        for start in range(0, payload.nbytes, PORTION_BYTES):
            room = stream.room(start, min(start + PORTION_BYTES, payload.nbytes))
            if self._segments.read(run.segment, run.offset + start, [room]) < room.nbytes:
                return [FailureCause.CORRUPT]
            stream.note(room)
        return [stream.verify(self._records.read(run.slot, 1))]

    def _empty(self, slots: Sequence[int]) -> None:
        """Empty the records of slots that failed verification."""
        try:
            self._records.clear(slots)
        except OSError as error:
            self._errors.log(error)
