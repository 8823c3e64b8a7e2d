"""Orders of keys that grow and churn without a pause: `key_tables.py` says why, and which tables are large.

An order is a queue from the oldest to the newest key. `key_queues` chooses between an OrderedDict and a `LongQueue`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, TypeVar

from kvtier import key_tables
from kvtier.key_tables import KeySlots
from kvtier.keys import OffloadKey
from kvtier.long_queue import KeyPlaces, LongQueue, SlotPlaces, are_in_no_run

V = TypeVar("V")


class SmallQueue(OrderedDict[OffloadKey, V]):
    """An OrderedDict of keys with the methods of a `LongQueue`."""

    __slots__ = ()

    def entries(self) -> Iterator[tuple[OffloadKey, V]]:
        """Return keys and values, oldest first."""
        return iter(self.items())

    def isdisjoint(self, keys: Iterable[OffloadKey]) -> bool:
        """Return whether none of `keys` is here."""
        return self.keys().isdisjoint(keys)

    def held(self, keys: Iterable[OffloadKey]) -> list[OffloadKey]:
        """Return those of `keys` that are here, in their order."""
        return list(filter(self.__contains__, keys))

    def oldest(self, count: int) -> list[OffloadKey]:
        """Return up to `count` keys, oldest first; none if it is below 1."""
        return list(islice(self, count)) if count > 0 else []

    def append(self, keys: Sequence[OffloadKey], value: V) -> None:
        """Append `keys`, none of which is here, with one value."""
        for key in keys:  # takes half the time of OrderedDict.update
            self[key] = value

    def renew(self, keys: Sequence[OffloadKey]) -> bool:
        """Move those of `keys` that are here to the new end, one after the other; return whether all are here."""
        move = self.move_to_end
        # `map` runs in C and takes half the time of a loop. The deque of length 0 only consumes it.
        try:
            deque(map(move, keys), maxlen=0)
            return True
        except KeyError:  # some are not held; a check of each beforehand takes a third longer if all are held
            deque(map(move, filter(self.__contains__, keys)), maxlen=0)
            return False

    def renew_all(self, keys: Sequence[OffloadKey], *beside: Any) -> None:
        """Move those of `keys` that are here or in queues `beside` to the new end of their own queue."""
        if not self.renew(keys):
            for queue in beside:
                queue.renew(keys)

    def take(self, keys: Sequence[OffloadKey], *sources: Any) -> bool:
        """Move those of `keys` that are in `sources`, this queue perhaps among them, to the new end, one after the
        other.

        Returns:
            True if all keys were in one of `sources`; False if they were not, or in several.
        """
        rest = iter(keys)
        for source in sources:
            if keys and keys[0] in source:
                try:  # usually all keys are in one queue: nothing is asked twice
                    if source is self:
                        deque(map(self.move_to_end, keys), maxlen=0)
                    else:
                        for key in rest:
                            self[key] = source.pop(key)
                    return True
                except KeyError:
                    rest = iter(keys) if source is self else chain((key,), rest)
                    break
        for key in rest:
            for source in sources:
                if key in source:
                    self[key] = source.pop(key)
                    break
        return False

    def drop(self, keys: Iterable[OffloadKey]) -> None:
        """Remove `keys`, all of which are here.

        Raises:
            KeyError: one of them is not; those before it are removed.
        """
        for key in keys:
            del self[key]

    def discard(self, keys: Iterable[OffloadKey]) -> None:
        """Remove those of `keys` that are here."""
        if self:
            for key in keys:
                self.pop(key, None)

    def check_invariants(self) -> None:
        """Do nothing: an OrderedDict cannot contradict itself."""


KeyQueue = SmallQueue[V] | LongQueue[V]


def key_queues(count: int, most: int, slots: KeySlots | None = None) -> list[Any]:
    """Return empty queues of which each has up to `most` entries, and no two the same key.

    Args:
        slots: those of each key that enters a queue, below `most`, from before that until it has left. If some are
            entering, exactly these keys enter.
    """
    if most <= key_tables.MOST_IN_ONE:
        return [SmallQueue() for _ in range(count)]
    places = KeyPlaces(most) if slots is None else SlotPlaces(slots, most)
    return [LongQueue(places) for _ in range(count)]


def are_disjoint(queues: Sequence[KeyQueue[Any]], keys: Collection[OffloadKey]) -> bool:
    """Return whether none of `keys` is in any of `queues`, which `key_queues` has returned together."""
    long = [queue for queue in queues if isinstance(queue, LongQueue)]
    return are_in_no_run(long, keys) if long else all(queue.isdisjoint(keys) for queue in queues)


def clear_queues(queues: Sequence[KeyQueue[Any]]) -> None:
    """Empty `queues`, which `key_queues` has returned together."""
    first = queues[0]
    if isinstance(first, LongQueue):
        first.clear_all()
        return
    for queue in queues:
        queue.clear()
