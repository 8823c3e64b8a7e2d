"""One secondary tier behind a wall: whatever it does, the manager sees values.

A tier may raise, never answer, answer twice or for jobs it was never given, and return wrong bytes. The guard
knows its unanswered jobs, stops using it while it misbehaves, and says so once a change.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from kvtier.abc import SecondaryTierManager
from kvtier.clock import Clock
from kvtier.errors import InvariantError
from kvtier.events import BlocksFailed, JobFinished, Observer, TierState, TierStateChanged, UnexpectedCall
from kvtier.keys import OffloadKey
from kvtier.primary.arena import arena_rows
from kvtier.tiering.ledger import DigestLedger
from kvtier.types import (
    Admission,
    FailureCause,
    JobMetadata,
    JobResult,
    LookupResult,
    OffloadingEvent,
    ReqContext,
    ScheduleEndContext,
)

logger = logging.getLogger("kvtier")

FIRST_BACKOFF = 1.0
MAX_BACKOFF = 30.0

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class TierJob:
    """A job that a tier has not answered yet. `slots` stay pinned until it has."""

    metadata: JobMetadata
    slots: list[int]
    submitted: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of a job: the keys that succeeded, verified if the tier does not verify by itself."""

    job: TierJob
    successful: frozenset[OffloadKey]


@dataclass(slots=True)
class _Hashing:
    """A job whose slots are being hashed: before a store is handed over, or before a load is believed."""

    job: TierJob
    digests: Future[list[bytes]]
    claimed: frozenset[OffloadKey]


