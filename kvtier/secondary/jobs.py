"""The ledger of a tier's jobs: exactly one result a job, whatever happens to who works on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress

from kvtier.clock import Clock
from kvtier.errors import InvariantError, ProtocolError
from kvtier.events import BlocksFailed, Observer
from kvtier.executors.protocol import Part, PartResult
from kvtier.keys import OffloadKey
from kvtier.types import FailureCause, JobMetadata, JobResult


@dataclass(slots=True, eq=False)
class Job:
    """A job that is not answered yet.

    Attributes:
        keys, arena_slots, store_slots: the blocks that move, in one order; store_slots as in `Part`.
        successful: keys that are done, those included that had nothing to move.
        submitted, progressed: time of submission, and of the last answer to any of its blocks.
    """

    serial: int
    metadata: JobMetadata
    keys: Sequence[OffloadKey]
    arena_slots: Sequence[int]
    store_slots: Sequence[int] | None
    submitted: float
    successful: list[OffloadKey]
    failures: dict[FailureCause, int] = field(default_factory=dict)
    num_bytes: int = 0
    answered: bytearray = field(init=False)
    num_left: int = field(init=False)
    progressed: float = field(init=False)

    def __post_init__(self) -> None:
        self.progressed = self.submitted
        self.answered = bytearray(len(self.keys))
        self.num_left = len(self.keys)

    def count_failures(self, failures: Mapping[FailureCause, int]) -> None:
        """Add failed blocks by cause."""
        for cause, count in failures.items():
            if count:
                self.failures[cause] = self.failures.get(cause, 0) + count

    def as_part(self) -> Part:
        """Return everything that moves as one part."""
        return Part.of(self.serial, 0, self.metadata.is_promotion, self.keys, self.arena_slots, self.store_slots)


class JobLedger:
    """Jobs in flight and results not collected yet. Emits BlocksFailed; the manager says that a job ended."""

    def __init__(self, tier_type: str, clock: Clock, observer: Observer) -> None:
        self._tier_type = tier_type
        self._clock = clock
        self._observer = observer
        self._jobs: dict[int, Job] = {}
        self._overtaken: dict[int, tuple[Job, float]] = {}
        """Jobs, and since when a later one of their kind has had an answer. Jobs of a kind are begun in their order:
        these do not wait, they run."""
        self._results: list[JobResult] = []
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
        keys: Sequence[OffloadKey],
        arena_slots: Sequence[int],
        store_slots: Sequence[int] | None,
        successful: list[OffloadKey],
        failures: Mapping[FailureCause, int],
    ) -> Job | None:
        """Note a job whose `keys` must move; None, and a result at once, if there are none.

        Args:
            successful: keys of the job that need no move.
            failures: those of its keys that cannot be moved, by cause.
        """
        job = Job(self._next_serial, metadata, keys, arena_slots, store_slots, self._clock(), successful)
        job.count_failures(failures)
        self._next_serial += 1
        if not keys:
            self._finish(job)
            return None
        self._jobs[job.serial] = job
        self._count(job, len(keys))
        return job

    def refuse(self, metadata: JobMetadata, cause: FailureCause) -> None:
        """Answer a job that cannot be taken: every block failed."""
        self.open(metadata, (), (), None, [], {cause: len(metadata.keys)})

    def apply(self, result: PartResult) -> Job:
        """Note how some blocks of a job ended, and return the job; its last blocks make its result.

        Raises:
            ProtocolError: no such job, no such blocks, or they were answered before.
        """
        job = self._jobs.get(result.serial)
        span, count = result.span, len(result.successes)
        if job is None:
            raise ProtocolError(f"a result for job {result.serial}, which is not open")
        if not count or span.stop > len(job.keys) or 1 in job.answered[span]:
            raise ProtocolError(f"blocks {span.start} to {span.stop} of job {result.serial} are not open")
        self._note_progress(job)
        self.num_answered += count
        job.answered[span] = b"\1" * count
        job.num_left -= count
        self._count(job, -count)
        job.num_bytes += result.num_bytes
        job.count_failures(result.failures)
        job.successful += compress(job.keys[span], result.successes)
        if not job.num_left:
            del self._jobs[job.serial]
            self._overtaken.pop(job.serial, None)
            self._finish(job)
        return job

    def _note_progress(self, job: Job) -> None:
        """Some blocks of a job were answered: jobs of its kind before it are overtaken."""
        now = job.progressed = self._clock()
        for serial, other in self._jobs.items():
            if other is job:
                break
            if serial not in self._overtaken and other.metadata.is_promotion is job.metadata.is_promotion:
                self._overtaken[serial] = (other, now)

    def fail_all(self, cause: FailureCause) -> None:
        """Answer every open job: what has not moved failed. Only when nothing can move any more."""
        jobs, self._jobs = self._jobs, {}
        self._overtaken.clear()
        for job in jobs.values():
            self._count(job, -job.num_left)
            job.count_failures({cause: job.num_left})
            self._finish(job)

    def forget(self) -> None:
        """Drop every job and result unanswered: whoever waits for them is in another process."""
        self._jobs, self._results = {}, []
        self.num_store_blocks = self.num_load_blocks = 0

    def take_results(self) -> list[JobResult]:
        """Return the results since the last call."""
        results, self._results = self._results, []
        return results

    def _count(self, job: Job, blocks: int) -> None:
        if job.metadata.is_promotion:
            self.num_load_blocks += blocks
        else:
            self.num_store_blocks += blocks

    def _finish(self, job: Job) -> None:
        metadata = job.metadata
        if len(job.successful) == len(metadata.keys):
            success, successful = True, set[OffloadKey]()
        else:
            successful = set(job.successful)
            success = successful.issuperset(metadata.keys)
        seconds = max(0.0, self._clock() - job.submitted)
        partial = successful if successful and not success else None
        self._results.append(JobResult(metadata.job_id, success, partial, seconds, job.num_bytes))
        for cause, count in job.failures.items():
            self._observer.on_event(BlocksFailed(self._tier_type, cause, count))

    def check_invariants(self) -> None:
        """Raise InvariantError unless the counts agree with the jobs."""
        loads = sum(job.num_left for job in self._jobs.values() if job.metadata.is_promotion)
        stores = sum(job.num_left for job in self._jobs.values() if not job.metadata.is_promotion)
        if (loads, stores) != (self.num_load_blocks, self.num_store_blocks):
            raise InvariantError(
                f"{self.num_load_blocks} loads and {self.num_store_blocks} stores counted, {loads} and {stores} open"
            )
        for job in self._jobs.values():
            if job.num_left != job.answered.count(0) or not job.num_left:
                raise InvariantError(
                    f"job {job.serial}: {job.num_left} blocks left, {job.answered.count(0)} unanswered"
                )
