"""Jobs that are not answered, and a tier's ledger of them: exactly one result per job, whoever works on it."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress

import numpy as np

from kvtier.clock import Clock
from kvtier.errors import InvariantError, ProtocolError
from kvtier.events import BlocksFailed, Observer
from kvtier.executors.protocol import Part, PartResult, blocks_per_packet
from kvtier.keys import OffloadKey
from kvtier.types import FailureCause, JobMetadata, JobResult, ReqContext


@dataclass(slots=True, eq=False)
class Job:
    """A job that is not answered yet, as whoever waits for its answer keeps it.

    The manager's guard keeps one, a tier of several stripes another, a tier over a store a `MovingJob`.

    Attributes:
        job_id, keys, slots, is_promotion, req_context: what was asked; the slots are of the primary arena.
        submitted: seconds of the clock.
        num_left: blocks that are not answered.
        successful: keys that are done, those included that had nothing to move.
        num_bytes: moved so far.
        is_cancelled: nobody waits for it; what has not begun fails.
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

    def as_metadata(self) -> JobMetadata:
        """Return what a tier is asked: copies, because a tier may change what it is given."""
        slots = np.array(self.slots, dtype=np.int32)
        return JobMetadata(self.job_id, list(self.keys), slots, self.is_promotion, self.req_context)

    def result(self, now: float) -> JobResult:
        """Return the one answer, when no block is left."""
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
        serial: number of the job in its tier, which no other job has or had.
        moving: the keys that move; in their order, `slots`, and `store_slots` as in `Part`.
        failures: failed blocks by cause.
        answered: 1 for each block of `moving` that is answered.
        progressed: when any block was answered last.
    """

    serial: int = 0
    moving: Sequence[OffloadKey] = ()
    store_slots: Sequence[int] | None = None
    failures: dict[FailureCause, int] = field(default_factory=dict)
    answered: bytearray = field(default_factory=bytearray)
    progressed: float = 0.0

    def count_failures(self, failures: Mapping[FailureCause, int]) -> None:
        """Add failed blocks by cause."""
        for cause, count in failures.items():
            if count:
                self.failures[cause] = self.failures.get(cause, 0) + count

    def parts(self) -> list[Part]:
        """Return everything that moves, in parts that fit a packet each."""
        step = blocks_per_packet(len(self.moving[0]))
        if len(self.moving) <= step:
            return [Part.of(self.serial, 0, self.is_promotion, self.moving, self.slots, self.store_slots)]
        return [self._part(slice(start, start + step)) for start in range(0, len(self.moving), step)]

    def _part(self, span: slice) -> Part:
        store_slots = None if self.store_slots is None else self.store_slots[span]
        return Part.of(self.serial, span.start, self.is_promotion, self.moving[span], self.slots[span], store_slots)


class JobLedger:
    """Jobs in flight and results not collected yet. Emits BlocksFailed; the manager says that a job ended."""

    def __init__(self, tier_type: str, clock: Clock, observer: Observer) -> None:
        self._tier_type = tier_type
        self._clock = clock
        self._observer = observer
        self._jobs: dict[int, MovingJob] = {}
        self._overtaken: dict[int, tuple[MovingJob, float]] = {}
        """Jobs, and since when a later one of their kind has had an answer. Jobs of a kind are begun in their order:
        these do not wait, they run."""
        self._ended: list[MovingJob] = []
        self._next_serial = 1
        self.num_store_blocks = 0
        """Blocks of unanswered store jobs that have not moved yet."""
        self.num_load_blocks = 0
        self.num_answered = 0
        """Blocks that have been answered so far; it grows whenever anything progresses."""

    @property
    def num_jobs(self) -> int:
        """Jobs without a result."""
        return len(self._jobs)

    def serials(self, job_ids: Container[int] | None = None) -> list[int]:
        """Return the serials of the jobs without a result; given `job_ids`, of these only."""
        return [serial for serial, job in self._jobs.items() if job_ids is None or job.job_id in job_ids]

    @property
    def oldest_submission(self) -> float | None:
        """When the oldest unanswered job was submitted; None if there is none."""
        return next(iter(self._jobs.values())).submitted if self._jobs else None

    @property
    def held_up_since(self) -> float | None:
        """Since when a job that others have overtaken shows no progress; None if there is no such job."""
        return min((max(since, job.progressed) for job, since in self._overtaken.values()), default=None)

    def open(
        self,
        metadata: JobMetadata,
        moving: Sequence[OffloadKey],
        slots: Sequence[int],
        store_slots: Sequence[int] | None,
        successful: list[OffloadKey],
        failures: Mapping[FailureCause, int],
    ) -> MovingJob | None:
        """Note a job of which the keys `moving` must move; None, and a result at once, if there are none.

        Args:
            slots, store_slots: as in `MovingJob`.
            successful: keys of the job that need no move.
            failures: those of its keys that cannot be moved, by cause.
        """
        now, count = self._clock(), len(moving)
        job = MovingJob(
            metadata.job_id,
            metadata.keys,
            slots,
            metadata.is_promotion,
            metadata.req_context,
            now,
            count,
            successful,
            serial=self._next_serial,
            moving=moving,
            store_slots=store_slots,
            answered=bytearray(count),
            progressed=now,
        )
        job.count_failures(failures)
        self._next_serial += 1
        if not count:
            self._finish(job)
            return None
        self._jobs[job.serial] = job
        self._count(job, count)
        return job

    def refuse(self, metadata: JobMetadata, cause: FailureCause) -> None:
        """Answer a job that cannot be taken: every block failed."""
        self.open(metadata, (), (), None, [], {cause: len(metadata.keys)})

    def apply(self, result: PartResult) -> MovingJob:
        """Note how some blocks of a job ended, and return the job; its last blocks make its result.

        Raises:
            ProtocolError: no such job, no such blocks, or they were answered before.
        """
        job = self._jobs.get(result.serial)
        span, count = result.span, len(result.successes)
        if job is None:
            raise ProtocolError(f"a result for job {result.serial}, which is not open")
        if not count or span.stop > len(job.moving) or 1 in job.answered[span]:
            raise ProtocolError(f"blocks {span.start} to {span.stop} of job {result.serial} are not open")
        self._note_progress(job)
        self.num_answered += count
        job.answered[span] = b"\1" * count
        job.num_left -= count
        self._count(job, -count)
        job.num_bytes += result.num_bytes
        job.count_failures(result.failures)
        moved = compress(job.moving[span], result.successes)
        job.successful = [*job.successful, *moved] if job.successful else list(moved)
        if not job.num_left:
            del self._jobs[job.serial]
            self._overtaken.pop(job.serial, None)
            self._finish(job)
        return job

    def _note_progress(self, job: MovingJob) -> None:
        """Some blocks of a job were answered: jobs of its kind before it are overtaken."""
        now = job.progressed = self._clock()
        for serial, other in self._jobs.items():
            if other is job:
                break
            if serial not in self._overtaken and other.is_promotion is job.is_promotion:
                self._overtaken[serial] = (other, now)

    def fail_all(self, cause: FailureCause) -> None:
        """Answer every open job: what has not moved failed. Only when nothing can move any more."""
        jobs, self._jobs = self._jobs, {}
        self._overtaken.clear()
        now = self._clock()
        for job in jobs.values():
            job.progressed = now
            self._count(job, -job.num_left)
            job.count_failures({cause: job.num_left})
            self._finish(job)

    def forget(self) -> None:
        """Drop every job and result unanswered: whoever waits for them is in another process."""
        self._jobs, self._ended = {}, []
        self.num_store_blocks = self.num_load_blocks = 0

    def take_results(self) -> list[JobResult]:
        """Return the results since the last call."""
        ended, self._ended = self._ended, []
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
