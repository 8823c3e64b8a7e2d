"""LRU: evicts the least recently used key first.

Its weakness: one long scan of keys that are never used again evicts everything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvtier.abc import EvictionPolicy
from kvtier.errors import InvariantError
from kvtier.key_queues import KeyQueue, key_queues
from kvtier.key_tables import KeySlots
from kvtier.keys import OffloadKey


class LRUPolicy(EvictionPolicy):
    """Least recently used, tail-first within one call.

    The queue runs from the best victim to the most recent key.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._queue: KeyQueue[None]
        (self._queue,) = key_queues(1, capacity)

    def use_slots(self, slots: KeySlots) -> None:
        """Note by slot where in the order a key is, which saves a large policy a table of its own."""
        (self._queue,) = key_queues(1, self.capacity, slots)

    def insert(self, keys: Sequence[OffloadKey], now: float = 0.0) -> None:
        """Append `keys`; the first of them becomes the most recent."""
        self._queue.append(keys[::-1], None)

    def touch(self, keys: Sequence[OffloadKey], now: float = 0.0) -> bool:
        """Move the held ones of `keys` to the recent end; the first of them becomes the most recent."""
        return self._queue.renew(keys[::-1])

    def evict(self, keys: Sequence[OffloadKey]) -> None:
        """Stop holding `keys`; LRU has no ghosts."""
        self._queue.drop(keys)

    def remove(self, keys: Sequence[OffloadKey]) -> None:
        self.evict(keys)

    def candidates(self, incoming: Sequence[OffloadKey] = ()) -> Iterator[OffloadKey]:
        """Yield the held keys, least recently used first; `incoming` changes nothing."""
        return iter(self._queue)

    def settle(self, keys: Sequence[OffloadKey]) -> None:
        """Move `keys` to the recent end, tail first: the same as `touch`, since LRU counts no uses."""
        self.touch(keys)

    line_up = settle

    def clear(self) -> None:
        self._queue.clear()

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, key: object) -> bool:
        return key in self._queue

    def check_invariants(self) -> None:
        """Raise InvariantError if more keys are held than the capacity allows."""
        self._queue.check_invariants()
        if len(self._queue) > self.capacity:
            raise InvariantError(f"LRU holds {len(self._queue)} keys, capacity {self.capacity}")
