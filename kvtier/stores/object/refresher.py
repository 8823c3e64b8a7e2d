"""The background thread of an object store: lists other engines' packs, and deletes the oldest ones to make room."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence

import xxhash

from kvtier.log import logger
from kvtier.stores.object.catalogue import Catalogue, Pack
from kvtier.stores.object.client import Client, RequestError, Trouble
from kvtier.stores.object.names import Stamps, stamp_at
from kvtier.stores.object.options import ObjectOptions

OVERLAP_SECONDS = 10.0
"""A listing begins this much before the last one. So it finds packs whose writer's clock is late or whose write took
long, as long as both together stay below it."""
RESCAN_SECONDS = 600.0
"""Least time between two full listings, which find what the short ones have missed."""
_RECENT_SECONDS = 600.0
"""The first listing begins this far in the past."""
_START_SECONDS = 5.0
"""How long the start waits for the first full listing, which then goes on in the background."""
_PAGE = 1000
"""Names per request of a listing."""
_HEAD_SECONDS = 30.0
"""Time between two listings of the oldest packs, which show what other instances have deleted."""
_HIGH, _LOW, _URGENT = 15 / 16, 7 / 8, 31 / 32
"""Parts of the capacity: deletion begins at the first, ends at the second, and does not wait for a turn above the
third."""
_TURN_SECONDS = 10.0
"""One instance at a time deletes; after this time it is another one's turn."""
_FAILURES_TO_LOSE = 3
_JOIN_SECONDS = 2.0


class Room:
    """The bytes that this instance may still write before the next listing. Threads share it."""

    def __init__(self, capacity: int, pack_bytes: int) -> None:
        self._capacity = capacity
        self._pack_bytes = pack_bytes
        self._lock = threading.Lock()
        self._left = 0
        self.refused = False

    def take(self, size: int) -> bool:
        """Reserve `size` bytes; return whether there is room for them."""
        with self._lock:
            if size > self._left:
                self.refused = True
                return False
            self._left -= size
            return True

    def renew(self, total_bytes: int, num_writers: int) -> None:
        """Set the share of this instance, from the bytes of all packs and the number of writers."""
        free = max(0, self._capacity - total_bytes)
        share = free // (2 * num_writers + 2)
        if share < self._pack_bytes <= free // (num_writers + 1):
            share = self._pack_bytes
        with self._lock:
            self._left = share
            self.refused = False


