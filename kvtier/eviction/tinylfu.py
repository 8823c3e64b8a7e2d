"""W-TinyLFU: a key enters the main part only if it was used more often than the key it would replace.

G. Einziger, R. Friedman and B. Manes, "TinyLFU: A Highly Efficient Cache Admission Policy", ACM Transactions on
Storage 13(4), 2017: a window of 1%, a main part of segmented LRU of which 80% is protected, and counts that are
halved after ten uses per key of capacity. The paper counts in a sketch. Here counts are exact, one per key that is
held or was evicted lately: equal histories must give equal orders, and a batch must be able to look ahead.

Its weakness: a new session loses against every key that was used twice. In a large cache, heads of ended sessions that
were used often take the room, and live sessions that grow turn by turn find none. It stays far below LRU there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from kvtier.abc import EvictionPolicy
from kvtier.errors import InvariantError
from kvtier.key_queues import KeyQueue, clear_queues, key_queues
from kvtier.key_tables import KeyDict, key_dict
from kvtier.keys import OffloadKey

WINDOW_SHARE = 100
"""The target size of the window is the capacity divided by this."""

PROTECTED_PERCENT = 80
"""Share of the main part that is protected."""

MAX_USES = 15
"""Counts stop here: four bits in the paper."""

USES_PER_AGE = 10
"""Counts are halved after this many uses per key of capacity."""

COUNT_BITS = 4

GHOSTS_PER_KEY = 2
"""Evicted keys whose counts are kept, per key of capacity."""


class TinyLFUPolicy(EvictionPolicy):
    """A window before a segmented LRU, tail-first within one call.

    New keys enter the window. Keys that the window has no room for move to probation, and from there to the protected
    part when they are used. A full cache compares the oldest key of the window with the oldest key of probation, and
    evicts the one with fewer uses; if both have as many, the key of the window.

    With one key per call (`candidates([x])`, `evict`, `insert([x])`) every decision is the paper's. A batch may be
    larger than the window, and no key is a victim of its own batch. Keys that have not been compared yet stay in the
    window, which is over its target size until the next batch.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._window: KeyQueue[None]
        self._probation: KeyQueue[None]
        self._protected: KeyQueue[None]
        self._ghosts: KeyQueue[None]
        self._window, self._probation, self._protected, self._ghosts = key_queues(4, GHOSTS_PER_KEY * capacity)
        self._uses: KeyDict[int] = key_dict((1 + GHOSTS_PER_KEY) * capacity)
        self._most_window = max(1, capacity // WINDOW_SHARE)
        self._most_protected = (capacity - self._most_window) * PROTECTED_PERCENT // 100
        # An entry of _uses has the count in its low COUNT_BITS bits and the epoch of that count above them. A new epoch
        # halves all counts: a count is shifted right once per epoch since, when it is read.
        self._epoch = 0
        self._uses_in_epoch = 0

    def insert(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Append `keys` to the window. Its oldest keys beyond its size move to vacant places of the main part."""
        window, probation, ghosts = self._window, self._probation, self._ghosts
        ghosts.discard(keys)
        window.append(keys[::-1], None)
        self._count(keys)
        vacant = self.capacity - self._most_window - len(probation) - len(self._protected)
        probation.take(window.oldest(min(vacant, len(window) - self._most_window)), window)

    def touch(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Count a use of the held ones of `keys`.

        Keys in the window become its most recent ones. The others become the most recent protected ones; the oldest
        protected keys beyond their share move back to probation.
        """
        window, probation, protected = self._window, self._probation, self._protected
        held = [key for key in keys if key in probation or key in protected or key in window]
        protected.take(held[::-1], protected, probation)
        window.renew(held[::-1])
        probation.take(protected.oldest(len(protected) - self._most_protected), protected)
        self._count(held)

    def _count(self, keys: Sequence[OffloadKey]) -> None:
        uses, epoch = self._uses, self._epoch
        base = epoch << COUNT_BITS
        for key in keys:
            value = uses.get(key, 0)
            count = (value & MAX_USES) >> (epoch - (value >> COUNT_BITS)) if value else 0
            uses[key] = base + (count + 1 if count < MAX_USES else MAX_USES)
        self._uses_in_epoch += len(keys)
        if self._uses_in_epoch >= USES_PER_AGE * self.capacity:
            self._epoch += 1
            self._uses_in_epoch -= USES_PER_AGE * self.capacity

    def _uses_of(self, key: OffloadKey) -> int:
        value = self._uses.get(key, 0)
        return (value & MAX_USES) >> (self._epoch - (value >> COUNT_BITS) if value else 0)

    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        """Yield every held key.

        Each key of `incoming` takes one victim. While the window is over its size, it is the oldest key of the window
        or of the main part, whichever has fewer uses; else it is the oldest of the main part. Afterwards come the
        rest of the main part and the rest of the window.
        """
        window, left_window = iter(self._window), len(self._window)
        probation, protected, promoted = iter(self._probation), iter(self._protected), deque[OffloadKey]()

        def next_of_main() -> OffloadKey | None:
            return next(probation, None) or (promoted.popleft() if promoted else next(protected, None))

        rival = next_of_main()
        for arrived in range(1, len(incoming) + 1):
            if left_window and left_window + arrived > self._most_window:
                newcomer = next(window)
                left_window -= 1
                if rival is None or self._uses_of(newcomer) <= self._uses_of(rival):
                    yield newcomer
                    continue
                promoted.append(newcomer)
            if rival is None:
                break
            yield rival
            rival = next_of_main()
        while rival is not None:
            yield rival
            rival = next_of_main()
        yield from window

    def evict(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys` and keep their counts; the counts of the oldest ghosts beyond the limit go."""
        ghosts, uses = self._ghosts, self._uses
        most_ghosts = GHOSTS_PER_KEY * len(self)  # not of the capacity, of which a tenant's policy holds a part
        ghosts.take(keys, self._window, self._probation, self._protected)
        forgotten = ghosts.oldest(len(ghosts) - most_ghosts)
        ghosts.drop(forgotten)
        uses.pop_all(forgotten)

    def remove(self, keys: Sequence[OffloadKey]) -> None:
        """Forget `keys` and their counts."""
        for queue in (self._window, self._probation, self._protected, self._ghosts):
            queue.discard(keys)
        for key in keys:
            self._uses.pop(key, None)

    def settle(self, keys: Sequence[OffloadKey]) -> None:
        """Make the held ones of `keys` the most recent, tail first. The first of them get the places in the window."""
        window, probation, protected = self._window, self._probation, self._protected
        protected.renew(keys[::-1])
        num_window = len(window.held(keys))
        loose = [key for key in reversed(keys) if key in window or key in probation]
        border = len(loose) - num_window
        probation.take(loose[:border], window, probation)
        window.take(loose[border:], window, probation)

    line_up = settle

    def clear(self) -> None:
        """Forget everything, including counts."""
        clear_queues((self._window, self._probation, self._protected, self._ghosts))
        self._uses.clear()
        self._epoch = self._uses_in_epoch = 0

    def __len__(self) -> int:
        return len(self._window) + len(self._probation) + len(self._protected)

    def __contains__(self, key: object) -> bool:
        return key in self._probation or key in self._protected or key in self._window

    def check_invariants(self) -> None:
        """Raise InvariantError if queues overlap or are too long, or a key has no count or a count no key."""
        queues = (self._window, self._probation, self._protected, self._ghosts)
        self._window.check_invariants()
        if len(set().union(*queues)) != sum(map(len, queues)) or set().union(*queues) != self._uses.keys():
            raise InvariantError("TinyLFU: a key is in two queues, or has no count")
        if len(self) > self.capacity or len(self._ghosts) > GHOSTS_PER_KEY * self.capacity:
            raise InvariantError(f"TinyLFU: {len(self)} keys, {len(self._ghosts)} ghosts, capacity {self.capacity}")
        if len(self._protected) > self._most_protected:
            raise InvariantError("TinyLFU: the protected part is over its share")
