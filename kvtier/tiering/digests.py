"""Digests of blocks given to tiers that do not verify what they return.

A tier that somebody else wrote promises nothing about its bytes. For such a tier the manager remembers the XXH3-128
digest of every block that it stored there, and accepts only bytes with that digest. A block of unknown digest is a
miss. A thread of its own computes the digests, not the scheduler's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import xxhash

from kvtier.key_queues import KeyQueue, key_queues
from kvtier.keys import OffloadKey
from kvtier.primary.arena import Rows
from kvtier.secondary.jobs import Job

MAX_ENTRIES = 1_000_000
"""Most keys with digests, at about 270 bytes each. The oldest are forgotten first, and their blocks miss."""
MAX_VERSIONS = 4
"""Most digests per key; see `DigestLedger` for why one is not enough."""


class DigestLedger:
    """Remembers digests by key, within a bound; the oldest are forgotten first.

    A key may have several digests. A block that is computed again may differ in its last bits, and a tier may keep the
    bytes that it was given first.
    """

    def __init__(self, rows: Rows, max_entries: int = MAX_ENTRIES) -> None:
        """Args: rows: flat views of the primary slots, which stay pinned while they are hashed."""
        self._rows = rows
        self._max_entries = max_entries
        self._digests: KeyQueue[tuple[bytes, ...]]
        (self._digests,) = key_queues(1, max_entries)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvtier-ledger")
        self.hashing: dict[Job, Future[list[bytes]]] = {}
        """Jobs whose blocks are being hashed: before a store is handed over, and after a load."""

    def __contains__(self, key: object) -> bool:
        return key in self._digests

    def hash(self, slots: Sequence[int]) -> Future[list[bytes]]:
        """Start hashing `slots`; the result is their digests, in order."""
        return self._thread.submit(lambda: [xxhash.xxh3_128_digest(self._rows[slot]) for slot in slots])

    def begin(self, job: Job) -> None:
        """Start hashing the blocks of a job."""
        self.hashing[job] = self.hash(job.slots)

    def take_hashed(self) -> list[tuple[Job, list[bytes]]]:
        """Return the jobs whose blocks have been hashed since the last call, with the digests of the blocks."""
        done = [job for job, digests in self.hashing.items() if digests.done()]
        return [(job, self.hashing.pop(job).result()) for job in done]

    def wait(self) -> None:
        """Wait until no slot is being read. Any thread may call this."""
        for digests in list(self.hashing.values()):
            digests.result()

    def record(self, keys: Sequence[OffloadKey], digests: Sequence[bytes]) -> None:
        """Remember the digests of blocks that are stored in the tier."""
        for key, digest in zip(keys, digests, strict=True):
            known = self._digests.get(key, ())
            if digest not in known:
                self._digests[key] = (*known[1 - MAX_VERSIONS :], digest)
        self._digests.renew(keys)
        self._digests.drop(self._digests.oldest(len(self._digests) - self._max_entries))

    def matching(self, keys: Sequence[OffloadKey], digests: Sequence[bytes]) -> list[OffloadKey]:
        """Return the `keys` whose digest was recorded for them."""
        return [key for key, digest in zip(keys, digests, strict=True) if digest in self._digests.get(key, ())]

    def clear(self) -> None:
        """Forget every digest: no block stored before is accepted."""
        self._digests.clear()

    def close(self) -> None:
        """End the thread. Waits for running hashes, because they read primary memory."""
        self._thread.shutdown(wait=True, cancel_futures=True)
