"""A `BlockStore` over a bucket: it writes whole packs, reads ranges of them, and finds blocks in memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from kvtier.abc import StoreContext
from kvtier.errors import StoreError, StoreUnavailableError
from kvtier.keys import OffloadKey
from kvtier.stores.failures import UNREADABLE, CleanUp, fitting_buffers
from kvtier.stores.integrity import open_sealer
from kvtier.stores.integrity.header import HEADER_BYTES, Record
from kvtier.stores.integrity.plain_sealer import PlainSealer
from kvtier.stores.integrity.sealing import Sealer
from kvtier.stores.object.catalogue import Catalogue, Pack, Place
from kvtier.stores.object.client import Client, RequestError, Trouble, connect
from kvtier.stores.object.names import MAX_BLOCKS, PackName, Stamps, TakenBack, digest_of, split, stamp_at
from kvtier.stores.object.options import ObjectOptions
from kvtier.stores.object.refresher import OVERLAP_SECONDS, Refresher
from kvtier.stores.varied import Padding, PaddingCount, VariedStore
from kvtier.types import FailureCause, KeyPage, StoreUsage

_SECONDS_BUSY = 0.5
"""After the server has asked for fewer requests, no pack is sent for this long, since queued ones would be refused,
too. The tier decides about longer pauses."""
_LISTING_SECONDS = 1.0
"""Longest time in which a page of a listing begins to read packs."""
_CAUSES = {
    Trouble.ABSENT: FailureCause.ABSENT,
    Trouble.SHORT: FailureCause.CORRUPT,
    Trouble.THROTTLED: FailureCause.BUSY,
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A block to read: its index in the call, and its place in a pack."""

    index: int
    place: int


