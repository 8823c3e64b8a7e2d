"""Jobs without a result yet, and a tier's ledger of them, which makes exactly one result per job."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress

import numpy as np

from kvtier.clock import Clock
from kvtier.errors import InvariantError, ProtocolError
from kvtier.events import BlocksFailed, Observer
from kvtier.executors.protocol import Part, PartResult, Slots, blocks_per_packet
from kvtier.keys import MAX_KEY_BYTES, OffloadKey
from kvtier.types import FailureCause, JobMetadata, JobResult, ReqContext

_SURE_TO_FIT = blocks_per_packet(MAX_KEY_BYTES)
"""Most blocks that fit one packet, however long their keys are."""


@dataclass(slots=True, eq=False)
class Job:
    """A job without a result yet.

    The guard in `tiering/` keeps one per job, a striped tier another one, and a tier over a store a `MovingJob`.

    Attributes:
        job_id, keys, is_promotion, req_context, shares: as in `JobMetadata`.
        slots: of the primary arena; only the guard's jobs have them.
        submitted: time of the clock.
        num_left: blocks without an answer.
        successful: keys that succeeded, including those that needed no move.
        num_bytes: bytes moved so far.
        is_cancelled: nobody waits for it; blocks that are not begun fail.
    """

    job_id: int
    keys: Sequence[OffloadKey]
    slots: Sequence[int]
    is_promotion: bool
    req_context: ReqContext
    submitted: float
    num_left: int
    successful: Collection[OffloadKey] = ()
    num_bytes: int = 0
    is_cancelled: bool = False
    shares: Sequence[tuple[ReqContext, int]] = ()

    def as_metadata(self) -> JobMetadata:
        """Return the job for a tier. Keys and slots are copies, because a tier may change them."""
        slots = np.array(self.slots, dtype=np.int32)
        return JobMetadata(self.job_id, list(self.keys), slots, self.is_promotion, self.req_context, self.shares)

    def result(self, now: float) -> JobResult:
        """Return the result of the job, whose blocks must all be answered."""
        seconds = max(0.0, now - self.submitted)
        if len(self.successful) == len(self.keys):
            return JobResult(self.job_id, True, None, seconds, self.num_bytes)
        successful = set(self.successful)
        success = successful.issuperset(self.keys)
        partial = successful if successful and not success else None
        return JobResult(self.job_id, success, partial, seconds, self.num_bytes)


@dataclass(slots=True, eq=False)
class MovingJob(Job):
    """A job whose blocks an executor moves.

    Attributes:
        serial: a number of the job that is unique in its tier.
        moving: the keys that must move.
        arena_slots, store_slots: as in `Part`, in the order of `moving`.
        failures: number of failed blocks by cause.
        answered: per block of `moving`, 1 if it is answered.
        progressed: when a block was answered last.
    """

    serial: int = 0
    moving: Sequence[OffloadKey] = ()
    arena_slots: Slots = ()
    store_slots: Sequence[int] | None = None
    failures: dict[FailureCause, int] = field(default_factory=dict)
    answered: bytearray = field(default_factory=bytearray)
    progressed: float = 0.0

    def slots_and_keys(self, result: PartResult) -> tuple[Sequence[int], Sequence[OffloadKey]]:
        """Return the store's slots and the keys of the blocks that a result is of."""
        slots, keys = self.store_slots or (), self.moving
        if len(result.successes) == len(keys):
            return slots, keys
        return slots[result.span], keys[result.span]

    def count_failures(self, failures: Mapping[FailureCause, int]) -> None:
        """Add failed blocks by cause."""
        for cause, count in failures.items():
            if count:
                self.failures[cause] = self.failures.get(cause, 0) + count

    def parts(self) -> list[Part]:
        """Split the blocks that must move into parts, of which each fits a packet."""
        if len(self.moving) <= _SURE_TO_FIT:
            return [Part.of(self.serial, 0, self.is_promotion, self.moving, self.arena_slots, self.store_slots)]
        step = blocks_per_packet(len(self.moving[0]))
        return [self._part(slice(start, start + step)) for start in range(0, len(self.moving), step)]

    def _part(self, span: slice) -> Part:
        store_slots = None if self.store_slots is None else self.store_slots[span]
        arena_slots = self.arena_slots[span]
        return Part.of(self.serial, span.start, self.is_promotion, self.moving[span], arena_slots, store_slots)


