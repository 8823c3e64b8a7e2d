"""Reads every block of a namespace and compares it with its record, at the speed of the disk; writes nothing.

It takes no lock, so an engine may use the directory meanwhile. An engine writes a payload first and its record
afterwards; in between, the old record does not match. So a block that does not verify is checked again, for some
seconds if the directory is in use. If its record has changed by then, the engine has replaced it, and it is not
corrupt.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np

from kvtier.errors import StoreError
from kvtier.interrupts import interrupts_noted
from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.integrity.sealing import Sealer
from kvtier.stores.slab.inspection import Records
from kvtier.stores.slab.layout import SlabGeometry
from kvtier.stores.slab.namespaces import open_namespace
from kvtier.stores.slab.records import MEDIUM_ERRORS, RecordFile
from kvtier.stores.slab.recovery import Inventory
from kvtier.stores.slab.segments import DataFiles
from kvtier.stores.vectored import PAGE_BYTES
from kvtier.types import FailureCause

MAX_MEMORY_BYTES = 256 << 20
"""Most memory of all threads together, unless one block needs more."""
SETTLE_SECONDS = 3.0
"""How long a replaced block may be without a matching record, before it counts as corrupt."""
_PAUSE_SECONDS = 0.1
_POLL_SECONDS = 0.2
"""Time after which an interrupt is heeded."""

_Raw = TypeVar("_Raw", bytes, memoryview)


@dataclass
class Verification:
    """The result.

    Attributes:
        num_good: blocks with the bytes that were stored.
        num_changed: blocks that an engine has replaced or deleted during the read.
        bad: all other slots, with the cause.
        num_bytes, seconds: payload bytes read, and the time that took.
        direct: whether direct I/O was used.
    """

    num_good: int = 0
    num_changed: int = 0
    bad: dict[int, FailureCause] = field(default_factory=dict)
    num_bytes: int = 0
    seconds: float = 0.0
    direct: bool = False


@dataclass(frozen=True)
class Pace:
    """How fast to read, and when to stop.

    Attributes:
        threads: number of parallel reads.
        bytes_per_second: most bytes read per second; None for no limit.
        on_bytes: called with the number of payload bytes after they were read, by any thread.
        stopped: set it to stop early; it is also set after an error.
        settle_seconds: see `SETTLE_SECONDS`.
        read_bytes: most bytes of neighbouring blocks per read; at least one block is read.
    """

    threads: int = 4
    bytes_per_second: int | None = None
    on_bytes: Callable[[int], None] = lambda _: None
    stopped: threading.Event = field(default_factory=threading.Event)
    settle_seconds: float = SETTLE_SECONDS
    read_bytes: int = 4 << 20


def verify_namespace(folder: Path, records: Records, is_used: Callable[[], bool], pace: Pace) -> Verification:
    """Read and verify every block of a namespace.

    Args:
        records: a fresh result of `read_records`.
        is_used: returns whether an engine may be writing.

    Raises:
        StoreError: `pace.stopped` was set, or the secret that guards the blocks was not given to `read_records`.
        OSError: the records cannot be read.
    """
    started = time.monotonic()
    if records.geometry is None:
        return Verification(bad=dict(records.inventory.cause_of))
    if records.sealer is None:
        raise StoreError(f"{folder}: a secret guards its blocks, and it was not given")
    with ExitStack() as held:
        namespace = held.enter_context(open_namespace(folder))
        record_file = held.enter_context(RecordFile.open(namespace))
        files = DataFiles(namespace, records.geometry)
        held.callback(files.close)
        verifier = _Verifier(record_file, files, records.geometry, records.sealer, records.inventory, pace)
        was_used = is_used()
        verifier.read_all(started)
        verifier.settle(pace.settle_seconds if was_used or is_used() else 0.0)
        verifier.found.direct = files.direct
    verifier.found.seconds = time.monotonic() - started
    return verifier.found


class _Verifier:
    """The state of one verification; threads share it."""

    def __init__(
        self,
        records: RecordFile,
        files: DataFiles,
        geometry: SlabGeometry,
        sealer: Sealer,
        inventory: Inventory,
        pace: Pace,
    ) -> None:
        self.found = Verification()
        self._records = records
        self._files = files
        self._geometry = geometry
        self._sealer = sealer
        self._pace = pace
        self._lock = threading.Lock()
        self._inventory = inventory
        self._block_bytes = geometry.block_bytes
        at_once = pace.read_bytes if pace.bytes_per_second is None else min(pace.read_bytes, pace.bytes_per_second // 4)
        self._per_read = max(1, at_once // self._block_bytes)
        self._spans = self._neighbours()
        self._doubtful: dict[int, tuple[FailureCause, bytes]] = {}

    def read_all(self, started: float) -> None:
        """Read and verify every block that has a valid record.

        Raises:
            StoreError: `pace.stopped` was set.
        """
        buffer_bytes = self._per_read * self._block_bytes
        threads = max(1, min(self._pace.threads, MAX_MEMORY_BYTES // buffer_bytes))
        with interrupts_noted() as check, ThreadPoolExecutor(threads, "kvtier-verify") as executor:
            try:
                waiting = {executor.submit(self._work, buffer_bytes, started) for _ in range(threads)}
                while waiting:
                    done, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
                    check()
                    for future in done:
                        future.result()
            except BaseException:
                self._pace.stopped.set()  # ends the other threads, for which the executor waits
                raise
        if self._pace.stopped.is_set():
            raise StoreError("stopped before the end")

    def settle(self, seconds: float) -> None:
        """Check the doubtful blocks again until all are decided or `seconds` have passed."""
        for slot, cause in self._inventory.cause_of.items():
            self._doubtful[slot] = cause, self._records.read(slot, 1)
        deadline = time.monotonic() + seconds
        memory = _page_aligned(self._block_bytes)
        latest = dict(self._doubtful)
        while True:
            for slot in list(latest):
                self._look_again(slot, memory, latest)
            if not latest or time.monotonic() >= deadline or self._pace.stopped.wait(_PAUSE_SECONDS):
                break
        for slot, (cause, header) in latest.items():
            if header == self._doubtful[slot][1]:
                self.found.bad[slot] = cause
            else:
                self.found.num_changed += 1

    def _look_again(self, slot: int, memory: memoryview, latest: dict[int, tuple[FailureCause, bytes]]) -> None:
        """Decide about a doubtful block, or update its entry in `latest`."""
        first_header = self._doubtful[slot][1]
        header = self._records.read(slot, 1)
        unchanged = header == first_header
        if unchanged and self._inventory.cause_of.get(slot) is FailureCause.FOREIGN:
            return  # a complete record with a key of another length
        cause = self._judge_single(slot, header, memory)
        if not self._records.is_present or cause is FailureCause.ABSENT or (cause is None and not unchanged):
            self.found.num_changed += 1
        elif cause is None:
            self.found.num_good += 1
        else:
            latest[slot] = cause, header
            return
        del latest[slot]

    def _neighbours(self) -> Iterator[tuple[int, int]]:
        """Yield (first slot, number of blocks) of neighbours within a data file, in the order on disk."""
        slots = np.sort(self._inventory.slots)
        starts = np.flatnonzero((np.diff(slots, prepend=-2) != 1) | (slots % self._geometry.slots_per_segment == 0))
        for start, end in pairwise([*starts.tolist(), len(slots)]):
            for position in range(start, end, self._per_read):
                yield int(slots[position]), min(self._per_read, end - position)

    def _work(self, buffer_bytes: int, started: float) -> None:
        """Verify runs of neighbours until there are no more; each thread runs this."""
        memory = _page_aligned(buffer_bytes)
        while not self._pace.stopped.is_set():
            with self._lock:
                span = next(self._spans, None)
            if span is None:
                return
            self._verify_span(*span, memory)
            with self._lock:
                num_bytes = span[1] * self._block_bytes
                self.found.num_bytes += num_bytes
                total = self.found.num_bytes
            self._pace.on_bytes(num_bytes)
            if self._pace.bytes_per_second is not None:
                self._pace.stopped.wait(started + total / self._pace.bytes_per_second - time.monotonic())

    def _verify_span(self, first: int, count: int, memory: memoryview) -> None:
        headers = self._records.read(first, count)
        payloads = memory[: count * self._block_bytes]
        try:
            filled = self._read(first, payloads) // self._block_bytes
            causes = [
                self._judge(
                    _item(headers, index, HEADER_BYTES), _item(payloads, index, self._block_bytes), first + index
                )
                if index < filled
                else FailureCause.CORRUPT
                for index in range(count)
            ]
        except OSError as error:
            _check_is_of_the_medium(error)
            slots = range(first, first + count)
            causes = [self._judge_single(slot, _item(headers, slot - first, HEADER_BYTES), memory) for slot in slots]
        with self._lock:
            for index, cause in enumerate(causes):
                if cause is None:
                    self.found.num_good += 1
                elif cause is FailureCause.ABSENT:
                    self.found.num_changed += 1
                else:
                    self._doubtful[first + index] = cause, bytes(_item(headers, index, HEADER_BYTES))

    def _judge_single(self, slot: int, header: bytes, memory: memoryview) -> FailureCause | None:
        payload = memory[: self._block_bytes]
        try:
            filled = self._read(slot, payload)
        except OSError as error:
            _check_is_of_the_medium(error)
            return FailureCause.IO_ERROR
        return self._judge(header, payload, slot) if filled == self._block_bytes else FailureCause.CORRUPT

    def _read(self, slot: int, buffer: memoryview) -> int:
        """Fill `buffer` from a slot's place on; return the bytes read: fewer if the file ends or does not exist."""
        segment, offset = self._geometry.locate(slot)
        return self._files.read(segment, offset, [buffer])

    def _judge(self, header: bytes, payload: memoryview, slot: int) -> FailureCause | None:
        """Verify a payload against its record; return None or the cause, ABSENT if the record was emptied."""
        record = self._sealer.headers.parse(header)
        if isinstance(record, FailureCause):
            return record
        return self._sealer.verify(header, record.key, payload, slot)


def _check_is_of_the_medium(error: OSError) -> None:
    """Raise the error unless the device cannot read the block: after other errors the block may be intact."""
    if error.errno not in MEDIUM_ERRORS:
        raise error


def _item(raw: _Raw, index: int, length: int) -> _Raw:
    return raw[index * length : (index + 1) * length]


def _page_aligned(num_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, -(-num_bytes // PAGE_BYTES) * PAGE_BYTES))


def causes_of(bad: Mapping[int, FailureCause]) -> dict[str, int]:
    """Return the number of bad blocks by the cause's name."""
    return dict(Counter(cause.value for cause in bad.values()))
