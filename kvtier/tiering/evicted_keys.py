"""Notices blocks that the engine computes again after a tier has evicted them: a larger tier would have kept them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvtier.events import BlocksEvicted, BlocksRecomputed, BlocksStored, CacheReset, Event, Observer
from kvtier.keys import OffloadKey

EVERY_EVICTED, EVERY_STORED = 13, 5
"""One evicted block in 13 is remembered, and one stored block in 5 is compared with them; so each that is found counts
for 65. The numbers have no common divisor: otherwise blocks that are evicted and stored in the same order would be
compared always or never. With all blocks, a store that evicts 64 was measured to take a third longer."""
MAX_REMEMBERED = 50_000
"""Most evicted keys that are remembered, at about 150 bytes each. The older half is forgotten at once."""


class EvictedKeys:
    """An observer that remembers which tier has evicted a block last, and reports when the device stores it again."""

    def __init__(
        self,
        observer: Observer,
        most: int = MAX_REMEMBERED,
        every_evicted: int = EVERY_EVICTED,
        every_stored: int = EVERY_STORED,
    ) -> None:
        """Args: observer: is told of blocks that were computed again; the others: see the constants."""
        self._observer = observer
        self._most = most // 2
        self._every_evicted, self._every_stored = every_evicted, every_stored
        self._num_evicted = self._num_stored = 0
        self._recent: dict[OffloadKey, str] = {}
        # A dict from which the oldest entry is taken again and again becomes slow, so whole halves are dropped.
        self._older: dict[OffloadKey, str] = {}

    def on_event(self, event: Event) -> None:
        """Take in what was evicted, and compare what was computed with it."""
        if isinstance(event, BlocksEvicted):
            chosen = event.keys[-self._num_evicted % self._every_evicted :: self._every_evicted]
            self._num_evicted += len(event.keys)
            self._recent.update(dict.fromkeys(chosen, event.tier))
            if len(self._recent) >= self._most:
                self._recent, self._older = {}, self._recent
        elif isinstance(event, BlocksStored) and event.source is None and self._num_evicted:
            chosen = event.keys[-self._num_stored % self._every_stored :: self._every_stored]
            self._num_stored += len(event.keys)
            for evicted in (self._recent, self._older):
                if evicted and not evicted.keys().isdisjoint(chosen):
                    self._report(chosen, evicted)
        elif isinstance(event, CacheReset):  # no tier, however large, would have kept them
            self._recent, self._older = {}, {}

    def _report(self, keys: Sequence[OffloadKey], evicted: dict[OffloadKey, str]) -> None:
        for tier, count in Counter([evicted.pop(key) for key in keys if key in evicted]).items():
            self._observer.on_event(BlocksRecomputed(tier, count * self._every_evicted * self._every_stored))