class ObjectStore(VariedStore):
    """Sealed blocks in packs. Only verified payloads are written to buffers. Threads share the store.

    Attributes:
        client: the bucket; it counts requests.
        catalogue: the index.
    """

    def __init__(
        self,
        client: Client,
        settings: ObjectOptions,
        context: StoreContext,
        sealer: Sealer | None = None,
        overlap_seconds: float = OVERLAP_SECONDS,
    ) -> None:
        """Args:
        client: of the bucket in `settings`. No request is sent before `start`.
        sealer: of the blocks; None for a `PlainSealer` without a secret.
        overlap_seconds: as `Refresher` has it.
        """
        self.client = client
        self._settings = settings
        self._failures = context.failures
        self._block_bytes, self._compressed = context.block_bytes, context.compressed
        self._value_bytes = HEADER_BYTES + context.block_bytes
        self._sealer = PlainSealer(context.namespace, whole_bytes=context.whole_bytes) if sealer is None else sealer
        self._fingerprint = self._sealer.namespace.fingerprint.hex()
        self._stamps = Stamps()
        self.catalogue = Catalogue(
            settings.root, self._fingerprint, self._value_bytes, HEADER_BYTES + 1 if context.compressed else None
        )
        self._values_per_pack = settings.values_per_pack(context.block_bytes)
        pack_bytes = self._values_per_pack * self._value_bytes
        self._refresher = Refresher(client, self.catalogue, self._stamps, settings, pack_bytes, overlap_seconds)
        self._busy_until = 0.0
        self._pool = ThreadPoolExecutor(settings.requests, thread_name_prefix="kvtier-object")
        self._clean_up = CleanUp()
        self._padding = PaddingCount()

    @classmethod
    def open(cls, options: Mapping[str, Any], context: StoreContext) -> Self:
        """Connect and read the index; options: `ObjectOptions`.

        Raises:
            StoreUnavailableError: the bucket does not exist, refuses access or does not answer, or the secret cannot be
                read.
        """
        _, sealer = open_sealer(options, context.namespace, context.whole_bytes)
        settings = ObjectOptions.read(options)
        store = cls(Client(connect(settings), settings.where), settings, context, sealer)
        store.start()
        return store

    def start(self) -> None:
        """Read the index, and start the thread that keeps it up to date.

        Raises:
            StoreUnavailableError: the bucket cannot be listed.
        """
        try:
            self._refresher.start()
        except RequestError as error:
            self._pool.shutdown()
            raise StoreUnavailableError(str(error)) from None

    def refresh(self) -> None:
        """List other engines' packs now instead of within `refresh` seconds.

        Raises:
            StoreError: the bucket cannot be listed.
        """
        try:
            self._refresher.refresh()
        except RequestError as error:
            raise StoreError(str(error)) from None

    def contains(self, keys: Sequence[OffloadKey]) -> list[bool]:
        """Look the keys up in memory; no request is sent."""
        self._check()
        return self.catalogue.holds(map(digest_of, keys))

    def write(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Store the blocks in as few packs as possible; False also for a buffer of another length."""
        self._check()
        fitting = fitting_buffers(keys, buffers, self._block_bytes, self._failures, self._compressed)
        results = [False] * len(keys)
        for indexes in self._packs(fitting, buffers):
            written = self._write_pack([keys[index] for index in indexes], [buffers[index] for index in indexes])
            for index in indexes:
                results[index] = written
        if not any(results):
            self._check()  # else the next call does
        return results

    def read_varied(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> list[int]:
        """Fill buffers with verified payloads; return their lengths. A buffer whose result is 0 is unchanged."""
        self._check()
        fitting = fitting_buffers(keys, buffers, self._block_bytes, self._failures)
        got: dict[int, FailureCause | int] = {}
        wanted: dict[str, tuple[Place, list[Wanted]]] = {}
        for index in fitting:
            found = self.catalogue.find(digest_of(keys[index]))
            if found is None:
                got[index] = FailureCause.ABSENT
            else:
                group = wanted.setdefault(found.pack.stamp, (found, []))
                group[1].append(Wanted(index, found.place))
        affordable = self.client.read_costs.bytes_per_request
        runs = [
            (found.pack, found.value_bytes, run)
            for found, blocks in wanted.values()
            for run in _runs(blocks, affordable // found.value_bytes)
        ]
        if len(runs) == 1:
            got |= self._read_run(*runs[0], keys, buffers)
        else:
            for some in self._pool.map(lambda run: self._read_run(run[0], run[1], run[2], keys, buffers), runs):
                got |= some
        causes = {index: cause for index, cause in got.items() if isinstance(cause, FailureCause)}
        for cause in causes.values():
            self._failures.count(cause)
        if broken := [keys[index] for index, cause in causes.items() if cause in UNREADABLE]:
            with self._clean_up:
                self.delete(broken)
        lengths = [0] * len(keys)
        for index, length in got.items():
            if not isinstance(length, FailureCause):
                lengths[index] = length
        if not any(lengths):
            self._check()  # else the next call does
        return lengths

    def delete(self, keys: Sequence[OffloadKey]) -> None:
        """Delete blocks for all engines."""
        self._check()
        try:
            whole = []
            for pack, places, is_empty in self.catalogue.take_back(map(digest_of, keys)):
                if is_empty:
                    whole.append(pack)
                else:
                    note = TakenBack(self._stamps.make(), self._fingerprint, pack.stamp, places)
                    self.client.put(note.path(self._settings.root), b"")
            self.catalogue.forget([pack.stamp for pack in whole])
            self.client.delete([pack.path for pack in whole])
        except RequestError as error:
            self._learn(error)
            raise StoreError(str(error)) from None

    def keep(self, keys: Sequence[OffloadKey], seconds: float) -> list[bool]:
        """Delete other packs before those of the blocks, which take half of the capacity at most. No request is sent.

        Other instances do not know of it, and delete the oldest packs. A pack whose `ttl` is over is not kept.
        """
        self._check()
        ttl, now = self._settings.ttl, time.monotonic()
        since = "" if ttl is None else stamp_at(time.time() - ttl)
        return self.catalogue.keep(map(digest_of, keys), now + seconds, now, since)

    def list_keys(self, cursor: bytes, most: int) -> KeyPage:
        """Read the headers in packs, since names have only digests of the keys. A cursor is a pack's stamp.

        Several packs are read at once, and a page that takes long ends early: other work of the tier waits for it.
        """
        self._check()
        until = time.monotonic() + _LISTING_SECONDS
        keys: list[OffloadKey] = []
        packs = self.catalogue.after(cursor.decode("ascii", "replace"), most)
        read = [(pack, places) for pack, places in packs if places]
        step = min(self._settings.requests, max(1, most // MAX_BLOCKS))
        for start in range(0, len(read), step):
            some = read[start : start + step]
            for found in self._pool.map(lambda each: self._keys_in(*each), some):
                keys += found
            if len(keys) >= most or time.monotonic() > until:
                return KeyPage(keys, some[-1][0].stamp.encode())
        return KeyPage(keys, packs[-1][0].stamp.encode() if len(packs) == most else None)

    def _keys_in(self, pack: Pack, places: Sequence[int]) -> list[OffloadKey]:
        """Return the keys of some values; values that have none are left out, as in a pack that was deleted."""
        value_bytes = self.catalogue.value_bytes_of(pack)
        # Of a pack with one large block only the header; else all, which takes one request, too.
        length = HEADER_BYTES if len(places) == 1 else value_bytes * (places[-1] - places[0]) + HEADER_BYTES
        try:
            body = self.client.get(pack.path, places[0] * value_bytes, length, pack.size)
        except RequestError as error:
            if error.trouble is Trouble.ABSENT:
                return []
            self._learn(error)
            raise StoreError(str(error)) from None
        starts = [(place - places[0]) * value_bytes for place in places]
        records = [self._sealer.headers.parse(body[start : start + HEADER_BYTES]) for start in starts]
        return [record.key for record in records if isinstance(record, Record)]

    def usage(self) -> StoreUsage:
        """Return the number of this namespace's blocks, and the bytes of all packs, as of the last listing."""
        return StoreUsage(len(self.catalogue), self.catalogue.total_bytes, self._settings.capacity)

    def padding(self) -> Padding:
        """Return the zeros in packs that were written, and in values that were read."""
        return self._padding.total

    def close(self) -> None:
        """End all threads."""
        self._refresher.close()
        self._pool.shutdown()

    def _check(self) -> None:
        if self._refresher.lost is not None:
            raise StoreUnavailableError(self._refresher.lost)

    def _write_pack(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview]) -> bool:
        value_bytes = HEADER_BYTES + max(map(len, buffers))
        size = len(keys) * value_bytes
        if self._refresher.lost is not None:
            self._failures.count(FailureCause.UNREACHABLE, len(keys))
            return False
        if time.monotonic() < self._busy_until:
            self._failures.count(FailureCause.BUSY, len(keys))
            return False
        if not self._refresher.room.take(size):
            self._refresher.hurry()
            self._failures.count(FailureCause.NO_SPACE, len(keys))
            return False
        name = PackName(self._stamps.make(), self._fingerprint, tuple(map(digest_of, keys)))
        path = name.path(self._settings.root)
        try:
            self.client.put(path, self._pack(keys, buffers, value_bytes))
        except RequestError as error:
            self._failures.count(_CAUSES.get(error.trouble, FailureCause.IO_ERROR), len(keys))
            self._learn(error)
            return False
        self._learn(None)
        self.catalogue.add(path, size)
        self._padding.add(written=size - sum(HEADER_BYTES + len(buffer) for buffer in buffers))
        return True

    def _packs(self, fitting: Sequence[int], buffers: Sequence[memoryview]) -> list[list[int]]:
        """Return the indexes of the blocks of each pack. Compressed ones are kept apart from whole ones, since all
        values of a pack take the space of its longest.
        """
        whole = [index for index in fitting if buffers[index].nbytes == self._block_bytes]
        shorter = [index for index in fitting if buffers[index].nbytes < self._block_bytes]
        return [
            group[run.start : run.stop]
            for group in (whole, shorter)
            for run in split(len(group), self._values_per_pack)
        ]

    def _pack(self, keys: Sequence[OffloadKey], buffers: Sequence[memoryview], value_bytes: int) -> memoryview:
        """Return the sealed values in new memory, which obstore may still read after a request has failed.

        Zeros fill each value up to `value_bytes`.
        """
        memory = np.empty(len(keys) * value_bytes, np.uint8).data
        for number, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
            value = memory[number * value_bytes : (number + 1) * value_bytes]
            end = HEADER_BYTES + buffer.nbytes
            value[:HEADER_BYTES] = self._sealer.seal_into(key, buffer, value[HEADER_BYTES:end])
            value[end:] = bytes(value_bytes - end)
        return memory

    def _read_run(
        self,
        pack: Pack,
        value_bytes: int,
        run: Sequence[Wanted],
        keys: Sequence[OffloadKey],
        buffers: Sequence[memoryview],
    ) -> dict[int, FailureCause | int]:
        """Read neighbouring values with one request; return per index the payload's length, or why it failed."""
        first, last = run[0].place, run[-1].place
        try:
            body = self.client.get(pack.path, first * value_bytes, (last - first + 1) * value_bytes, pack.size)
        except RequestError as error:
            if error.trouble is Trouble.ABSENT:
                self.catalogue.forget([pack.stamp])
            self._learn(error)
            return dict.fromkeys((wanted.index for wanted in run), _CAUSES.get(error.trouble, FailureCause.IO_ERROR))
        self._learn(None)
        got: dict[int, FailureCause | int] = {}
        for wanted in run:
            start = (wanted.place - first) * value_bytes
            value = body[start : start + value_bytes]
            opened = self._open(keys[wanted.index], value, buffers[wanted.index])
            got[wanted.index] = opened
            if not isinstance(opened, FailureCause):
                self._padding.add(read=value_bytes - HEADER_BYTES - opened)
        return got

    def _open(self, key: OffloadKey, value: memoryview, buffer: memoryview) -> FailureCause | int:
        """Fill a buffer with the payload of a value; return its length, or why it failed."""
        header = value[:HEADER_BYTES]
        record = self._sealer.headers.parse(header)
        length = value.nbytes - HEADER_BYTES if isinstance(record, FailureCause) else record.payload_bytes
        if not 0 < length <= value.nbytes - HEADER_BYTES or bytes(value[HEADER_BYTES + length :]).strip(b"\0"):
            return FailureCause.CORRUPT
        stored = value[HEADER_BYTES : HEADER_BYTES + length]
        (cause,) = self._sealer.open([header], [key], [stored], [buffer[:length]])
        if cause is None:
            return length if length == self._block_bytes or self._compressed else FailureCause.CORRUPT
        return FailureCause.CORRUPT if cause is FailureCause.ABSENT else cause

    def _learn(self, error: RequestError | None) -> None:
        """Record how a request ended; None for success.

        A refused write does not count: reading may still be allowed. If nothing is allowed, the listings show it.
        """
        if error is None:
            self._refresher.note_success()
            return
        if error.trouble is Trouble.THROTTLED:
            self._busy_until = time.monotonic() + _SECONDS_BUSY
        if error.trouble is not Trouble.REFUSED:
            self._refresher.note(error)


def _runs(blocks: list[Wanted], most_skipped: int) -> list[list[Wanted]]:
    """Group the blocks of one pack into runs, each for one request.

    Args:
        most_skipped: up to so many unwanted values between two blocks are read along.
    """
    blocks.sort(key=lambda wanted: wanted.place)
    runs: list[list[Wanted]] = [[]]
    for wanted in blocks:
        if runs[-1] and wanted.place - runs[-1][-1].place - 1 > most_skipped:
            runs.append([])
        runs[-1].append(wanted)
    return runs
