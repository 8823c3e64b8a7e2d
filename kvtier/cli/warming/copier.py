"""Copies the blocks of one tier to another, through slots of an arena, as an engine would: verified and counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

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
_FULL = frozenset({FailureCause.NO_SPACE})


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


class Tier:
    """A started tier with its failures; waits for what it is asked."""

    def __init__(self, name: str, manager: SecondaryTierManager, failures: Failures) -> None:
        self.name = name
        self.manager = manager
        self.failures = failures
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

    def move(self, keys: Sequence[OffloadKey], load: bool) -> list[bool]:
        """Load blocks into the first slots, or store them from there; return per block whether that succeeded."""
        slots = np.arange(len(keys), dtype=np.int32)
        job, self._next_id = JobMetadata(self._next_id, keys, slots, load, _REQUEST), self._next_id + 1
        (self.manager.submit_load if load else self.manager.submit_store)(job)
        self._wait(lambda: job.job_id in self._results)
        result = self._results.pop(job.job_id)
        successful = keys if result.success else result.successful_keys or ()
        return [key in successful for key in keys]

    def room(self, block_bytes: int, foreign_bytes: int) -> int | None:
        """Return how many blocks fit without any that gives way; None if the tier does not say."""
        stats = self.manager.get_stats()
        limits = []
        for unit, size, taken in (("blocks", 1, 0), ("bytes", block_bytes, foreign_bytes)):
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
    """Copies all blocks of a source that a destination does not have, as long as it has room."""

    def __init__(
        self, source: Tier, target: Tier, view: memoryview, foreign_bytes: int = 0, rate: int | None = None
    ) -> None:
        """Args:
        view: the slots, shape (num_slots, block_bytes).
        foreign_bytes: of the destination's capacity, which blocks of others take.
        rate: bytes per second; None for no limit.
        """
        self._source, self._target, self._view = source, target, view
        shape = np.asarray(view).shape
        self._num_slots, self._block_bytes = shape[0], shape[1]
        self._foreign_bytes = foreign_bytes
        self._rate = rate
        self.copied = Copied()

    def run(self, progress: Callable[[Copied], None]) -> Copied:
        """Copy, and return what was done. `progress` is called after each batch.

        Raises:
            StoreUnavailableError: a tier goes down meanwhile.
        """
        start = time.monotonic()
        for page in self._source.pages():
            missing = self._target.missing(page)
            self.copied.present += len(page) - len(missing)
            for first in range(0, len(missing), self._num_slots):
                self._copy(missing[first : first + self._num_slots])
                self.copied.seconds = time.monotonic() - start
                progress(self.copied)
                self._keep_rate()
        self.copied.seconds = time.monotonic() - start
        return self.copied

    def _copy(self, keys: Sequence[OffloadKey]) -> None:
        room = self._target.room(self._block_bytes, self._foreign_bytes)
        if self._target.failures.causes.keys() & _FULL:
            room = 0  # it has refused blocks for lack of space
        if room is not None and room < len(keys):
            self.copied.no_room += len(keys) - room
            keys = keys[:room]
        if not keys:
            return
        loaded = self._counted(self._source, keys, load=True)
        # stored slots are the first ones, so what was loaded moves together
        self._close_gaps(loaded)
        good = [key for key, success in zip(keys, loaded, strict=True) if success]
        if not good:
            return
        stored = self._counted(self._target, good, load=False)
        self.copied.blocks += sum(stored)
        self.copied.bytes += sum(stored) * self._block_bytes

    def _close_gaps(self, loaded: Sequence[bool]) -> None:
        if all(loaded):
            return
        slots = np.asarray(self._view)
        for place, slot in enumerate(np.flatnonzero(loaded)):
            if place != slot:
                slots[place] = slots[slot]

    def _counted(self, tier: Tier, keys: Sequence[OffloadKey], load: bool) -> list[bool]:
        """Move blocks, and count those that fail by cause."""
        before = tier.failures.causes.copy()
        results = tier.move(keys, load)
        num_failed = results.count(False)
        causes = tier.failures.causes - before
        for cause, count in causes.items():
            self.copied.failed[f"{tier.name}: {cause.value}"] += min(count, num_failed)
        if unexplained := num_failed - causes.total():
            self.copied.failed[f"{tier.name}: no reason given"] += max(0, unexplained)
        return results

    def _keep_rate(self) -> None:
        if self._rate:
            time.sleep(max(0.0, self.copied.bytes / self._rate - self.copied.seconds))
