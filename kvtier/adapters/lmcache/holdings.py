"""Which of LMCache's objects the tiers hold, as far as this process has stored them."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Self

from kvtier.adapters.staging_slots import PageKeys
from kvtier.keys import OffloadKey, get_offload_block_hash, make_offload_key

MOST_HELD = 1 << 20
"""Most objects to remember: a tier may hold any number."""


@dataclass(frozen=True, slots=True)
class Holding:
    """An object in the tiers. It is small, since there may be a million.

    Attributes:
        key: LMCache's.
        num_bytes: in the object.
        block_hash: with which the keys of its blocks begin.
        num_blocks: that hold it.
    """

    key: Any
    num_bytes: int
    block_hash: bytes
    num_blocks: int

    @classmethod
    def of(cls, key: Any, num_bytes: int, blocks: PageKeys) -> Self:
        """Return one for an object with these blocks."""
        return cls(key, num_bytes, get_offload_block_hash(blocks[0]), len(blocks))

    @property
    def blocks(self) -> PageKeys:
        """Keys of its blocks."""
        return [make_offload_key(self.block_hash, number) for number in range(self.num_blocks)]


class Holdings:
    """Finds the objects to which removed blocks belong. Several threads may call it at once.

    The tiers know hashes only. So objects that an earlier process has stored are found and loaded, but not listed here.
    """

    def __init__(self, most: int = MOST_HELD) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._by_hash: OrderedDict[bytes, Holding] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_hash)

    def add(self, stored: Iterable[Holding]) -> list[Holding]:
        """Note objects that the tiers hold now; return those that are new."""
        stored = list(stored)
        with self._lock:
            fresh = [held for held in stored if held.block_hash not in self._by_hash]
            self._by_hash.update((held.block_hash, held) for held in stored)
        return fresh

    def next(self, count: int) -> list[Holding]:
        """Return the objects that were stored, or returned by this, the longest ago."""
        with self._lock:
            hashes = list(itertools.islice(self._by_hash, count))
            for one in hashes:
                self._by_hash.move_to_end(one)
            return [self._by_hash[one] for one in hashes]

    def excess(self) -> list[Holding]:
        """Return the oldest of too many objects."""
        with self._lock:
            return list(itertools.islice(self._by_hash.values(), max(0, len(self._by_hash) - self._most)))

    def touched_by(self, removed: Collection[OffloadKey]) -> list[Holding]:
        """Return the objects of which these blocks were a part."""
        with self._lock:
            hashes = dict.fromkeys(map(get_offload_block_hash, removed))
            return [self._by_hash[one] for one in hashes if one in self._by_hash]

    def of(self, blocks: PageKeys) -> Holding | None:
        """Return the object that these blocks hold; None if it is not known."""
        return self._by_hash.get(get_offload_block_hash(blocks[0]))

    def remove(self, gone: Iterable[Holding]) -> list[Holding]:
        """Forget objects that no tier holds any more; return those that were noted, and not stored again meanwhile."""
        with self._lock:
            removed = [one for one in gone if self._by_hash.get(one.block_hash) is one]
            for one in removed:
                self._by_hash.pop(one.block_hash, None)
        return removed