class JobLedger:
    """A tier's jobs in flight, and results that were not collected yet.

    It emits BlocksFailed. The events about the end of a job are the manager's.
    """

    def __init__(self, tier_type: str, clock: Clock, observer: Observer) -> None:
        self._tier_type = tier_type
        self._clock = clock
        self._observer = observer
        self._jobs: dict[int, MovingJob] = {}
        self._overtaken: dict[int, tuple[MovingJob, float]] = {}
        """Jobs that a later job of their kind has overtaken, and since when. Executors begin jobs of a kind in order,
        so an overtaken job is running and does not wait."""
        self._ended: list[MovingJob] = []
        self._next_serial = 1
        self.num_store_blocks = 0
        """Blocks of store jobs without an answer."""
        self.num_load_blocks = 0
        """Blocks of load jobs without an answer."""
        self.num_answered = 0
        """Blocks answered so far. It grows whenever a job progresses."""

    @property
    def num_jobs(self) -> int:
        """Number of jobs without a result."""
        return len(self._jobs)

    def serials(self, job_ids: Container[int] | None = None) -> list[int]:
        """Return the serials of the jobs without a result; given `job_ids`, of these only."""
        return [serial for serial, job in self._jobs.items() if job_ids is None or job.job_id in job_ids]

    def moving_keys(self) -> set[OffloadKey]:
        """Return the keys of all blocks that move. It takes long: not for every lookup."""
        return {key for job in self._jobs.values() for key in job.moving}

    @property
    def oldest_submission(self) -> float | None:
        """When the oldest job without a result was submitted; None if there is none."""
        return next(iter(self._jobs.values())).submitted if self._jobs else None

    @property
    def held_up_since(self) -> float | None:
        """Since when an overtaken job has made no progress; None if there is no such job."""
        if not self._overtaken:
            return None
        return min(max(since, job.progressed) for job, since in self._overtaken.values())

    def open(
        self,
        metadata: JobMetadata,
        moving: Sequence[OffloadKey],
        arena_slots: Slots,
        store_slots: Sequence[int] | None,
        successful: list[OffloadKey],
        failures: Mapping[FailureCause, int],
    ) -> MovingJob | None:
        """Add a job. If none of its blocks must move, make its result at once and return None.

        Args:
            moving: keys of the job that must move.
            arena_slots, store_slots: as in `MovingJob`.
            successful: keys of the job that need no move.
            failures: number of keys that cannot be moved, by cause.
        """
        now, count = self._clock(), len(moving)
        job = MovingJob(
            metadata.job_id,
            metadata.keys,
            (),
            metadata.is_promotion,
            metadata.req_context,
            now,
            count,
            successful,
            serial=self._next_serial,
            moving=moving,
            arena_slots=arena_slots,
            store_slots=store_slots,
            answered=bytearray(count),
            progressed=now,
        )
        if failures:
            job.count_failures(failures)
        self._next_serial += 1
        if not count:
            self._finish(job)
            return None
        self._jobs[job.serial] = job
        self._count(job, count)
        return job

    def refuse(self, metadata: JobMetadata, cause: FailureCause) -> None:
        """Make the result of a job that cannot be accepted: all of its blocks failed."""
        self.open(metadata, (), (), None, [], {cause: len(metadata.keys)})

    def apply(self, result: PartResult) -> MovingJob:
        """Apply a result for some blocks of a job, and return the job. After its last blocks, make the job's result.

        Raises:
            ProtocolError: the job or the blocks do not exist, or were answered before.
        """
        job = self._jobs.get(result.serial)
        span, count = result.span, len(result.successes)
        if job is None:
            raise ProtocolError(f"a result for job {result.serial}, which is not open")
        if not count or span.stop > len(job.moving) or 1 in job.answered[span]:
            raise ProtocolError(f"blocks {span.start} to {span.stop} of job {result.serial} are not open")
        job.progressed = self._clock()
        if next(iter(self._jobs.values())) is not job:
            self._note_overtaken(job)
        self.num_answered += count
        job.answered[span] = b"\1" * count
        job.num_left -= count
        self._count(job, -count)
        job.num_bytes += result.num_bytes
        if result.failures:
            job.count_failures(result.failures)
        if count == len(job.moving) and not job.successful and False not in result.successes:
            job.successful = job.moving
        else:
            job.successful = [*job.successful, *compress(job.moving[span], result.successes)]
        if not job.num_left:
            del self._jobs[job.serial]
            if self._overtaken:
                self._overtaken.pop(job.serial, None)
            self._finish(job)
        return job

    def _note_overtaken(self, job: MovingJob) -> None:
        """Note that blocks of a job were answered before those of earlier jobs of its kind."""
        for serial, other in self._jobs.items():
            if other is job:
                break
            if serial not in self._overtaken and other.is_promotion is job.is_promotion:
                self._overtaken[serial] = (other, job.progressed)

    def fail_all(self, cause: FailureCause) -> None:
        """Make the results of all jobs; their unanswered blocks failed. Only after the executor has certainly ended."""
        jobs, self._jobs = self._jobs, {}
        self._overtaken.clear()
        now = self._clock()
        for job in jobs.values():
            job.progressed = now
            self._count(job, -job.num_left)
            job.count_failures({cause: job.num_left})
            self._finish(job)

    def forget(self) -> None:
        """In a forked child, drop all jobs and results: they belong to the parent."""
        self._jobs, self._ended = {}, []
        self.num_store_blocks = self.num_load_blocks = 0

    def take_results(self) -> list[JobResult]:
        """Return the results since the last call."""
        ended = self._ended
        if not ended:
            return []
        self._ended = []
        return [job.result(job.progressed) for job in ended]

    def _count(self, job: MovingJob, blocks: int) -> None:
        if job.is_promotion:
            self.num_load_blocks += blocks
        else:
            self.num_store_blocks += blocks

    def _finish(self, job: MovingJob) -> None:
        self._ended.append(job)
        for cause, count in job.failures.items():
            self._observer.on_event(BlocksFailed(self._tier_type, cause, count))

    def check_invariants(self) -> None:
        """Raise InvariantError unless the counts agree with the jobs."""
        loads = sum(job.num_left for job in self._jobs.values() if job.is_promotion)
        stores = sum(job.num_left for job in self._jobs.values() if not job.is_promotion)
        if (loads, stores) != (self.num_load_blocks, self.num_store_blocks):
            raise InvariantError(
                f"{self.num_load_blocks} loads and {self.num_store_blocks} stores counted, {loads} and {stores} open"
            )
        for job in self._jobs.values():
            if job.num_left != job.answered.count(0) or not job.num_left:
                raise InvariantError(
                    f"job {job.serial}: {job.num_left} blocks left, {job.answered.count(0)} unanswered"
                )
