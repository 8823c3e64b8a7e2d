"""LRU: evicts the least recently used key first.

Its weakness: one long scan of keys that are never used again evicts everything else.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence

from kvtier.abc import EvictionPolicy
from kvtier.errors import InvariantError
from kvtier.keys import OffloadKey


class LRUPolicy(EvictionPolicy):
    """Least recently used, tail-first within one call.

    The queue runs from the best victim to the most recent key. It is an `OrderedDict`: a plain dict keeps a hole for
    each deleted key, and every iteration from its front would walk over all holes again.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._queue: OrderedDict[OffloadKey, None] = OrderedDict()

    def insert(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Append `keys`; the first of them becomes the most recent."""
        queue = self._queue
        for key in reversed(keys):  # takes half the time of OrderedDict.update
            queue[key] = None

    def touch(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Move the held ones of `keys` to the recent end; the first of them becomes the most recent."""
        if not keys:
            return
        queue = self._queue
        # `map` runs in C and takes half the time of a loop. The deque of length 0 only consumes it.
        try:
            deque(map(queue.move_to_end, reversed(keys)), maxlen=0)
        except KeyError:  # some keys are not held; a check of each beforehand takes a third longer if all are held
            deque(map(queue.move_to_end, filter(queue.__contains__, reversed(keys))), maxlen=0)

    def evict(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys`; LRU has no ghosts."""
        queue = self._queue
        for key in keys:
            del queue[key]

    def remove(self, keys: Sequence[OffloadKey]) -> None:
        self.evict(keys)

    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        """Yield the held keys, least recently used first; `incoming` changes nothing."""
        return iter(self._queue)

    def settle(self, keys: Sequence[OffloadKey]) -> None:
        """Move `keys` to the recent end, tail first: the same as `touch`, since LRU counts no uses."""
        self.touch(keys)

    def clear(self) -> None:
        self._queue.clear()

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, key: object) -> bool:
        return key in self._queue

    def check_invariants(self) -> None:
        """Raise InvariantError if more keys are held than the capacity allows."""
        if len(self._queue) > self.capacity:
            raise InvariantError(f"LRU holds {len(self._queue)} keys, capacity {self.capacity}")
