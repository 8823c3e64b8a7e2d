"""Moves pages between their owner's memory and the tiers, through slots of a staging arena."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from kvtier import forks
from kvtier.abc import SecondaryTierManager
from kvtier.adapters.staging_slots import Batch, PageKeys, StagingSlots
from kvtier.events import TierState
from kvtier.keys import OffloadKey
from kvtier.secondary.chores import failed
from kvtier.spec.staging import StagingSpec
from kvtier.tiering.guarded_tier import TierGuard
from kvtier.types import Answer, AnswerState, LookupResult, ReqContext, ScheduleEndContext

T = TypeVar("T")

POLL_SECONDS = 0.0005
"""Pause between two polls of tiers that are working."""
EPOCH_BYTES = 8
_STEP = ScheduleEndContext()

Copy = Callable[[int, Sequence[memoryview]], None]
"""Called with the index of a page and the arena's rows for it, one per key: it fills them, or takes their bytes."""


class StagedTiers:
    """The tiers of an engine with a cache of its own.

    Several threads may call it at once; each call ends within its deadline.

    The owner's memory is touched only by the calling thread, and only until the call returns. The arena's slots belong
    to a job until the tier has answered it, also after the call has given up: a late write damages nobody's page.
    """

    def __init__(self, spec: StagingSpec, call_deadline: float, num_slots: int | None = None) -> None:
        """Create the arena and start the tiers. Takes ownership of `spec`.

        Args:
            call_deadline: longest time that a call waits, in seconds.
            num_slots: of the arena, that calls take; None for all.

        Raises:
            CapacityError: the machine cannot hold the arena.
        """
        self._spec, self._call_deadline = spec, call_deadline
        self._arena = spec.arena
        self._tiers = spec.open_tiers()
        self._unchecked_lock = threading.Lock()
        self._slots = StagingSlots(spec.num_blocks if num_slots is None else num_slots)
        self._batches: dict[int, Batch] = {}
        self._pins: dict[OffloadKey, list[tuple[TierGuard, PageKeys]]] = {}
        """By a page's first key: the tiers that have pinned it, one entry per pin."""
        self._numbers = itertools.count()
        self._closed = False
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, find nothing and move nothing. A thread of the parent may have held the lock."""
        self._unchecked_lock = threading.Lock()
        self._closed = True

    @property
    def _lock(self) -> threading.Lock:
        """Guards the state, and every call of the tiers; nobody waits or copies while holding it."""
        forks.notice()
        return self._unchecked_lock

    @property
    def block_bytes(self) -> int:
        """Bytes in one slot, and in one block of a tier."""
        return self._spec.block_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes in the arena. A larger page can never be moved."""
        return self._spec.num_blocks * self._spec.block_bytes

    # -- calls of any thread ------------------------------------------------------------------------------

    def contains(
        self, pages: Sequence[PageKeys], *, pin: bool = False, among: Collection[int] | None = None
    ) -> list[bool]:
        """Return, per page, whether one tier holds all of it. A tier that does not answer in time holds nothing.

        Args:
            pin: whether the tiers keep the pages that are found from eviction, until `unpin`.
            among: indices of the tiers to ask; None for all.
        """
        found = [False] * len(pages)
        deadline = time.monotonic() + self._call_deadline
        for guard in self._tiers:
            if among is not None and guard.index not in among:
                continue
            asked = [index for index, is_found in enumerate(found) if not is_found]
            held = self._held(guard, [pages[index] for index in asked], deadline, pin=pin)
            for index, is_held in zip(asked, held, strict=True):
                found[index] = is_held
            if all(found):
                break
        return found

    def gone(self, pages: Sequence[PageKeys]) -> list[bool]:
        """Return, per page, whether certainly no tier holds all of it. One that is down, or late, may hold any page."""
        gone = [True] * len(pages)
        for index in range(len(self._tiers)):
            left = [number for number, is_gone in enumerate(gone) if is_gone]
            held = self._told_by(index, [key for number in left for key in pages[number]])
            for number in left:
                gone[number] = held is not None and not held.issuperset(pages[number])
        return gone

    def _told_by(self, index: int, keys: Sequence[OffloadKey]) -> frozenset[OffloadKey] | None:
        """Return those of `keys` that a tier may hold; None if it does not say."""
        guard = self._tiers[index]
        nothing: Answer[Collection[OffloadKey]] | None = failed()
        if not keys:
            return frozenset()
        with self._lock:
            self._poll()
            if not guard.usable or self._closed:
                return None
            answer = guard.ask("ask_held", nothing, guard.tier.ask_held, keys)
            if answer is None:
                return self._found_by_index(guard, keys)
        held = self.ask(index, "ask_held", lambda _: answer)
        return None if held is None else frozenset(held)

    def _found_by_index(self, guard: TierGuard, keys: Sequence[OffloadKey]) -> frozenset[OffloadKey] | None:
        request = self._new_request("ask")
        held = [key for key in keys if guard.lookup(key, request) is not LookupResult.MISS]
        guard.forget_request(request)
        return frozenset(held) if guard.usable else None

    def unpin(self, pages: Sequence[PageKeys]) -> None:
        """Undo one pin of each of `pages`; pages that are not pinned are ignored."""
        with self._lock:
            for page in pages:
                self._unpin_one(page)

    def store(self, pages: Sequence[PageKeys], fill: Copy) -> list[bool]:
        """Copy pages to every tier that takes them; return, per page, whether a tier has all of it."""
        with self._request() as request:
            return self._store(pages, fill, request)

    def _store(self, pages: Sequence[PageKeys], fill: Copy, request: ReqContext) -> list[bool]:
        stored = [False] * len(pages)
        deadline = time.monotonic() + self._call_deadline
        todo = list(range(len(pages)))
        while todo and time.monotonic() < deadline:
            with self._lock:
                self._poll()
                usable = [guard for guard in self._tiers if guard.usable]
                is_waiting = not usable and self._is_starting()
                batch = self._slots.take([(index, len(pages[index])) for index in todo], is_store=True)
                rows = self._rows(batch) if usable else []
            if not usable and not is_waiting:
                self._give_back(batch)
                break
            if not usable or batch is None:
                self._give_back(batch)
                time.sleep(POLL_SECONDS)  # a thread of the engine's, with a deadline: another call's slots come free
                continue
            todo = todo[len(batch.pages) :]
            with self._kept_on_success(batch):
                for (index, _), rows_of_page in zip(batch.pages, rows, strict=True):
                    fill(index, rows_of_page)
            self._submit_store(batch, pages, deadline, request)
            self._wait(batch, deadline)
            with self._lock:
                for index, _ in batch.pages:
                    stored[index] = batch.has(pages[index])
        return stored

    def load(self, pages: Sequence[PageKeys], take: Copy) -> list[bool]:
        """Copy pages from the first tier that has them, whole and verified; return which were copied."""
        loaded = [False] * len(pages)
        deadline = time.monotonic() + self._call_deadline
        with self._request() as request:
            for guard in self._tiers:
                todo = [index for index, is_loaded in enumerate(loaded) if not is_loaded]
                if not todo:
                    break
                held = self._held(guard, [pages[index] for index in todo], deadline)
                todo = [index for index, is_held in zip(todo, held, strict=True) if is_held]
                self._load_from(guard, pages, todo, take, loaded, deadline, request)
        return loaded

    @property
    def names(self) -> list[str]:
        """The tiers' names, in the order in which they are asked."""
        return [guard.name for guard in self._tiers]

    def chores(self, index: int) -> tuple[bool, bool]:
        """Return whether a tier deletes, and whether it lists its keys."""
        tier = self._tiers[index].tier
        return tier.deletes, tier.lists_keys

    def ask(self, index: int, what: str, question: Callable[[SecondaryTierManager], Answer[T]]) -> T | None:
        """Ask one tier, and wait for its answer; None if it fails, is not up, or does not answer in time.

        Args:
            what: name of the tier's method, for the log.
        """
        guard, answer = self._tiers[index], None
        deadline = time.monotonic() + self._call_deadline
        while True:
            with self._lock:
                self._poll()
                if answer is None and guard.usable:
                    answer = guard.ask(what, None, question, guard.tier)
                    if answer is None:
                        return None
                if answer is not None and answer.state is not AnswerState.OPEN:
                    return answer.value
                is_starting = guard.describe()[0] is TierState.STARTING
                if self._closed or time.monotonic() > deadline or (answer is None and not is_starting):
                    return None
            time.sleep(POLL_SECONDS)  # a thread of the engine's, with a deadline: a tier answers

    def start_epoch(self) -> None:
        """Make every page stored so far miss."""
        with self._lock:
            if not self._closed:
                self._tiers.drain()
                self._poll()
                self._tiers.start_epoch(os.urandom(EPOCH_BYTES))

    def wait_until_started(self, timeout: float) -> dict[str, tuple[TierState, str]]:
        """Wait until no tier is starting, at most `timeout` seconds; return each tier's state and the reason for it."""
        deadline = time.monotonic() + timeout
        while True:
            with self._lock:
                self._poll()
                states = self._tiers.states()
            if all(state is not TierState.STARTING for state, _ in states.values()) or time.monotonic() > deadline:
                return states
            time.sleep(POLL_SECONDS)  # the caller has asked to wait

    def states(self) -> dict[str, tuple[TierState, str]]:
        """Return each tier's state and the reason for it."""
        return self.wait_until_started(0)

    def take_removed(self) -> list[OffloadKey]:
        """Return the keys of blocks that tiers with an index have evicted or lost since the last call.

        If nobody calls it, they keep a bounded number of such events.
        """
        with self._lock:
            self._poll()
            return (
                []
                if self._closed
                else [key for event in self._tiers.take_events() if event.removed for key in event.keys]
            )

    def readings(self) -> dict[str, float]:
        """Return kvtier's metrics of the tiers, by name."""
        with self._lock:
            return {} if self._closed else self._tiers.stats()

    def close(self) -> None:
        """End the tiers and release the arena; idempotent. Calls of other threads return misses from now on."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._tiers.shutdown()
            self._spec.shutdown()

    def check_invariants(self) -> None:
        """Raise InvariantError if a slot is used twice or lost. No other call may be running."""
        with self._lock:
            if self._closed:
                return
            self._tiers.check_invariants()
            self._slots.check_invariants(set(self._batches.values()))

    # -- lookups ------------------------------------------------------------------------------------------

    def _held(self, guard: TierGuard, pages: Sequence[PageKeys], deadline: float, *, pin: bool = False) -> list[bool]:
        """Return which pages a tier holds, as far as it says so in time. They are pinned as soon as they are found."""
        request = self._new_request("ask")
        held = [False] * len(pages)
        asked = dict.fromkeys(range(len(pages)))
        pins: list[tuple[list[int], Answer[Collection[OffloadKey]]]] = []
        begun = time.monotonic()
        while True:
            with self._lock:
                self._poll()
                fresh = []
                for index in list(asked):
                    answers = {guard.lookup(key, request) for key in pages[index]}
                    if LookupResult.MISS in answers or answers == {LookupResult.HIT}:
                        held[index] = LookupResult.MISS not in answers
                        del asked[index]
                        fresh += [index] if held[index] else []
                if pin and fresh and (answer := self._pin(guard, [pages[index] for index in fresh])):
                    pins.append((fresh, answer))
                pins = [
                    (found, answer) for found, answer in pins if not self._settle(guard, pages, held, found, answer)
                ]
                now = time.monotonic()
                is_late = now > deadline or now - begun > guard.patience.seconds
                if (not asked and (not pins or is_late)) or self._closed:
                    guard.forget_request(request)
                    return held
                # The question stays open after a wait in vain: it tells when the tier answers again.
                if asked:
                    guard.patience.ask(pages[next(iter(asked))][0], request)
                if asked and is_late:
                    guard.patience.give_up()
                    return held
            time.sleep(POLL_SECONDS)  # a thread of the engine's, with a deadline: a tier answers

    def _pin(self, guard: TierGuard, pages: Sequence[PageKeys]) -> Answer[Collection[OffloadKey]] | None:
        """Pin pages in a tier; return what to wait for. The caller holds the lock."""
        answer = guard.ask("pin", None, guard.tier.pin, [key for page in pages for key in page])
        for page in pages:
            self._pins.setdefault(page[0], []).append((guard, page))
        return answer

    def _settle(
        self,
        guard: TierGuard,
        pages: Sequence[PageKeys],
        held: list[bool],
        found: Sequence[int],
        answer: Answer[Collection[OffloadKey]],
    ) -> bool:
        """Return whether a tier has said which of the pinned pages it holds; the others are not held, nor pinned."""
        if answer.state is AnswerState.OPEN:
            return False
        if answer.value is None:
            return True  # it cannot tell: as far as it knew when it was asked, they are there
        kept = frozenset(answer.value)
        for index in found:
            if not kept.issuperset(pages[index]):
                held[index] = False
                self._unpin_one(pages[index], guard)
        return True

    def _unpin_one(self, page: PageKeys, guard: TierGuard | None = None) -> None:
        """Undo a pin of a page, if there is one: that of `guard` if nobody else has just taken it, else the latest."""
        pins = self._pins.get(page[0])
        if pins is None:
            return
        wanted = (guard, page)
        pinning, pinned = pins.pop(pins.index(wanted) if wanted in pins else -1)
        if not pins:
            del self._pins[page[0]]
        pinning.tell("unpin", pinning.tier.unpin, pinned)

    # -- moving -------------------------------------------------------------------------------------------

    def _load_from(
        self,
        guard: TierGuard,
        pages: Sequence[PageKeys],
        todo: list[int],
        take: Copy,
        loaded: list[bool],
        deadline: float,
        request: ReqContext,
    ) -> None:
        while todo and time.monotonic() < deadline:
            with self._lock:
                self._poll()
                if not guard.usable:
                    return
                batch = self._slots.take([(index, len(pages[index])) for index in todo], is_store=False)
                rows = self._rows(batch)
            if batch is None:
                time.sleep(POLL_SECONDS)  # as in `store`: another call's slots come free
                continue
            todo = todo[len(batch.pages) :]
            with self._lock:
                self._submit(batch, pages, [guard], request)
            if not self._wait(batch, deadline, on_end=False):
                return
            with self._kept_on_success(batch):
                for (index, _), rows_of_page in zip(batch.pages, rows, strict=True):
                    if batch.has(pages[index]):
                        take(index, rows_of_page)
                        loaded[index] = True
            self._give_back(batch)

    def _submit(
        self, batch: Batch, pages: Sequence[PageKeys], guards: Sequence[TierGuard], request: ReqContext
    ) -> None:
        """Give a batch to tiers. The caller holds the lock."""
        keys = [key for index, _ in batch.pages for key in pages[index]]
        slots = [slot for _, page_slots in batch.pages for slot in page_slots]
        for guard in guards:
            job = guard.open_job(keys, slots, request, is_promotion=not batch.is_store)
            if guard.hand_over(job):
                batch.num_jobs += 1
                self._batches[job.job_id] = batch

    def _submit_store(self, batch: Batch, pages: Sequence[PageKeys], deadline: float, request: ReqContext) -> None:
        """Give a filled batch to every tier that takes it now; if all of them are busy or starting, wait for one."""
        num_blocks = sum(len(slots) for _, slots in batch.pages)
        while True:
            with self._lock:
                self._poll()
                takers = [guard for guard in self._tiers if guard.can_store(num_blocks)]
                if takers:
                    self._submit(batch, pages, takers, request)
                    return
                may_come = any(guard.usable for guard in self._tiers) or self._is_starting()
                if self._closed or time.monotonic() > deadline or not may_come:
                    return
            time.sleep(POLL_SECONDS)  # a thread of the engine's, with a deadline: a tier takes jobs again

    def _wait(self, batch: Batch, deadline: float, *, on_end: bool = True) -> bool:
        """Wait until all jobs of a batch have ended; return whether they did.

        Args:
            on_end: whether the slots become free then. After the deadline they become free when the last job ends.
        """
        while True:
            with self._lock:
                self._poll()
                if not batch.num_jobs:
                    if on_end:
                        self._slots.release(batch)
                    return True
                if time.monotonic() > deadline or self._closed:
                    batch.is_abandoned = True
                    if not batch.is_store:
                        slots = {slot for _, page_slots in batch.pages for slot in page_slots}
                        for guard in self._tiers:
                            guard.cancel_unwanted(slots)
                    return False
            time.sleep(POLL_SECONDS)  # a thread of the engine's, with a deadline: the jobs end

    def _poll(self) -> None:
        """Take the results of all tiers. The caller holds the lock."""
        if self._closed:
            return
        self._tiers.end_step(_STEP)
        for guard in self._tiers:
            for job in guard.poll():
                batch = self._batches.pop(job.job_id, None)
                if batch is None:
                    continue
                batch.done.append(frozenset(job.successful))
                batch.num_jobs -= 1
                if batch.is_abandoned and not batch.num_jobs:
                    self._slots.release(batch)

    def _is_starting(self) -> bool:
        return any(state is TierState.STARTING for state, _ in self._tiers.states().values())

    @contextmanager
    def _request(self) -> Iterator[ReqContext]:
        """Yield a request of which the tiers know; at its end they order its blocks, to evict tails first."""
        with self._lock:
            request = self._new_request("move")
            self._tiers.announce(request)
        try:
            yield request
        finally:
            with self._lock:
                if not self._closed:
                    self._tiers.forget(request)

    def _new_request(self, what: str) -> ReqContext:
        return ReqContext(f"staged-{what}-{next(self._numbers)}")

    # -- slots --------------------------------------------------------------------------------------------

    def _give_back(self, batch: Batch | None) -> None:
        if batch is not None:
            with self._lock:
                self._slots.release(batch)

    @contextmanager
    def _kept_on_success(self, batch: Batch) -> Iterator[None]:
        """Free the slots of a batch that no job uses if a copy from or to the owner's memory raises."""
        try:
            yield
        except BaseException:
            self._give_back(batch)
            raise

    def _rows(self, batch: Batch | None) -> list[list[memoryview]]:
        """Return the arena's rows for each page of a batch. They stay mapped if the arena is closed meanwhile."""
        return [] if batch is None else [[self._arena.row(slot) for slot in slots] for _, slots in batch.pages]