class Refresher:
    """A thread that keeps the catalogue up to date and the bucket below its capacity.

    Attributes:
        lost: why the bucket cannot be used any more; None while it can.
    """

    def __init__(
        self,
        client: Client,
        catalogue: Catalogue,
        stamps: Stamps,
        settings: ObjectOptions,
        pack_bytes: int,
        overlap_seconds: float = OVERLAP_SECONDS,
    ) -> None:
        """Args:
        pack_bytes: size of a full pack.
        overlap_seconds: a listing begins this much before the last one.
        """
        self._overlap_seconds = overlap_seconds
        self._client = client
        self._catalogue = catalogue
        self._stamps = stamps
        self._settings = settings
        self.room = Room(settings.capacity, pack_bytes)
        self.lost: str | None = None
        self._wake, self._closing = threading.Event(), threading.Event()
        self._busy = threading.Lock()
        self._failures = 0
        self._looked_at = self._rescan_at = self._head_at = 0.0
        self._scanned = False
        self._tried = threading.Event()
        self._complained = False
        self._thread = threading.Thread(target=self._run, name="kvtier-object", daemon=True)

    def start(self) -> None:
        """List the recent packs and start the thread, which lists all; wait for that for `_START_SECONDS`.

        Nothing is written before all packs are listed, since the free room is unknown until then.

        Raises:
            RequestError: the bucket cannot be listed.
        """
        self._looked_at = time.time() - _RECENT_SECONDS
        with self._busy:
            self._look()
        self._wake.set()
        self._thread.start()
        self._tried.wait(_START_SECONDS)

    def refresh(self) -> None:
        """List now what others have written since the last listing.

        Raises:
            RequestError: the bucket cannot be listed.
        """
        with self._busy:
            self._look()
            self._renew()

    def hurry(self) -> None:
        """Let the thread list as soon as possible."""
        self._wake.set()

    def note(self, error: RequestError) -> None:
        """Count a failed request of any thread. After a refusal or several failures in a row, the bucket is lost."""
        if error.trouble in (Trouble.ABSENT, Trouble.SHORT):
            return
        self._failures += 1
        if error.trouble is Trouble.REFUSED or self._failures >= _FAILURES_TO_LOSE:
            self.lost = str(error)

    def note_success(self) -> None:
        """Reset the count of failures in a row."""
        self._failures = 0

    def close(self) -> None:
        """Stop the thread; wait for its present request at most until its timeout."""
        self._closing.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(max(_JOIN_SECONDS, self._settings.timeout))

    def _run(self) -> None:
        while not self._closing.is_set() and self.lost is None:
            woken = self._wake.wait(self._settings.refresh)
            self._wake.clear()
            if woken and self._scanned and not self._closing.is_set():
                self._closing.wait(min(0.2, self._settings.refresh))  # one listing serves all stores refused meanwhile
            if self._closing.is_set():
                return
            self._step()

    def _step(self) -> None:
        try:
            with self._busy:
                now = time.monotonic()  # the host's clock may be set back, by a day
                if now >= self._rescan_at:
                    self._rescan()
                else:
                    self._look()
                    if now - self._head_at >= _HEAD_SECONDS or self._is_above(_URGENT):
                        self._look_at_head()
                self._make_room()
                self._renew()
            self.note_success()
        except RequestError as error:
            self.note(error)
        except Exception as error:  # noqa: BLE001 - a defect must not end the thread silently: the tier reports it
            self.lost = f"{type(error).__name__}: {error}"
        finally:
            self._tried.set()

    def _look(self) -> None:
        """List the packs written since the last listing, and `overlap_seconds` before."""
        started = time.time()
        after = f"{self._settings.root}/{stamp_at(min(self._looked_at, started) - self._overlap_seconds)}"
        for path, size in self._client.list(self._settings.root, after):
            self._catalogue.add(path, size)
        self._looked_at = started

    def _rescan(self) -> None:
        """List all packs; remove packs from the catalogue that are not listed."""
        started = time.time()
        seen: set[str] = set()
        for path, size in self._client.list(self._settings.root):
            stamp = self._catalogue.add(path, size)
            if stamp is not None:
                seen.add(stamp)
            if abs(time.time() - self._looked_at) >= self._settings.refresh:
                if self._closing.is_set():
                    return
                self._look()
        known = self._catalogue.stamps(before=stamp_at(started - self._overlap_seconds))
        self._catalogue.forget(stamp for stamp in known if stamp not in seen)
        self._head_at = time.monotonic()
        self._rescan_at = self._head_at + max(RESCAN_SECONDS, len(seen) / _PAGE)  # on average at most 1 request per s
        self._scanned = True

    def _look_at_head(self) -> None:
        """List the oldest packs; remove older ones from the catalogue, since they were deleted."""
        started, self._head_at = time.time(), time.monotonic()
        stamps = (self._catalogue.add(*entry) for entry in self._client.list(self._settings.root))
        first = next((stamp for stamp in itertools.islice(stamps, _PAGE) if stamp is not None), None)
        limit = stamp_at(started - self._overlap_seconds)
        self._catalogue.forget(self._catalogue.stamps(before=limit if first is None else min(first, limit)))

    def _make_room(self) -> None:
        """Delete the oldest packs if room is needed or their `ttl` is over, and it is this instance's turn."""
        ttl = self._settings.ttl
        before = "" if ttl is None else stamp_at(time.time() - ttl)
        above = self._is_above(_HIGH) or (self.room.refused and self._is_above(_LOW))
        if not (above or (before and self._catalogue.stamps(before=before))):
            return
        if not self._is_above(_URGENT) and not self._is_my_turn():
            return
        until = int(self._settings.capacity * _LOW) if above else self._settings.capacity
        self._delete(self._catalogue.oldest(until, before, time.monotonic()))

    def _delete(self, packs: Sequence[Pack]) -> None:
        try:
            self._client.delete([pack.path for pack in packs])
        except RequestError as error:
            if error.trouble is not Trouble.REFUSED:
                raise
            if not self._complained:
                self._complained = True
                logger.warning("object: old packs stay, since deleting is not allowed: %s", error)
            return
        self._catalogue.forget([pack.stamp for pack in packs])

    def _is_above(self, share: float) -> bool:
        return self._catalogue.total_bytes > share * self._settings.capacity

    def _is_my_turn(self) -> bool:
        """Return whether it is this instance's turn among those that wrote within the last minute.

        All instances compute the same choice, from a hash of the time and each writer, without talking to each other.
        """
        now = time.time()
        turn = str(int(now / _TURN_SECONDS))
        writers = self._catalogue.writers(stamp_at(now - 60.0)) | {self._stamps.writer}
        return (
            max(writers, key=lambda writer: xxhash.xxh3_64_intdigest((turn + writer).encode())) == self._stamps.writer
        )

    def _renew(self) -> None:
        if not self._scanned:
            return
        writers = self._catalogue.writers(stamp_at(time.time() - 60.0)) | {self._stamps.writer}
        self.room.renew(self._catalogue.total_bytes, len(writers))
