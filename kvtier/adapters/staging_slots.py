"""The slots of the staging arena, and the pages that are in them. No thread safety: the owner has a lock."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from kvtier.errors import InvariantError
from kvtier.keys import OffloadKey

_STORE_SHARE = 0.5
"""Most slots that stores take, as a share of all: the rest is left for loads, for which requests wait."""

PageKeys = Sequence[OffloadKey]
"""The keys of one page: one per block of a tier that holds a part of it."""


@dataclass(eq=False)
class Batch:
    """Pages in slots, and the jobs that use the slots.

    Attributes:
        pages: index and slots of each page.
        num_jobs: jobs without a result.
        done: per ended job, the keys that succeeded.
        is_abandoned: no caller waits any more; the last job's end frees the slots.
    """

    pages: list[tuple[int, list[int]]]
    is_store: bool
    num_jobs: int = 0
    done: list[Collection[OffloadKey]] = field(default_factory=list)
    is_abandoned: bool = False

    @property
    def num_slots(self) -> int:
        """Slots of all pages."""
        return sum(len(slots) for _, slots in self.pages)

    def has(self, page: PageKeys) -> bool:
        """Return whether one tier has moved all of a page."""
        return any(set(page).issubset(done) for done in self.done)


class StagingSlots:
    """Hands out slots for batches of pages."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._free = list(range(num_slots))
        self._num_storing = 0

    def take(self, pages: Sequence[tuple[int, int]], *, is_store: bool) -> Batch | None:
        """Return a batch of as many of the first pages as there are slots for; None if not even one fits now.

        Args:
            pages: index and number of blocks of each page.
        """
        room = len(self._free)
        if is_store:
            most = max(int(self._num_slots * _STORE_SHARE), pages[0][1])
            room = min(room, most - self._num_storing)
        taken: list[tuple[int, list[int]]] = []
        for index, num_blocks in pages:
            if num_blocks > room:
                break
            room -= num_blocks
            taken.append((index, [self._free.pop() for _ in range(num_blocks)]))
        if not taken:
            return None
        batch = Batch(taken, is_store)
        self._num_storing += batch.num_slots if is_store else 0
        return batch

    def release(self, batch: Batch) -> None:
        """Free the slots of a batch, which no job uses."""
        for _, slots in batch.pages:
            self._free += slots
        self._num_storing -= batch.num_slots if batch.is_store else 0

    def check_invariants(self, batches: Collection[Batch]) -> None:
        """Raise InvariantError unless every slot is free or in one of these batches."""
        used = [slot for batch in batches for _, slots in batch.pages for slot in slots]
        if sorted(self._free + used) != list(range(self._num_slots)):
            raise InvariantError(f"{len(self._free)} slots are free and {len(used)} used of {self._num_slots}")
