"""Which of LMCache's objects the tiers hold, as far as this process has stored them."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from kvtier.adapters.staging_slots import PageKeys
from kvtier.keys import OffloadKey, get_offload_block_hash


@dataclass(frozen=True)
class Holding:
    """An object in the tiers.

    Attributes:
        key: LMCache's.
        num_bytes: in the object.
        blocks: keys of its blocks.
    """

    key: Any
    num_bytes: int
    blocks: PageKeys


class Holdings:
    """Finds the objects to which removed blocks belong. Several threads may call it at once.

    The tiers know hashes only. So objects that an earlier process has stored are found and loaded, but not listed here.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_hash: dict[bytes, Holding] = {}

    def __len__(self) -> int:
        return len(self._by_hash)

    def add(self, stored: Iterable[Holding]) -> list[Holding]:
        """Note objects that the tiers hold now; return those that are new."""
        with self._lock:
            fresh = [held for held in stored if _hash_of(held.blocks) not in self._by_hash]
            self._by_hash.update((_hash_of(held.blocks), held) for held in fresh)
        return fresh

    def touched_by(self, removed: Collection[OffloadKey]) -> list[Holding]:
        """Return the objects of which these blocks were a part."""
        with self._lock:
            hashes = dict.fromkeys(map(get_offload_block_hash, removed))
            return [self._by_hash[one] for one in hashes if one in self._by_hash]

    def remove(self, gone: Iterable[Holding]) -> list[Holding]:
        """Forget objects that no tier holds any more; return those that were noted."""
        with self._lock:
            return [held for one in gone if (held := self._by_hash.pop(_hash_of(one.blocks), None)) is not None]


def _hash_of(blocks: PageKeys) -> bytes:
    return get_offload_block_hash(blocks[0])
