"""One secondary tier behind a wall: whatever it does, the manager sees values.

A tier may raise, never answer, answer twice or for jobs it was never given, and return wrong bytes. The guard
knows its unanswered jobs, stops using it while it misbehaves, and says so once a change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from kvtier.abc import SecondaryTierManager
from kvtier.clock import Clock
from kvtier.errors import InvariantError
from kvtier.events import BlocksFailed, JobFinished, Observer, TierState, UnexpectedCall
from kvtier.keys import OffloadKey
from kvtier.primary.arena import arena_rows
from kvtier.secondary.stand_ins import LateTier
from kvtier.tiering.digests import DigestLedger
from kvtier.tiering.standing import Standing
from kvtier.tiering.tier_jobs import Answer, Claim, TierJob, make_tier_job, read_result
from kvtier.tiering.waiting import ProbePatience
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

STORE_SHARE = 0.5
_UP, _STARTING = TierState.UP, TierState.STARTING

T = TypeVar("T")


@dataclass(slots=True)
class _Hashing:
    """A job whose slots are being hashed: before a store is handed over, or before a load is believed."""

    job: TierJob
    digests: Future[list[bytes]]
    claimed: Collection[OffloadKey]


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
        tier_deadline: float,
        probe_deadline: float | None = None,
    ) -> None:
        """Args: probe_deadline: longest wait for an answer to a lookup, seconds; None for the tier's own."""
        self.tier = tier
        self._late = tier if isinstance(tier, LateTier) else None
        self.index = index
        self.name = name
        self.admission = admission
        self.jobs: dict[int, TierJob] = {}
        self._num_storing = 0
        self.usable = False
        self._is_opening = False
        self._was_usable = False
        self.patience = ProbePatience(clock, tier.probe_deadline if probe_deadline is None else probe_deadline)
        self._clock = clock
        self._observer = observer
        self._tier_deadline = tier_deadline
        self._progressed_at, self._progress = 0.0, 0
        self._standing = Standing(name, clock, observer)
        self._ledger = None if tier.verifies_payloads else DigestLedger(arena_rows(tier.primary_kv_view))
        self._most_pinned = int(len(tier.primary_kv_view) * STORE_SHARE)
        self._hashing: list[_Hashing] = []
        self._draining = False
        self._pending_epoch: bytes | None = None
        self._epoch_retry_at = 0.0
        self._closed = False
        self._busy: threading.Thread | None = None

    # -- use, on the scheduler's thread -------------------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Return the tier's answer; MISS while it is not usable or raises, or for bytes nobody could verify.

        RETRY while a tier that may hold blocks of earlier engines opens for the first time.
        """
        if not self.usable:
            return LookupResult.RETRY if self._is_opening else LookupResult.MISS
        if self._ledger is not None and key not in self._ledger:
            return LookupResult.MISS
        try:
            return self.tier.lookup(key, req_context)
        except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
            self._fault("lookup", fault)
            return LookupResult.MISS

    def can_store(self, num_blocks: int) -> bool:
        """Return whether a store job of this size would be taken now.

        Unanswered stores pin at most `STORE_SHARE` of the primary, whatever the tier itself would take; a tier
        without any takes a job of any size.
        """
        if not self.usable:
            return False
        if self._num_storing and self._num_storing + num_blocks > self._most_pinned:
            return False
        return self.call("can_store", False, num_blocks, read=bool)

    def submit(self, metadata: JobMetadata, slots: list[int]) -> bool:
        """Hand a job over; False if the tier did not take it. The slots must be pinned already."""
        job = make_tier_job(metadata, slots, self._clock())
        if not self.jobs:
            self._progressed_at = job.submitted
        self.jobs[job.job_id] = job
        if not job.is_promotion:
            self._num_storing += len(job.slots)
        if self._ledger is not None and not job.is_promotion:
            self._hashing.append(_Hashing(job, self._ledger.hash(slots), frozenset()))
            return True
        return self._hand_over(job)

    def _hand_over(self, job: TierJob) -> bool:
        submit = "submit_load" if job.is_promotion else "submit_store"
        taken = self.call(submit, False, job.metadata, read=_taken)  # one that raises has not taken it
        if not taken:
            self._forget(job)
        return taken

    def _forget(self, job: TierJob) -> None:
        del self.jobs[job.job_id]
        if not job.is_promotion:
            self._num_storing -= len(job.slots)

    def end_step(self, context: ScheduleEndContext) -> None:
        """Tell the tier that a step is over."""
        self.call("on_schedule_end", None, context)

    def stats(self) -> Mapping[str, float]:
        """Return the tier's gauges; none if it fails."""
        nothing: dict[str, float] = {}
        return self.call("get_stats", nothing, read=dict)

    def take_events(self) -> list[OffloadingEvent]:
        """Return the tier's KV events since the last call; none if it fails."""
        nothing: list[OffloadingEvent] = []
        return self.call("take_events", nothing, read=list)

    def describe(self) -> tuple[TierState, str]:
        """Return the tier's state, seen from outside, and the reason for it."""
        if self._standing.reason is not None:
            return TierState.DOWN, self._standing.reason
        state = self.state
        try:
            return state, self.tier.state_reason
        except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
            self._fault("state_reason", fault)
            return state, ""

    def call(self, method: str, default: T, *args: object, read: Callable[[Any], T] | None = None) -> T:
        """Call a method of the tier and `read` its answer; a fault of either is reported and `default` returned.

        A tier that hangs in a call on another thread is not called at all: this thread might hang in it, too.
        """
        if self._busy is not None:
            return default
        try:
            answer: T = getattr(self.tier, method)(*args)
            return answer if read is None else read(answer)
        except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
            self._fault(method, fault)
            return default

    # -- once a step --------------------------------------------------------------------------------------

    def poll(self) -> list[Answer]:
        """Collect what the tier and the ledger finished, and decide whether the tier may be used."""
        answers: list[Answer] = []
        if self._closed:
            return answers
        if self._busy is not None:
            if self._busy.is_alive():
                self._down("does not come back")
                return answers
            self._busy = None
        if self._late is not None:
            self._take_successor(self._late)
        if self._ledger is not None:
            self._collect_hashes(self._ledger, answers)
        results: list[JobResult] = []  # those that came before a fault count
        try:
            results.extend(self.tier.get_finished_jobs())
        except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
            self._fault("get_finished_jobs", fault)
        for result in results:
            self._take_result(result, answers)
        self._draining = False
        self._refresh()
        if self.usable:
            self.patience.follow(self.lookup)
        return answers

    def _take_successor(self, late: LateTier) -> None:
        """Put the tier that was waited for in its place, in the epoch of now."""
        tier = late.take_successor()
        if tier is None:
            return
        self.tier, self._late = tier, None
        if late.epoch is not None:
            self.start_epoch(late.epoch)

    def _take_result(self, result: JobResult, answers: list[Answer]) -> None:
        now, job = self._clock(), None
        try:
            job = self.jobs.get(result.job_id)
            claim = None if job is None else read_result(job, result, now)
        except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
            self._fault("get_finished_jobs", fault)
            claim = None
        if job is None or (self._hashing and any(hashing.job is job for hashing in self._hashing)):
            self._observer.on_event(UnexpectedCall(f"result of tier {self.name}", 1))
            return
        if claim is None:
            claim = Claim((), 0, now - job.submitted)
        self._observer.on_event(
            JobFinished(self.name, job.is_promotion, len(job.keys), len(claim.keys), claim.num_bytes, claim.seconds)
        )
        if self._ledger is None or not job.is_promotion or not claim.keys:
            self._answer(job, claim.keys, answers)
        elif self._draining:  # the primary is about to forget the blocks anyway
            self._answer(job, frozenset(), answers)
        else:
            self._hashing.append(_Hashing(job, self._ledger.hash(job.slots), claim.keys))

    def _answer(self, job: TierJob, successful: Collection[OffloadKey], answers: list[Answer]) -> None:
        self._forget(job)
        self._progressed_at = self._clock()
        answers.append(Answer(job, successful))

    def _collect_hashes(self, ledger: DigestLedger, answers: list[Answer]) -> None:
        done = [hashing for hashing in self._hashing if hashing.digests.done()]
        if not done:
            return
        self._hashing = [hashing for hashing in self._hashing if not hashing.digests.done()]
        self._progressed_at = self._clock()
        for hashing in done:
            job, keys, digests = hashing.job, hashing.job.keys, hashing.digests.result()
            if job.is_promotion:
                good = frozenset(hashing.claimed).intersection(ledger.matching(keys, digests))
                if len(good) < len(hashing.claimed):
                    wrong = len(hashing.claimed) - len(good)
                    self._observer.on_event(BlocksFailed(self.name, FailureCause.CORRUPT, wrong))
                    self._down(f"returned {wrong} blocks with wrong bytes")
                self._answer(job, good, answers)
            elif self._draining:  # nothing may be handed over between a drain and the new epoch
                self._answer(job, frozenset(), answers)
            else:
                ledger.record(keys, digests)
                if not self._hand_over(job):
                    answers.append(Answer(job, frozenset()))

    def _refresh(self) -> None:
        now = self._clock()
        self._follow_progress(now)
        if self.jobs and self._is_overdue(now):
            self._down("its jobs make no progress")
        elif self._pending_epoch is None:
            self._standing.reconsider(now)
        state, is_trusted = self.state, self._standing.is_trusted
        if is_trusted and state is _UP and not self.usable:
            self._was_usable = True
            self.patience.begin_life()
        self.usable = is_trusted and state is _UP
        self._is_opening = is_trusted and state is _STARTING and self.tier.persistent and not self._was_usable

    def _follow_progress(self, now: float) -> None:
        try:
            progress = self.tier.progress
        except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
            self._fault("progress", fault)
            return
        if progress != self._progress:
            self._progress, self._progressed_at = progress, now

    def _is_overdue(self, now: float) -> bool:
        """Return whether nothing of the jobs has progressed for too long; one that waits its turn is not late."""
        return now - self._progressed_at > self._tier_deadline

    @property
    def state(self) -> TierState:
        """The tier's own state; DOWN if asking for it raises."""
        try:
            return self.tier.state
        except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
            self._fault("state", fault)
            return TierState.DOWN

    # -- faults -------------------------------------------------------------------------------------------

    def _fault(self, where: str, fault: Exception) -> None:
        self._down(f"{where} raised {type(fault).__name__}: {fault}")

    def _down(self, reason: str) -> None:
        """Leave the tier alone for a while."""
        self.usable = False
        self._standing.lose(reason)

    # -- reset and end ------------------------------------------------------------------------------------

    def start_epoch(self, epoch: bytes) -> None:
        """Blocks stored before must miss; a tier that has not begun the epoch, for whatever reason, stays down."""
        self._pending_epoch = epoch
        if self._ledger is not None:
            self._ledger.clear()
        if self.jobs or self._busy is not None:
            self._down("jobs unanswered at a reset")
        else:
            self._begin_epoch(epoch)

    def _begin_epoch(self, epoch: bytes) -> None:
        if self.call("start_epoch", False, epoch, read=lambda nothing: True):
            self._pending_epoch = None
            if self._ledger is not None:
                self._ledger.clear()
        else:
            self._epoch_retry_at = self._standing.retry_at

    def resume_epoch(self) -> None:
        """Start the epoch that had to wait, once every job has been answered; again later if the tier fails."""
        if self._pending_epoch is None or self.jobs or self._busy is not None:
            return
        if self._clock() >= self._epoch_retry_at:
            self._begin_epoch(self._pending_epoch)

    def begin_drain(self) -> None:
        """What has not been handed over yet will not be: the cache is being reset."""
        self._draining = True

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
        self.usable, self._closed = False, True
        self.tier.shutdown()
        if self._ledger is not None:
            self._ledger.close()

    def has_live_cascade(self, now: float) -> bool:
        """Return whether there is a cascade and the tier makes progress."""
        return self._num_storing > 0 and not self._is_overdue(now)

    def check_invariants(self) -> None:
        """Raise InvariantError if a hashing job is not an unanswered job; then ask the tier."""
        if any(hashing.job.job_id not in self.jobs for hashing in self._hashing):
            raise InvariantError(f"tier {self.name} hashes a job that was answered")
        if self._num_storing != sum(len(job.slots) for job in self.jobs.values() if not job.is_promotion):
            raise InvariantError(f"tier {self.name} miscounts the blocks of its stores")
        self.tier.check_invariants()


def _taken(nothing: object) -> bool:
    return True
