"""The two roads between LMCache's objects and the tiers: copied through a staging arena, or in place."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from kvtier.adapters.lmcache.objects import parts_of
from kvtier.adapters.lmcache.options import LMCacheOptions
from kvtier.adapters.lmcache.pool import Pool
from kvtier.adapters.memory_parts import copy_from_rows, copy_to_rows
from kvtier.adapters.staged_tiers import POLL_SECONDS, StagedTiers
from kvtier.adapters.staging_slots import Batch, PageKeys
from kvtier.sizes import parse_size
from kvtier.spec.staging import StagingSpec
from kvtier.tiering.guarded_tier import TierGuard

Move = Callable[[Sequence[PageKeys], Sequence[list[int]]], list[bool]]


class Road(ABC):
    """Moves objects; several threads may call it at once.

    Attributes:
        tiers: at its end; whoever uses the road closes them.
        most_blocks: that one call moves.
    """

    tiers: StagedTiers
    most_blocks: int

    @abstractmethod
    def store(self, pages: Sequence[PageKeys], objects: Sequence[Any]) -> list[bool]:
        """Store objects; return which one tier holds whole now."""

    @abstractmethod
    def load(self, pages: Sequence[PageKeys], objects: Sequence[Any]) -> list[bool]:
        """Load objects; return which were loaded whole and verified."""


class StagedRoad(Road):
    """Threads of this process copy objects to and from an arena of their own.

    When a call returns, nobody touches the objects. An object that is not loaded is unchanged.
    """

    def __init__(self, options: LMCacheOptions) -> None:
        """Raises: CapacityError: the machine cannot hold the arena; ConfigError: an option is wrong."""
        spec = options.spec()
        self.tiers, self.most_blocks = StagedTiers(spec, options.call_deadline), spec.num_blocks

    def store(self, pages: Sequence[PageKeys], objects: Sequence[Any]) -> list[bool]:
        return self.tiers.store(pages, lambda page, rows: copy_to_rows(parts_of(objects[page]), rows))

    def load(self, pages: Sequence[PageKeys], objects: Sequence[Any]) -> list[bool]:
        return self.tiers.load(pages, lambda page, rows: copy_from_rows(rows, parts_of(objects[page])))


class SharedRoad(Road):
    """The I/O processes work on the objects themselves.

    A call returns when no I/O process touches the objects any more, whatever the deadline: it waits until the tier has
    answered, or its process was killed and has ended. An object that is not loaded may hold anything.
    """

    def __init__(self, options: LMCacheOptions, described: Any) -> None:
        """Raises: ConfigError: an option is wrong, or LMCache's memory does not allow it."""
        block_bytes = options.spec().block_bytes
        self._pool = Pool(described, block_bytes)
        spec = options.spec(self._pool.num_blocks)
        arena = self._pool.open()
        try:
            spec.use_arena(arena)
        except BaseException:
            arena.close()
            raise
        self.tiers = self._in_place = InPlaceTiers(spec, options.call_deadline)
        self.most_blocks = parse_size("staging_bytes", options.staging_bytes) // block_bytes

    def store(self, pages: Sequence[PageKeys], objects: Sequence[Any]) -> list[bool]:
        return self._moved(pages, objects, self._in_place.store_slots)

    def load(self, pages: Sequence[PageKeys], objects: Sequence[Any]) -> list[bool]:
        return self._moved(pages, objects, self._in_place.load_slots)

    def _moved(self, pages: Sequence[PageKeys], objects: Sequence[Any], move: Move) -> list[bool]:
        """Move the objects that lie in the pool, which are all that LMCache makes."""
        slots = [self._pool.slots(memory, len(page)) for memory, page in zip(objects, pages, strict=True)]
        placed = [(index, list(own)) for index, own in enumerate(slots) if own is not None]
        moved = [False] * len(pages)
        for (index, _), is_moved in zip(
            placed, move([pages[index] for index, _ in placed], [own for _, own in placed]), strict=True
        ):
            moved[index] = is_moved
        return moved


class InPlaceTiers(StagedTiers):
    """Tiers over an arena in which the caller's pages are already."""

    def __init__(self, spec: StagingSpec, call_deadline: float) -> None:
        """Args: as `StagedTiers`."""
        super().__init__(spec, call_deadline, num_slots=0)  # the arena may have millions, which nobody takes

    def store_slots(self, pages: Sequence[PageKeys], slots: Sequence[list[int]]) -> list[bool]:
        """Store pages from their slots; return which one tier holds whole now."""
        batch = Batch(list(enumerate(slots)), is_store=True)
        deadline = time.monotonic() + self._call_deadline
        with self._request() as request:
            self._submit_store(batch, pages, deadline, request)
            self._wait_for_end(batch, deadline)
        with self._lock:
            return [batch.has(page) for page in pages]

    def load_slots(self, pages: Sequence[PageKeys], slots: Sequence[list[int]]) -> list[bool]:
        """Load pages into their slots from the first tier that has them; return which are whole and verified."""
        loaded = [False] * len(pages)
        deadline = time.monotonic() + self._call_deadline
        for guard in self._tiers:
            todo = [index for index, is_loaded in enumerate(loaded) if not is_loaded]
            if not todo or time.monotonic() > deadline:
                break
            held = self._held(guard, [pages[index] for index in todo], deadline)
            todo = [index for index, is_held in zip(todo, held, strict=True) if is_held]
            if todo:
                self._load_slots(guard, pages, slots, todo, loaded, deadline)
        return loaded

    def _load_slots(
        self,
        guard: TierGuard,
        pages: Sequence[PageKeys],
        slots: Sequence[list[int]],
        todo: Sequence[int],
        loaded: list[bool],
        deadline: float,
    ) -> None:
        batch = Batch([(index, slots[index]) for index in todo], is_store=False)
        with self._request() as request:
            with self._lock:
                self._poll()
                if guard.usable and not self._closed:
                    self._submit(batch, pages, [guard], request)
            self._wait_for_end(batch, deadline)
        with self._lock:
            for index in todo:
                loaded[index] = batch.has(pages[index])

    def _wait_for_end(self, batch: Batch, deadline: float) -> None:
        """Wait until no job of a batch runs; after the deadline, cancel what has not begun."""
        slots = {slot for _, page_slots in batch.pages for slot in page_slots}
        while True:
            with self._lock:
                self._poll()
                if not batch.num_jobs or self._closed:  # the end of the tiers has killed their processes
                    return
                if time.monotonic() > deadline and not batch.is_store:
                    for guard in self._tiers:
                        guard.cancel_unwanted(slots)
            time.sleep(POLL_SECONDS)  # a thread of the engine's; a tier without progress is killed
