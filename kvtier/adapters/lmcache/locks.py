"""The locks that LMCache holds on objects between a lookup and the end of their loads."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from kvtier.adapters.staging_slots import PageKeys


class Locks:
    """Remembers which blocks each lock has pinned: an object's form may be another one when it is unlocked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[Any, list[PageKeys]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, locked: Iterable[tuple[Any, PageKeys]]) -> None:
        """Note one lock of each object."""
        with self._lock:
            for key, blocks in locked:
                self._blocks.setdefault(key, []).append(blocks)

    def __contains__(self, key: Any) -> bool:
        return key in self._blocks

    def take(self, keys: Iterable[Any]) -> list[PageKeys]:
        """Forget one lock of each object, and return the blocks of those that were locked."""
        taken = []
        with self._lock:
            for key in keys:
                blocks = self._blocks.get(key)
                if blocks is None:
                    continue
                taken.append(blocks.pop())
                if not blocks:
                    del self._blocks[key]
        return taken
