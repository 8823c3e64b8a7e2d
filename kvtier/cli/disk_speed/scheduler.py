"""A busy scheduler for measurements: steps of pure Python work, as in engines, and calls of a tier between them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from kvtier.keys import OffloadKey
from kvtier.types import JobMetadata, JobResult, ReqContext, ScheduleEndContext

STEP_SECONDS = 0.002
"""Duration of one step's Python work on an idle processor."""


class MeasuredTier(Protocol):
    """What the scheduler calls of a tier."""

    @property
    def block_bytes(self) -> int: ...
    def can_store(self, num_blocks: int, /) -> bool: ...
    def submit_store(self, job_metadata: JobMetadata, /) -> None: ...
    def submit_load(self, job_metadata: JobMetadata, /) -> None: ...
    def get_finished_jobs(self) -> Iterable[JobResult]: ...
    def on_schedule_end(self, context: ScheduleEndContext, /) -> None: ...


@dataclass
class Steps:
    """Times that the scheduler's thread spent, in seconds.

    Attributes:
        steps: per step, its whole duration.
        polls: per step, the time in the tier, without submissions.
        polls_per_job: per step in which jobs ended, the time in the tier divided by the number of these jobs.
        submits: per job, its submission.
        work_cpu: processor time of all steps' Python work, without the tier.
    """

    steps: list[float] = field(default_factory=list)
    polls: list[float] = field(default_factory=list)
    polls_per_job: list[float] = field(default_factory=list)
    submits: list[float] = field(default_factory=list)
    work_cpu: float = 0.0

    def job_seconds(self) -> float:
        """Return the thread's time per job: the median submission plus the median share of a poll."""
        return float(np.median(self.submits) + np.median(self.polls_per_job))


class BusyScheduler:
    """Drives a tier as the tiering manager does, between pieces of pure Python work."""

    def __init__(self, tier: MeasuredTier, num_slots: int, most_bytes: int) -> None:
        """Args: num_slots: of the arena; most_bytes: limit of loads in flight (the tier itself limits its stores)."""
        self._tier = tier
        self._num_slots = num_slots
        self._most_blocks = max(1, most_bytes // tier.block_bytes)
        self._context = ReqContext("speed")
        self._job_id = 0
        self._turns = turns_for(STEP_SECONDS)
        self.num_failed = 0
        """Number of jobs of which a block failed."""

    def idle(self, done: Callable[[], bool], beside: Callable[[], None] | None = None) -> Steps:
        """Run steps without jobs until `done()`. Call `beside` once per step; its time does not count."""
        steps = Steps()
        while not done():
            start = time.perf_counter()
            work(self._turns)
            if beside is not None:
                ran = time.perf_counter()
                beside()
                start += time.perf_counter() - ran
            polled = time.perf_counter()
            list(self._tier.get_finished_jobs())
            self._tier.on_schedule_end(ScheduleEndContext())
            end = time.perf_counter()
            steps.steps.append(end - start)
            steps.polls.append(end - polled)
        return steps

    def run(self, keys: Sequence[OffloadKey], job_blocks: int, load: bool) -> tuple[float, Steps]:
        """Move the blocks in jobs of `job_blocks`; return the total seconds and the thread's times."""
        waiting = deque(keys[start : start + job_blocks] for start in range(0, len(keys), job_blocks))
        in_flight: dict[int, int] = {}
        slots, num_in_flight, steps = self._slots(job_blocks), 0, Steps()
        began = start = time.perf_counter()
        while waiting or in_flight:
            worked = time.thread_time()
            work(self._turns)
            steps.work_cpu += time.thread_time() - worked
            polled = time.perf_counter()
            results = list(self._tier.get_finished_jobs())
            poll = time.perf_counter() - polled
            for result in results:
                num_in_flight -= in_flight.pop(result.job_id)
                self.num_failed += not result.success
            while waiting and self._takes(len(waiting[0]), num_in_flight, load):
                job = self._job(waiting.popleft(), next(slots), load)
                submitted = time.perf_counter()
                (self._tier.submit_load if load else self._tier.submit_store)(job)
                steps.submits.append(time.perf_counter() - submitted)
                in_flight[job.job_id] = len(job.keys)
                num_in_flight += len(job.keys)
            flushed = time.perf_counter()
            self._tier.on_schedule_end(ScheduleEndContext())
            end = time.perf_counter()
            poll += end - flushed
            steps.steps.append(end - start)
            steps.polls.append(poll)
            if results:
                steps.polls_per_job.append(poll / len(results))
            start = end
        return end - began, steps

    def _takes(self, num_blocks: int, num_in_flight: int, load: bool) -> bool:
        """Return whether there are slots for a job and the tier accepts it; two jobs in flight are always allowed."""
        if not num_in_flight:
            return True
        if num_in_flight + num_blocks > min(self._num_slots, max(2 * num_blocks, self._most_blocks)):
            return False
        return load or self._tier.can_store(num_blocks)

    def _slots(self, job_blocks: int) -> Iterator[np.ndarray]:
        """Yield runs of neighbouring slots, around the arena: a slot comes again only after its job has ended."""
        first, end = 0, self._num_slots // job_blocks * job_blocks
        while True:
            first %= end
            yield np.arange(first, first + job_blocks, dtype=np.int32)
            first += job_blocks

    def _job(self, keys: Sequence[OffloadKey], slots: np.ndarray, load: bool) -> JobMetadata:
        self._job_id += 1
        return JobMetadata(self._job_id, keys, slots[: len(keys)], load, self._context)


def work(turns: int) -> int:
    """Run a loop of pure Python `turns` times."""
    total = 0
    for turn in range(turns):
        total += turn * turn % 7
    return total


def turns_for(seconds: float) -> int:
    """Return how many turns of `work` take `seconds` on an idle processor."""
    turns = 10_000
    times = []
    for _ in range(20):
        start = time.perf_counter()
        work(turns)
        times.append(time.perf_counter() - start)
    return max(1, int(turns * seconds / min(times)))
