"""Keeps a tier's executor running: starts it, notices when it dies or hangs, ends it, waits, and starts the next one.

Rule: an executor's jobs get failed results only after it is certain that the executor does not touch the arena any
more. Until then the tier is DOWN, and no other executor starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum

from kvtier.clock import Clock
from kvtier.errors import InvariantError, StoreUnavailableError
from kvtier.events import TierState
from kvtier.executors.base import Ended, IOExecutor, Report
from kvtier.executors.protocol import ChoreDone, IndexEnd, PartResult, Prepared, ProbeAnswer, Unavailable, Usage
from kvtier.secondary.jobs import JobLedger
from kvtier.secondary.settings import Deadlines
from kvtier.secondary.standing import Breaker, BreakerState, Standing

_BUSY = "its medium is busy and asks for fewer requests: stores pause, loads go on"
_NO_STORES = "stores failed one after the other: its blocks can be loaded, and kvtier tries again to store"


class _Phase(Enum):
    IDLE = "idle"
    OPENING = "opening"
    WORKING = "working"
    ENDING = "ending"
    WAITING = "waiting"
    CLOSED = "closed"


# In CPython 3.11, reading a member of an enum class costs 0.1 us; these run in every step.
_OPENING, _WORKING, _ENDING, _WAITING = _Phase.OPENING, _Phase.WORKING, _Phase.ENDING, _Phase.WAITING
_OPEN = BreakerState.OPEN
_WHILE_WORKING = (PartResult, ProbeAnswer, Prepared, Usage, ChoreDone)
"""Reports that an executor may send after its store is open."""


class Supervisor:
    """Runs one executor after the other. An executor's time from start to end is a *life*.

    Attributes:
        executor: the present executor; None between two lives.
    """

    def __init__(
        self,
        make_executor: Callable[[], IOExecutor],
        ledger: JobLedger,
        standing: Standing,
        store_breaker: Breaker,
        clock: Clock,
        deadlines: Deadlines,
        on_life_ended: Callable[[], None],
    ) -> None:
        """Args:
        standing: of the tier. It is UP exactly while jobs are accepted.
        store_breaker: of store jobs alone: a medium that cannot be written may still be read.
        on_life_ended: called when an executor certainly does not touch the arena any more; it fails the jobs.
        """
        self._make_executor = make_executor
        self._ledger = ledger
        self._standing = standing
        self._store_breaker = store_breaker
        self._clock = clock
        self._deadlines = deadlines
        self._on_life_ended = on_life_ended
        self.executor: IOExecutor | None = None
        self._phase = _Phase.IDLE
        self._progress_at = 0.0
        self._watched_at = 0.0
        self._gap = 0.0
        self._suspected_at: float | None = None
        self._kill_at = math.inf
        self._begin_when_ended = False

    @property
    def works(self) -> bool:
        """Whether jobs and probes are accepted now, which is the same as the tier being UP."""
        return self._phase is _WORKING and self._standing.is_trusted

    @property
    def num_breaker_openings(self) -> int:
        """How often one of the two breakers has opened."""
        return self._standing.breaker.num_openings + self._store_breaker.num_openings

    @property
    def is_idle(self) -> bool:
        """Whether `start` was never called."""
        return self._phase is _Phase.IDLE

    @property
    def has_executor(self) -> bool:
        """Whether an executor may still touch the arena."""
        return self.executor is not None

    def start(self) -> None:
        """Begin the first life."""
        if self._phase is _Phase.IDLE:
            self._begin()

    def attend(self) -> IOExecutor | None:
        """Do what is due; return the executor for the tier to poll, None if it cannot have reports."""
        now = self._clock()
        self._gap, self._watched_at = now - self._watched_at, now
        if self._phase is _WORKING:
            if self._standing.breaker.state is _OPEN and self._standing.breaker.try_again():
                self._standing.change(TierState.UP, "trying again")
        elif self._phase is _ENDING:
            self._check_end()
        if self._phase is _WAITING and self._standing.breaker.try_again():
            self._begin()
        if self._store_breaker.state is _OPEN:
            self._store_breaker.try_again()
        return self.executor if self._phase is _WORKING or self._phase is _OPENING else None

    def heed(self, reports: list[Report]) -> list[Report]:
        """Handle reports about the executor itself; return those that the tier must handle."""
        if not reports:
            return reports
        self._progress_at = self._clock()
        kept: list[Report] = []
        for report in reports:
            if isinstance(report, Unavailable):
                self._go_down(report.reason, kill=False)
                break
            if isinstance(report, Ended):
                self.fail(report.reason)
                break
            opening = not isinstance(report, _WHILE_WORKING)
            if opening is not (self._phase is _OPENING):
                self.fail(f"I/O process sent an invalid message: {type(report).__name__} out of turn")
                break
            if isinstance(report, IndexEnd):
                self._phase = _WORKING
                self._standing.change(TierState.UP)
            kept.append(report)
        return kept

    def fail(self, reason: str) -> None:
        """Set the tier DOWN and kill the executor. Its jobs get results when it has ended."""
        self._go_down(reason, kill=True)

    def job_ended(self, served: bool, broken: bool, *, is_store: bool = False) -> None:
        """Count a finished job in the breakers. Failed stores stop stores only, not loads.

        Args:
            served: a block was moved.
            broken: blocks failed with I/O errors.
        """
        if served:
            if self._standing.breaker.succeed():
                self._standing.recover()
            if is_store and self._store_breaker.succeed() and self.works:
                self._standing.recover()
                self._standing.change(TierState.UP, "it stores again")
        elif broken and is_store:
            if self._store_breaker.fail() and self.works:
                self._standing.change(TierState.UP, _NO_STORES, warn=True)
        elif broken:
            self._standing.fail("jobs failed one after the other")

    def question_expired(self) -> None:
        """Learn that a probe was not answered within `deadlines.job`. If there was no other report either, it is a
        hang.
        """
        if self._clock() - self._progress_at >= self._deadlines.job:
            self.fail("its probes were not answered")
        else:
            self.job_ended(served=False, broken=True)

    def pause_stores(self) -> None:
        """Accept no stores for a while, because the medium is busy. The tier stays UP."""
        if self._store_breaker.state is not _OPEN:
            self._store_breaker.open()
            if self.works:
                self._standing.change(TierState.UP, _BUSY, warn=True)

    def restart(self) -> None:
        """Let the executor end by itself, then start another one at once: the namespace has changed."""
        if self._phase in (_Phase.OPENING, _Phase.WORKING):
            self._begin_when_ended = True
            self._standing.change(TierState.STARTING, "new epoch")
            self._end(kill=False)

    def close(self) -> None:
        """End for good. The tier must poll until `has_executor` is False."""
        self._standing.change(TierState.CLOSED)
        self._begin_when_ended = False
        if self._phase in (_Phase.OPENING, _Phase.WORKING):
            self._end(kill=False)
        elif self._phase is not _Phase.ENDING:
            self._phase = _Phase.CLOSED

    def leave_to_parent(self) -> None:
        """In a forked child, be closed: the executor belongs to the parent, and no other one starts."""
        self._standing.leave_to_parent()
        self._ledger.forget()
        self._phase, self.executor = _Phase.CLOSED, None

    def kill(self) -> None:
        """Kill the executor, which was told to end before."""
        if self.executor is not None:
            self.executor.kill()

    def _begin(self) -> None:
        executor = self._make_executor()
        self._begin_when_ended = False
        self._standing.breaker.try_now()
        self._store_breaker.try_now()
        self._progress_at = self._clock()
        try:
            executor.start()
        except StoreUnavailableError as error:
            self._phase = _Phase.WAITING
            self._standing.lose(str(error))
            return
        self.executor = executor
        self._phase = _Phase.OPENING

    def check_hang(self) -> None:
        """Kill the executor if it hangs. Called after all reports have been handled.

        If the engine has not called for long, requests may be unsent and reports unread although nothing hangs. So
        after such a gap, a missed deadline is extended a little.
        """
        if self._phase is _WORKING and not self._ledger.num_jobs:
            self._suspected_at = None
            return
        now = self._clock()
        reason, grace = self._find_hang(now)
        if reason is None:
            self._suspected_at = None
        elif self._suspected_at is None and self._gap > grace:
            self._suspected_at = now
        elif self._suspected_at is None or now - self._suspected_at >= grace:
            self._suspected_at = None
            self.fail(reason)

    def _find_hang(self, now: float) -> tuple[str | None, float]:
        """Return why the executor hangs (None if it does not), and the extension after a gap, in seconds."""
        deadlines = self._deadlines
        grace = min(1.0, deadlines.job / 4)
        if self._phase is _OPENING and now - self._progress_at > deadlines.start:
            return "its store did not open in time", grace
        oldest = self._ledger.oldest_submission if self._phase is _WORKING else None
        if oldest is not None and now - max(self._progress_at, oldest) > deadlines.job:
            return "its jobs made no progress", grace
        held_up = self._ledger.held_up_since if oldest is not None else None
        if held_up is not None and now - held_up > deadlines.overtaken_job:
            return "one of its jobs does not end", deadlines.job
        return None, grace

    def _go_down(self, reason: str, kill: bool) -> None:
        if self._phase in (_Phase.OPENING, _Phase.WORKING):
            self._standing.lose(reason)
            self._end(kill)

    def _end(self, kill: bool) -> None:
        if self.executor is None:
            return
        self._phase = _Phase.ENDING
        self._kill_at = math.inf if kill else self._clock() + self._deadlines.job
        if kill:
            self.executor.kill()
        else:
            self.executor.retire()
        self._check_end()

    def _check_end(self) -> None:
        if self.executor is None:
            return
        if self.executor.has_ended():
            self.executor = None
            self._on_life_ended()
            self._phase = _Phase.CLOSED if self._standing.state is TierState.CLOSED else _Phase.WAITING
            if self._begin_when_ended:
                self._begin()
        elif self._clock() >= self._kill_at:
            self._kill_at = math.inf
            self.executor.kill()

    def check_invariants(self) -> None:
        """Raise InvariantError if phase and executor contradict each other."""
        alive = self._phase in (_Phase.OPENING, _Phase.WORKING, _Phase.ENDING)
        if alive is not self.has_executor:
            raise InvariantError(f"{self._phase} with executor {self.executor}")
        if self.executor is None and self._ledger.num_jobs:
            raise InvariantError(f"{self._ledger.num_jobs} jobs without an executor")
        if self.works is not (self._standing.state is TierState.UP):
            raise InvariantError(f"{self._standing.state} while works is {self.works}")
        self._standing.breaker.check_invariants()
        self._store_breaker.check_invariants()
