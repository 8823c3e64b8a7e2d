"""Copies the blocks of one tier to another, through slots of an arena, as an engine would: verified and counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvtier.abc import SecondaryTierManager
from kvtier.errors import StoreUnavailableError
from kvtier.events import BlocksFailed, Event, TierState
from kvtier.foreign_text import one_line
from kvtier.keys import OffloadKey
from kvtier.types import (
    AnswerState,
    FailureCause,
    JobMetadata,
    JobResult,
    KeyPage,
    LookupResult,
    ReqContext,
    ScheduleEndContext,
)

KEYS_PER_PAGE = 256
_PAUSE_SECONDS = 0.0005
"""Between two polls of a tier: a process of its own does the work."""
_REQUEST, _STEP = ReqContext("warm"), ScheduleEndContext()
_FULL = FailureCause.NO_SPACE


@dataclass
class Copied:
    """What was done.

    Attributes:
        blocks: copied now.
        present: blocks that the destination had.
        no_room: blocks that the destination has no room for.
        failed: blocks that could not be copied, by tier and cause. Corrupt ones are among them.
    """

    blocks: int = 0
    bytes: int = 0
    present: int = 0
    no_room: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def num_failed(self) -> int:
        """Number of blocks that could not be copied."""
        return self.failed.total()


class Failures:
    """An observer that counts why blocks failed in one tier."""

    def __init__(self) -> None:
        self.causes: Counter[FailureCause] = Counter()

    def on_event(self, event: Event) -> None:
        """Count the blocks that an event says have failed."""
        if isinstance(event, BlocksFailed):
            self.causes[event.cause] += event.num_blocks


class Move(NamedTuple):
    """Blocks on their way to or from a tier; `causes_before`: why blocks had failed there before."""

    keys: Sequence[OffloadKey]
    job_id: int
    causes_before: Counter[FailureCause]


class Tier:
    """A tier with its failures; waits for what it is asked."""

    def __init__(self, name: str, manager: SecondaryTierManager, failures: Failures, foreign_bytes: int = 0) -> None:
        """Args: foreign_bytes: of its capacity, which blocks of others take."""
        self.name = name
        self.manager = manager
        self.failures = failures
        self.foreign_bytes = foreign_bytes
        self._results: dict[int, JobResult] = {}
        self._next_id = 1

    def start(self) -> None:
        """Start the tier, and wait until it can be used.

        Raises:
            StoreUnavailableError: it cannot; the message says why.
        """
        self.manager.start()
        self._wait(lambda: self.manager.state is TierState.UP)

    def pages(self) -> Iterator[Sequence[OffloadKey]]:
        """Yield pages of the keys that the tier holds.

        Raises:
            StoreUnavailableError: it cannot list them.
        """
        cursor: bytes | None = b""
        while cursor is not None:
            page = self._page(cursor)
            yield page.keys
            cursor = page.cursor

    def _page(self, cursor: bytes) -> KeyPage:
        answer = self.manager.list_keys(cursor, KEYS_PER_PAGE)
        self._wait(lambda: answer.state is not AnswerState.OPEN)
        if answer.value is None:
            raise StoreUnavailableError(f"{self.name}: its blocks cannot be listed; on a server, is SCAN denied?")
        return answer.value

    def missing(self, keys: Sequence[OffloadKey]) -> list[OffloadKey]:
        """Return those of `keys` that the tier does not hold."""
        answers: dict[OffloadKey, LookupResult] = {}

        def is_known() -> bool:
            for key in keys:
                if answers.get(key, LookupResult.RETRY) is LookupResult.RETRY:
                    answers[key] = self.manager.lookup(key, _REQUEST)
            return LookupResult.RETRY not in answers.values()

        self._wait(is_known)
        return [key for key in keys if answers[key] is not LookupResult.HIT]

    def begin(self, keys: Sequence[OffloadKey], first_slot: int, load: bool) -> Move:
        """Begin to load blocks into neighbouring slots, or to store them from there."""
        slots = np.arange(first_slot, first_slot + len(keys), dtype=np.int32)
        job, self._next_id = JobMetadata(self._next_id, keys, slots, load, _REQUEST), self._next_id + 1
        move = Move(keys, job.job_id, self.failures.causes.copy())
        (self.manager.submit_load if load else self.manager.submit_store)(job)
        return move

    def end(self, move: Move, failed: Counter[str]) -> list[bool]:
        """Wait for a move; return per block whether it succeeded, and count by cause in `failed` those that did not."""
        self._wait(lambda: move.job_id in self._results)
        result = self._results.pop(move.job_id)
        successful = move.keys if result.success else result.successful_keys or ()
        results = [key in successful for key in move.keys]
        num_failed = results.count(False)
        causes = self.failures.causes - move.causes_before
        for cause, count in causes.items():
            failed[f"{self.name}: {cause.value}"] += min(count, num_failed)
        if unexplained := num_failed - causes.total():
            failed[f"{self.name}: no reason given"] += max(0, unexplained)
        return results

    def room(self, block_bytes: int) -> int | None:
        """Return how many blocks fit without any that gives way; None if the tier does not say."""
        if _FULL in self.failures.causes:
            return 0  # it has refused blocks for lack of space
        stats = self.manager.get_stats()
        limits = []
        for unit, size, taken in (("blocks", 1, 0), ("bytes", block_bytes, self.foreign_bytes)):
            capacity, held = stats.get(f"capacity_{unit}"), stats.get(unit)
            if capacity and held is not None:
                limits.append(int(capacity - held - taken) // size)
        return max(0, min(limits)) if limits else None

    def _wait(self, condition: Callable[[], bool]) -> None:
        while True:
            for result in self.manager.get_finished_jobs():
                self._results[result.job_id] = result
            if condition():
                return
            self.manager.on_schedule_end(_STEP)
            if self.manager.state in (TierState.DOWN, TierState.CLOSED):
                raise StoreUnavailableError(f"{self.name}: {one_line(self.manager.state_reason) or 'down'}")
            time.sleep(_PAUSE_SECONDS)


class Copier:
    """Copies all blocks of a source that a destination does not have, as long as it has room.

    A disk with several directories is as many tiers here: each is full by itself.
    """

    def __init__(
        self, sources: Sequence[Tier], targets: Sequence[Tier], view: memoryview, rate: int | None = None
    ) -> None:
        """Args:
        view: the slots, shape (num_slots, block_bytes).
        rate: bytes per second; None for no limit.
        """
        self._sources, self._targets, self._view = sources, targets, view
        shape = np.asarray(view).shape
        self._num_slots, self._block_bytes = shape[0], shape[1]
        self._rate = rate
        self.copied = Copied()

    def run(self, progress: Callable[[Copied], None]) -> Copied:
        """Copy, and return what was done. `progress` is called after each batch.

        Raises:
            StoreUnavailableError: a tier goes down meanwhile.
        """
        start = time.monotonic()
        for source in self._sources:
            for page in source.pages():
                missing = page
                for target in self._targets:
                    missing = target.missing(missing)
                self.copied.present += len(page) - len(missing)
                for first in range(0, len(missing), self._num_slots):
                    self._copy(source, missing[first : first + self._num_slots])
                    self.copied.seconds = time.monotonic() - start
                    progress(self.copied)
                    self._keep_rate()
        self.copied.seconds = time.monotonic() - start
        return self.copied

    def _copy(self, source: Tier, keys: Sequence[OffloadKey]) -> None:
        shares = self._shares(len(keys))
        num_fitting = sum(count for _, count in shares)
        self.copied.no_room += len(keys) - num_fitting
        keys = keys[:num_fitting]
        if not keys:
            return
        loaded = source.end(source.begin(keys, 0, load=True), self.copied.failed)
        # stored slots are neighbours, so what was loaded moves together
        self._close_gaps(loaded)
        good = [key for key, success in zip(keys, loaded, strict=True) if success]
        moves, first = [], 0
        for target, count in shares:
            if part := good[first : first + count]:
                moves.append((target, target.begin(part, first, load=False)))
            first += count
        stored = sum(sum(target.end(move, self.copied.failed)) for target, move in moves)
        self.copied.blocks += stored
        self.copied.bytes += stored * self._block_bytes

    def _shares(self, count: int) -> list[tuple[Tier, int]]:
        """Divide blocks among the targets, equally as far as they have room."""
        rooms = [(count if room is None else room, target) for target, room in self._rooms()]
        shares, left = [], count
        for index, (room, target) in enumerate(sorted(rooms, key=lambda one: one[0])):
            share = min(room, -(-left // (len(rooms) - index)))
            shares.append((target, share))
            left -= share
        return shares

    def _rooms(self) -> list[tuple[Tier, int | None]]:
        return [(target, target.room(self._block_bytes)) for target in self._targets]

    def _close_gaps(self, loaded: Sequence[bool]) -> None:
        if all(loaded):
            return
        slots = np.asarray(self._view)
        for place, slot in enumerate(np.flatnonzero(loaded)):
            if place != slot:
                slots[place] = slots[slot]

    def _keep_rate(self) -> None:
        if self._rate:
            time.sleep(max(0.0, self.copied.bytes / self._rate - self.copied.seconds))
