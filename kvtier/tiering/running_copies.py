"""The copies between device and arena that a request has under way. `device_copies.py` begins and ends them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import chain

from kvtier.events import BlocksLoaded
from kvtier.keys import OffloadKey


@dataclass(slots=True, eq=False)
class RunningCopies:
    """Copies of one key that run at the same time.

    Attributes:
        slots: one per copy. All are in use until the last copy has ended.
        num_running: how many copies have not ended.
    """

    slots: list[int]
    num_running: int

    def add(self, slot: int) -> None:
        """Add a copy."""
        self.slots.append(slot)
        self.num_running += 1

    def end_one(self) -> bool:
        """Count that one of the copies has ended; return whether it was the last one."""
        self.num_running -= 1
        return not self.num_running


class RunningStores:
    """The blocks that a request is storing from the device, in the order in which they were prepared.

    They are lists per store, since engines mostly complete a store as a whole. A dictionary of all would take a tenth
    of a store's time.
    """

    __slots__ = ("_stores",)

    def __init__(self) -> None:
        self._stores: list[tuple[list[OffloadKey], list[int]]] = []

    def __bool__(self) -> bool:
        return bool(self._stores)

    def entries(self) -> Iterator[tuple[OffloadKey, int]]:
        """Yield keys and slots."""
        return chain.from_iterable(zip(keys, slots, strict=True) for keys, slots in self._stores)

    def begin(self, keys: list[OffloadKey], slots: list[int]) -> None:
        """Add a store; no key comes twice. Both lists are kept, and nobody may change them."""
        if keys:
            self._stores.append((keys, slots))

    def end(self, keys: Collection[OffloadKey]) -> tuple[list[OffloadKey], list[int]]:
        """Remove and return those of `keys` that are here, and their slots. Of two stores of a key, the older ends."""
        wanted = keys if isinstance(keys, set | frozenset) else set(keys)
        if len(self._stores) == 1 and len(wanted) == len(self._stores[0][0]) and wanted.issuperset(self._stores[0][0]):
            return self._stores.pop()
        ended: tuple[list[OffloadKey], list[int]] = ([], [])
        left: tuple[list[OffloadKey], list[int]]
        wanted, stores, self._stores = set(wanted), self._stores, []
        for store in stores:
            left = store
            if not wanted.isdisjoint(store[0]):
                left = ([], [])
                for key, slot in zip(*store, strict=True):
                    names, slots = ended if key in wanted else left
                    names.append(key)
                    slots.append(slot)
                wanted.difference_update(store[0])
            self.begin(*left)
        return ended

    def clear(self) -> None:
        """Forget all stores."""
        self._stores.clear()


@dataclass(slots=True, eq=False)
class Copies:
    """Slots under a copy between device and arena.

    Attributes:
        loading: by key, in the order in which they were prepared.
        loading_again: all loads of each key that was already being loaded, the first one included.
        arriving: what to tell observers of these loads when they have ended.
    """

    storing: RunningStores = field(default_factory=RunningStores)
    loading: dict[OffloadKey, int] = field(default_factory=dict)
    loading_again: dict[OffloadKey, RunningCopies] = field(default_factory=dict)
    arriving: list[BlocksLoaded] = field(default_factory=list)

    @property
    def are_unfinished(self) -> bool:
        """Whether any copy has not ended."""
        return bool(self.storing or self.loading)
