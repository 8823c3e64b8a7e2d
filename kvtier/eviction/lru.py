"""LRU: the key whose last use is oldest goes first.

Its weakness: one long scan of keys that never come back flushes everything.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence

from kvtier.abc import EvictionPolicy
from kvtier.errors import InvariantError
from kvtier.keys import OffloadKey


class LRUPolicy(EvictionPolicy):
    """Least recently used, tail-first within one call.

    The queue runs from the best victim to the most recent key. It is an `OrderedDict` and no plain dict,
    which leaves holes at its front that every iteration walks over again.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._queue: OrderedDict[OffloadKey, None] = OrderedDict()

    def insert(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Append `keys`, the head of the call as the most recent."""
        queue = self._queue
        for key in reversed(keys):  # half the time of OrderedDict.update
            queue[key] = None

    def touch(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Make the held ones of `keys` the most recent, the head of the call last."""
        if not keys:
            return
        queue = self._queue
        # A chain of C iterators: half the time of a loop. The deque of length 0 only drives it.
        try:
            deque(map(queue.move_to_end, reversed(keys)), maxlen=0)
        except KeyError:  # some are not held; to ask for each first would take a third longer where all are
            deque(map(queue.move_to_end, filter(queue.__contains__, reversed(keys))), maxlen=0)

    def evict(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys`; nothing is remembered."""
        queue = self._queue
        for key in keys:
            del queue[key]

    def remove(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys`."""
        self.evict(keys)

    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        """Yield the held keys, least recently used first; `incoming` does not matter."""
        return iter(self._queue)

    def settle(self, keys: Sequence[OffloadKey]) -> None:
        """Put `keys` in tail-first order at the recent end: the same as a touch, since LRU counts no uses."""
        self.touch(keys)

    def clear(self) -> None:
        """Forget everything."""
        self._queue.clear()

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, key: object) -> bool:
        return key in self._queue

    def check_invariants(self) -> None:
        """Raise InvariantError if more keys are held than the capacity allows."""
        if len(self._queue) > self.capacity:
            raise InvariantError(f"LRU holds {len(self._queue)} keys, capacity {self.capacity}")