class TierGuard:
    """A tier, its admission rule, its unanswered jobs and whether it may be used."""

    def __init__(
        self,
        tier: SecondaryTierManager,
        index: int,
        name: str,
        admission: Admission,
        clock: Clock,
        observer: Observer,
        job_deadline: float,
    ) -> None:
        self.tier = tier
        self.index = index
        self.name = name
        self.admission = admission
        self.jobs: dict[int, TierJob] = {}
        self.usable = False
        self._clock = clock
        self._observer = observer
        self._job_deadline = job_deadline
        self._down_reason: str | None = None
        self._retry_at = 0.0
        self._on_trial = False
        self._backoff = FIRST_BACKOFF
        self._ledger = None if tier.verifies_payloads else DigestLedger(arena_rows(tier.primary_kv_view))
        self._hashing: list[_Hashing] = []
        self._pending_epoch: bytes | None = None
        self._busy: threading.Thread | None = None

    # -- use, on the scheduler's thread -------------------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Return the tier's answer; MISS while it is not usable or raises, or for bytes nobody could verify."""
        if not self.usable or (self._ledger is not None and key not in self._ledger):
            return LookupResult.MISS
        try:
            return self.tier.lookup(key, req_context)
        except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
            self._fault("lookup", fault)
            return LookupResult.MISS

    def can_store(self, num_blocks: int) -> bool:
        """Return whether a store job of this size would be taken now."""
        return self.usable and bool(self.call(self.tier.can_store, False, num_blocks))

    def submit(self, metadata: JobMetadata, slots: list[int]) -> bool:
        """Hand a job over; False if the tier did not take it. The slots must be pinned already."""
        job = TierJob(metadata, slots, self._clock())
        self.jobs[metadata.job_id] = job
        if self._ledger is not None and not metadata.is_promotion:
            self._hashing.append(_Hashing(job, self._ledger.hash(slots), frozenset()))
            return True
        return self._hand_over(job)

    def _hand_over(self, job: TierJob) -> bool:
        submit = self.tier.submit_load if job.metadata.is_promotion else self.tier.submit_store
        try:
            submit(job.metadata)
        except Exception as fault:  # noqa: BLE001 - a submit that raises has not taken the job
            self._fault(submit.__name__, fault)
            del self.jobs[job.metadata.job_id]
            return False
        return True

    def end_step(self, context: ScheduleEndContext) -> None:
        """Tell the tier that a step is over."""
        if self._busy is None:
            self.call(self.tier.on_schedule_end, None, context)

    def stats(self) -> Mapping[str, float]:
        """Return the tier's gauges; none if it fails."""
        nothing: Mapping[str, float] = {}
        return self.call(self.tier.get_stats, nothing)

    def take_events(self) -> list[OffloadingEvent]:
        """Return the tier's KV events since the last call; none if it fails."""
        nothing: Iterable[OffloadingEvent] = ()
        return list(self.call(self.tier.take_events, nothing))

    def describe(self) -> tuple[TierState, str]:
        """Return the tier's state, seen from outside, and the reason for it."""
        if self._down_reason is not None:
            return TierState.DOWN, self._down_reason
        return self.state, self.call(lambda: self.tier.state_reason, "")

    def call(self, method: Callable[..., T], default: T, *args: object) -> T:
        """Call a method of the tier; its fault is reported and `default` returned."""
        try:
            return method(*args)
        except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
            self._fault(method.__name__, fault)
            return default

    # -- once a step --------------------------------------------------------------------------------------

    def poll(self) -> list[Answer]:
        """Collect what the tier and the ledger finished, and decide whether the tier may be used."""
        answers: list[Answer] = []
        if self._busy is not None:
            if self._busy.is_alive():
                self._down("does not come back")
                return answers
            self._busy = None
        if self._ledger is not None:
            self._collect_hashes(self._ledger, answers)
        nothing: Iterable[JobResult] = ()
        for result in list(self.call(self.tier.get_finished_jobs, nothing)):
            self._take_result(result, answers)
        self._refresh()
        return answers

    def _take_result(self, result: JobResult, answers: list[Answer]) -> None:
        job = self.jobs.get(result.job_id)
        if job is None or any(hashing.job is job for hashing in self._hashing):
            self._observer.on_event(UnexpectedCall(f"result of tier {self.name}", 1))
            return
        keys = job.metadata.keys
        claimed = frozenset(keys) if result.success else frozenset(keys).intersection(result.successful_keys or ())
        self._observer.on_event(
            JobFinished(
                self.name,
                job.metadata.is_promotion,
                len(keys),
                len(claimed),
                result.transfer_bytes or 0,
                result.transfer_time if result.transfer_time is not None else self._clock() - job.submitted,
            )
        )
        if self._ledger is not None and job.metadata.is_promotion and claimed:
            self._hashing.append(_Hashing(job, self._ledger.hash(job.slots), claimed))
        else:
            self._answer(job, claimed, answers)

    def _answer(self, job: TierJob, successful: frozenset[OffloadKey], answers: list[Answer]) -> None:
        del self.jobs[job.metadata.job_id]
        answers.append(Answer(job, successful))

    def _collect_hashes(self, ledger: DigestLedger, answers: list[Answer]) -> None:
        done = [hashing for hashing in self._hashing if hashing.digests.done()]
        if not done:
            return
        self._hashing = [hashing for hashing in self._hashing if not hashing.digests.done()]
        for hashing in done:
            job, keys, digests = hashing.job, hashing.job.metadata.keys, hashing.digests.result()
            if job.metadata.is_promotion:
                good = hashing.claimed.intersection(ledger.matching(keys, digests))
                if len(good) < len(hashing.claimed):
                    wrong = len(hashing.claimed) - len(good)
                    self._observer.on_event(BlocksFailed(self.name, FailureCause.CORRUPT, wrong))
                    self._down(f"returned {wrong} blocks with wrong bytes")
                self._answer(job, good, answers)
            else:
                ledger.record(keys, digests)
                if not self._hand_over(job):
                    answers.append(Answer(job, frozenset()))

    def _refresh(self) -> None:
        now = self._clock()
        if any(now - job.submitted > self._job_deadline for job in self.jobs.values()):
            self._down("a job is overdue")
        elif self._down_reason is not None and now >= self._retry_at and self._pending_epoch is None:
            if self._on_trial:  # it got through a whole backoff without a fault
                self._on_trial, self._down_reason, self._backoff = False, None, FIRST_BACKOFF
                self._say(TierState.UP, "works again")
            else:
                self._on_trial, self._retry_at = True, now + self._backoff
        self.usable = (self._down_reason is None or self._on_trial) and self.state is TierState.UP

    @property
    def state(self) -> TierState:
        """The tier's own state; DOWN if asking for it raises."""
        return self.call(lambda: self.tier.state, TierState.DOWN)

    # -- faults -------------------------------------------------------------------------------------------

    def _fault(self, where: str, fault: Exception) -> None:
        self._down(f"{where} raised {type(fault).__name__}: {fault}")

    def _down(self, reason: str) -> None:
        """Leave the tier alone for a while; said once until it works again."""
        if self._down_reason is None:
            self._say(TierState.DOWN, reason)
        self.usable, self._on_trial, self._down_reason = False, False, reason
        self._retry_at = self._clock() + self._backoff
        self._backoff = min(self._backoff * 2, MAX_BACKOFF)

    def _say(self, state: TierState, reason: str) -> None:
        level = logging.INFO if state is TierState.UP else logging.WARNING
        logger.log(level, "tier %s is %s: %s", self.name, state.value, reason)
        self._observer.on_event(TierStateChanged(self.name, state, reason))

    # -- reset and end ------------------------------------------------------------------------------------

    def start_epoch(self, epoch: bytes) -> None:
        """Blocks stored before must miss; a tier with unanswered jobs stays down until they are answered."""
        if self._ledger is not None:
            self._ledger.clear()
        if self.jobs or self._busy is not None:
            self._pending_epoch = epoch
            self._down("jobs unanswered at a reset")
            return
        self._pending_epoch = None
        self.call(self.tier.start_epoch, None, epoch)

    def resume_epoch(self) -> None:
        """Start the epoch that had to wait, once every job has been answered."""
        if self._pending_epoch is not None and not self.jobs and self._busy is None:
            self.start_epoch(self._pending_epoch)

    def drain(self) -> None:
        """Wait until the tier touches no primary memory; runs on a thread of its own, bounded by its caller."""
        for hashing in self._hashing:
            hashing.digests.result()
        self.tier.drain_jobs()

    def busy_with(self, thread: threading.Thread | None) -> None:
        """Leave the tier alone until `thread`, which is still inside it, has come back."""
        self._busy = thread

    def shutdown(self) -> None:
        """End the tier and what the guard started; runs on a thread of its own, bounded by its caller."""
        self.usable = False
        self.tier.shutdown()
        if self._ledger is not None:
            self._ledger.close()

    def has_live_cascade(self, now: float) -> bool:
        """Return whether a cascade is still within its deadline."""
        return any(
            not job.metadata.is_promotion and now - job.submitted <= self._job_deadline for job in self.jobs.values()
        )

    def check_invariants(self) -> None:
        """Raise InvariantError if a hashing job is not an unanswered job; then ask the tier."""
        if any(hashing.job.metadata.job_id not in self.jobs for hashing in self._hashing):
            raise InvariantError(f"tier {self.name} hashes a job that was answered")
        self.tier.check_invariants()
