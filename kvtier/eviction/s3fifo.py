"""S3-FIFO: a small queue filters out keys that are used once, a main queue keeps the others, ghosts correct the filter.

J. Yang, Y. Zhang, Z. Qiu, Y. Yue and K. V. Rashmi, "FIFO Queues Are All You Need for Cache Eviction", SOSP 2023,
algorithm 1. As in the authors' own code, one more use is enough for a key to move from the small queue to the main one.

Its weakness: the small queue is a tenth of the cache. If it turns over before a session comes back, the session's
prefix is evicted and has to be computed again. A large cache therefore loses to LRU on conversations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain, groupby

from kvtier.abc import EvictionPolicy
from kvtier.errors import InvariantError
from kvtier.key_queues import KeyQueue, clear_queues, key_queues
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
        self._small: KeyQueue[int]
        self._main: KeyQueue[int]
        self._ghosts: KeyQueue[int]
        self._small, self._main, self._ghosts = key_queues(3, capacity)
        self._most_small = max(1, capacity // SMALL_SHARE)
        self._most_ghosts = max(1, capacity - self._most_small)

    def insert(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Append keys with a ghost to the main queue, and the others to the small queue."""
        small, main, ghosts = self._small, self._main, self._ghosts
        for is_ghost, same in groupby(reversed(keys), ghosts.__contains__) if ghosts else [(False, reversed(keys))]:
            run = list(same)
            if is_ghost:
                ghosts.drop(run)
            (main if is_ghost else small).append(run, 0)

    def touch(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Count one more use of the held ones of `keys`; no key moves."""
        for queue in (self._small, self._main):
            for key in keys if not queue.isdisjoint(keys) else ():
                uses = queue.get(key, MAX_USES)
                if uses < MAX_USES:
                    queue[key] = uses + 1

    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        """Yield every held key in the order in which the queues evict while `incoming` is inserted.

        The n-th victim is chosen as if the last n - 1 keys of `incoming` were in the queues already.
        """
        ghosts, most_small = self._ghosts, self._most_small
        joins_small = iter([key not in ghosts for key in reversed(incoming)])
        small, left_small = self._small.entries(), len(self._small)
        main, moved = self._main.entries(), deque[tuple[OffloadKey, int]]()
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
        self._ghosts.drop(self._ghosts.oldest(len(self._ghosts) - most_ghosts))

    def _evict_from_small(self, victims: set[OffloadKey]) -> None:
        """Walk the small queue up to its last victim, or to its end if the main queue had to give a key instead.

        Keys that are no victims although they were used once only stay: the caller may not evict them, for example
        while they are read.
        """
        small = self._small
        left = len(small.held(victims))
        all_pass = left < len(victims) and len(small) >= self._most_small and all(uses for _, uses in small.entries())
        used: list[OffloadKey] = []
        gone: list[OffloadKey] = []
        for key, uses in small.entries():
            if not (left or all_pass):
                break
            if uses:
                used.append(key)
                if key in victims:
                    left -= 1
                    all_pass = True
            elif key in victims:
                left -= 1
                gone.append(key)
        victims.difference_update(gone)
        self._ghosts.take(gone, small)
        small.drop(used)
        self._main.append(used, 0)

    def _evict_from_main(self, victims: set[OffloadKey]) -> None:
        """Walk the main queue, again and again if need be, up to its last victim; used keys move to its new end."""
        main = self._main
        while victims:
            used: list[tuple[OffloadKey, int]] = []
            gone: list[OffloadKey] = []
            for key, uses in main.entries():
                if uses:
                    used.append((key, uses - 1))
                elif key in victims:
                    victims.discard(key)
                    gone.append(key)
                    if not victims:
                        break
            main.drop(gone)
            if victims and not used:
                raise KeyError(f"S3-FIFO does not hold {len(victims)} of the keys to evict")
            for key, uses in used:
                main[key] = uses
            main.renew([key for key, _ in used])

    def remove(self, keys: Sequence[OffloadKey]) -> None:
        """Forget `keys`, held or ghosts."""
        for queue in (self._small, self._main, self._ghosts):
            queue.discard(keys)

    def settle(self, keys: Sequence[OffloadKey]) -> None:
        """Move the held ones of `keys` to the new end of their own queue, tail first."""
        self._small.renew(keys[::-1])
        self._main.renew(keys[::-1])

    line_up = settle

    def clear(self) -> None:
        """Forget everything, including ghosts."""
        clear_queues((self._small, self._main, self._ghosts))

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def __contains__(self, key: object) -> bool:
        return key in self._small or key in self._main

    def check_invariants(self) -> None:
        """Raise InvariantError if queues overlap or are too long, or a use count is out of range."""
        small, main, ghosts = self._small, self._main, self._ghosts
        small.check_invariants()
        if len({*small, *main, *ghosts}) != len(small) + len(main) + len(ghosts):
            raise InvariantError("S3-FIFO: a key is in two queues")
        if len(self) > self.capacity or len(ghosts) > self._most_ghosts:
            raise InvariantError(f"S3-FIFO: {len(self)} keys and {len(ghosts)} ghosts, capacity {self.capacity}")
        if not all(0 <= uses <= MAX_USES for uses in chain(small.values(), main.values())):
            raise InvariantError("S3-FIFO: a use count is out of its range")
