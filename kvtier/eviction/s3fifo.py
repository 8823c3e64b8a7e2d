"""S3-FIFO: a small queue filters out keys that are used once, a main queue keeps the others, ghosts correct the filter.

J. Yang, Y. Zhang, Z. Qiu, Y. Yue and K. V. Rashmi, "FIFO Queues Are All You Need for Cache Eviction", SOSP 2023,
algorithm 1. As in the authors' own code, one more use is enough for a key to move from the small queue to the main one.

Its weakness: the small queue is a tenth of the cache. If it turns over before a session comes back, the session's
prefix is evicted and has to be computed again. A large cache therefore loses to LRU on conversations.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from itertools import chain, islice

from kvtier.abc import EvictionPolicy
from kvtier.errors import InvariantError
from kvtier.keys import OffloadKey

MAX_USES = 3
"""Uses after the first are counted up to this: two bits in the paper."""

SMALL_SHARE = 10
"""The target size of the small queue is the capacity divided by this."""


class S3FIFOPolicy(EvictionPolicy):
    """Three FIFO queues, tail-first within one call.

    Held keys are in the small or the main queue, with the number of later uses. Each queue runs from its oldest to
    its newest entry. The paper moves keys between queues while it looks for a victim. Here `candidates` must change
    nothing: it only simulates the moves, and `evict` repeats the walk up to the last victim and makes them.

    With one key per call (`candidates([x])`, `evict`, `insert([x])`) every decision is the paper's. The keys of a
    batch enter from its tail, after all victims have left.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._small: OrderedDict[OffloadKey, int] = OrderedDict()
        self._main: OrderedDict[OffloadKey, int] = OrderedDict()
        self._ghosts: OrderedDict[OffloadKey, None] = OrderedDict()
        self._most_small = max(1, capacity // SMALL_SHARE)
        self._most_ghosts = max(1, capacity - self._most_small)

    def insert(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Append keys with a ghost to the main queue, and the others to the small queue."""
        small, main, ghosts = self._small, self._main, self._ghosts
        if ghosts.keys().isdisjoint(keys):
            for key in reversed(keys):
                small[key] = 0
            return
        for key in reversed(keys):
            if key in ghosts:
                del ghosts[key]
                main[key] = 0
            else:
                small[key] = 0

    def touch(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Count one more use of the held ones of `keys`; no key moves."""
        for queue in (self._small, self._main):
            if not queue.keys().isdisjoint(keys):
                for key in keys:
                    if queue.get(key, MAX_USES) < MAX_USES:
                        queue[key] += 1

    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        """Yield every held key in the order in which the queues evict while `incoming` is inserted.

        The n-th victim is chosen as if the last n - 1 keys of `incoming` were in the queues already.
        """
        ghosts, most_small = self._ghosts, self._most_small
        joins_small = iter([key not in ghosts for key in reversed(incoming)])
        small, left_small = iter(self._small.items()), len(self._small)
        main, moved = iter(self._main.items()), deque[tuple[OffloadKey, int]]()
        left_main, arrived = len(self._main), 0
        while left_small or left_main:
            in_small = left_small + arrived >= most_small or not left_main
            while True:
                if in_small and left_small:
                    left_small -= 1
                    key, uses = next(small)
                    if not uses:
                        break
                    moved.append((key, 0))
                    left_main += 1
                else:
                    key, uses = next(main, None) or moved.popleft()
                    if not uses:
                        left_main -= 1
                        break
                    moved.append((key, uses - 1))
            yield key
            arrived += next(joins_small, False)

    def evict(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys`, remember those from the small queue as ghosts, and move the used keys before them."""
        victims = set(keys)
        most_ghosts = min(self._most_ghosts, len(self))  # a tenant's policy holds less than its capacity
        self._evict_from_small(victims)
        self._evict_from_main(victims)
        for key in list(islice(self._ghosts, max(0, len(self._ghosts) - most_ghosts))):
            del self._ghosts[key]

    def _evict_from_small(self, victims: set[OffloadKey]) -> None:
        """Walk the small queue up to its last victim, or to its end if the main queue had to give a key instead."""
        small, main, ghosts = self._small, self._main, self._ghosts
        left = len(small.keys() & victims)
        all_pass = left < len(victims) and len(small) >= self._most_small and 0 not in small.values()
        skipped: list[OffloadKey] = []
        while small and (left or all_pass):
            key, uses = small.popitem(last=False)
            if uses:
                main[key] = 0
                if key in victims:
                    left -= 1
                    all_pass = True
            elif key in victims:
                victims.discard(key)
                left -= 1
                ghosts[key] = None
            else:
                skipped.append(key)
        _put_back(small, skipped)

    def _evict_from_main(self, victims: set[OffloadKey]) -> None:
        main, skipped = self._main, list[OffloadKey]()
        while victims:
            key, uses = main.popitem(last=False)
            if uses:
                main[key] = uses - 1
            elif key in victims:
                victims.discard(key)
            else:
                skipped.append(key)
        _put_back(main, skipped)

    def remove(self, keys: Sequence[OffloadKey]) -> None:
        """Forget `keys`, held or ghosts."""
        for key in keys:
            for queue in (self._small, self._main, self._ghosts):
                queue.pop(key, None)

    def settle(self, keys: Sequence[OffloadKey]) -> None:
        """Move the held ones of `keys` to the new end of their own queue, tail first."""
        for key in reversed(keys):
            if key in self._small:
                self._small.move_to_end(key)
            elif key in self._main:
                self._main.move_to_end(key)

    def clear(self) -> None:
        """Forget everything, including ghosts."""
        for queue in (self._small, self._main, self._ghosts):
            queue.clear()

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def __contains__(self, key: object) -> bool:
        return key in self._small or key in self._main

    def check_invariants(self) -> None:
        """Raise InvariantError if queues overlap or are too long, or a use count is out of range."""
        small, main, ghosts = self._small, self._main, self._ghosts
        if len({*small, *main, *ghosts}) != len(small) + len(main) + len(ghosts):
            raise InvariantError("S3-FIFO: a key is in two queues")
        if len(self) > self.capacity or len(ghosts) > self._most_ghosts:
            raise InvariantError(f"S3-FIFO: {len(self)} keys and {len(ghosts)} ghosts, capacity {self.capacity}")
        if not all(0 <= uses <= MAX_USES for uses in chain(small.values(), main.values())):
            raise InvariantError("S3-FIFO: a use count is out of its range")


def _put_back(queue: OrderedDict[OffloadKey, int], unused_keys: Sequence[OffloadKey]) -> None:
    """Put keys that a walk skipped back at the old end, in their order. Such keys are no victims only because the
    caller may not evict them, for example while they are read.
    """
    for key in reversed(unused_keys):
        queue[key] = 0
        queue.move_to_end(key, last=False)
