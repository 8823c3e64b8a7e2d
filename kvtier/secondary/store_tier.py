"""The base of all tiers over a store: executor, jobs, deadlines, back-pressure, drain, epochs, shutdown."""

from __future__ import annotations

import secrets
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from kvtier import forks
from kvtier.abc import BlockStore, EvictionPolicy, SecondaryTierManager, SlotStore, TierContext
from kvtier.descriptors import Descriptor
from kvtier.errors import ConfigError, ProtocolError
from kvtier.events import Observers, TierState
from kvtier.executors.base import IOExecutor, Report, StoreDescription
from kvtier.executors.inline import InlineExecutor
from kvtier.executors.process import IOProcess
from kvtier.executors.protocol import ChoreDone, Delete, PartResult
from kvtier.executors.threads import ThreadExecutor
from kvtier.keys import OffloadKey
from kvtier.namespace import Namespace
from kvtier.options import TierOptions
from kvtier.primary.arena import arena_rows
from kvtier.secondary.chores import KEYS_PER_CHORE, Chores, Deletion, failed
from kvtier.secondary.jobs import JobLedger, MovingJob
from kvtier.secondary.settings import TierSettings
from kvtier.secondary.standing import Breaker, BreakerState, Standing
from kvtier.secondary.supervisor import Supervisor
from kvtier.secondary.trial import check_or_try
from kvtier.types import Answer, FailureCause, JobMetadata, JobResult, ScheduleEndContext

_UP, _OPEN = TierState.UP, BreakerState.OPEN
_BYTES = frozenset({bytes})
_FEW = 64
"""Number of slots up to which a list of them is quicker than a call of numpy, which takes some microseconds."""
_INT32, _UINT32 = np.dtype(np.int32), np.dtype(np.uint32)
_BREAKING = frozenset({FailureCause.IO_ERROR, FailureCause.TIER_DOWN})


def store_path(store: str | type[SlotStore] | type[BlockStore]) -> str:
    """Return "module:Class" for a store that is given as such a string or as a class.

    Raises:
        ConfigError: the I/O process could not import the class, since it is of `__main__` or defined in a function.
    """
    if isinstance(store, str):
        return store
    path = f"{store.__module__}:{store.__qualname__}"
    if store.__module__ == "__main__" or "<locals>" in store.__qualname__:
        raise ConfigError("store", path, "a class at the top of a module that another process can import")
    return path


class StoreTierManager(forks.ProcessBound, SecondaryTierManager):
    """A tier over a store that an executor runs, usually in another process. Subclasses have the index, if any."""

    joins_stores = True
    needs_namespace: ClassVar[bool] = True
    """Whether blocks outlive the process. Such a tier needs a namespace from the engine."""
    options_type: ClassVar[type[TierOptions] | None] = None
    """The struct that declares the constructor's keywords; None if the constructor's signature declares them."""

    @classmethod
    def check_options(
        cls, options: Mapping[str, Any], block_bytes: int, policies: Mapping[str, type[EvictionPolicy]]
    ) -> None:
        """Check the options with their struct or, without one, by calling the constructor, which has no side
        effects.
        """
        check_or_try(cls, options, block_bytes, policies)

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        *,
        store: str | type[SlotStore] | type[BlockStore],
        options: Mapping[str, Any],
        settings: TierSettings | None = None,
    ) -> None:
        """Args:
        store: the class, or "module:Class".
        options: for the store's `open`; JSON values.
        settings: None for the defaults.

        Raises:
            ConfigError: the engine gave no namespace, and the tier needs one; or `store_path` refuses the class.
        """
        super().__init__(offloading_spec, primary_kv_view, tier_type)
        context = getattr(offloading_spec, "tier_context", None)
        context = context if isinstance(context, TierContext) else TierContext()
        self.context: TierContext = replace(context, observer=Observers.over(context.observer))
        self.settings = settings or TierSettings()
        namespace = self.context.namespace
        if namespace is None:
            if self.needs_namespace:
                raise ConfigError(
                    "namespace",
                    None,
                    f"expected for tier {tier_type}: it keeps blocks for later engines, so it must know their model",
                )
            namespace = Namespace({"process": secrets.token_hex(8)})
        self.num_blocks, self.block_bytes = _shape(primary_kv_view)
        self._store = store_path(store)
        self._options = dict(options)
        self._namespace = namespace
        clock, observer = self.context.clock, self.context.observer
        self._ledger = JobLedger(tier_type, clock, observer)
        self._chores = Chores(clock)
        deadlines, settings = self.settings.deadlines, self.settings
        breaker, self._store_breaker = (
            Breaker(clock, settings.failures_to_open, settings.first_backoff, settings.longest_backoff)
            for _ in range(2)
        )
        self._standing = Standing(tier_type, breaker, observer)
        self._supervisor = Supervisor(
            self._make_executor, self._ledger, self._standing, self._store_breaker, clock, deadlines, self._end_life
        )
        arena_fd = None if self.context.inline_io else self.context.arena_fd
        self._arena = None if arena_fd is None else Descriptor(arena_fd)
        self._most_store_blocks = max(1, self.settings.most_store_bytes // self.block_bytes)
        forks.register(self)

    def leave_to_parent(self) -> None:
        """In a forked child, have no blocks and accept none; the parent's executor goes on."""
        self._supervisor.leave_to_parent()
        self._chores.end_life()
        self._forget()

    @property
    def state(self) -> TierState:
        """The tier's state."""
        return self._standing.state

    @property
    def state_reason(self) -> str:
        """Why the tier has this state; "" if there is nothing to say."""
        return self._standing.reason

    @property
    def progress(self) -> int:
        """Number of blocks that the executor has answered so far."""
        return self._ledger.num_answered

    @property
    def io_pid(self) -> int | None:
        """Pid of the tier's I/O process; None if there is none at the moment."""
        executor = self._supervisor.executor
        return executor.pid if executor is not None else None

    def start(self) -> None:
        """Start the executor; a second call does nothing."""
        if self._supervisor.is_idle:
            self._supervisor.start()
            self._pump()

    def submit_store(self, job_metadata: JobMetadata) -> None:
        """Start a store job. If `can_store` is False, the job's result is a failure."""
        executor = self._executor_for(job_metadata, self.can_store(len(job_metadata.keys)))
        if executor is not None and (job := self._begin_store(job_metadata)) is not None:
            for part in job.parts():
                executor.submit(part)

    def submit_load(self, job_metadata: JobMetadata) -> None:
        """Start a load job. If the tier is not UP, the job's result is a failure."""
        if self._standing.state is not _UP:
            self.start()
        executor = self._executor_for(job_metadata, True)
        if executor is not None and (job := self._begin_load(job_metadata)) is not None:
            for part in job.parts():
                executor.submit(part)

    def cancel_loads(self, job_ids: Collection[int]) -> None:
        """Tell the executor not to begin the remaining blocks of these jobs."""
        self._cancel(self._ledger.serials(frozenset(job_ids)))

    def _cancel(self, serials: Collection[int]) -> None:
        executor = self._supervisor.executor
        if executor is not None and serials:
            executor.cancel(serials)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Poll the executor; return the results since the last call."""
        self._pump()
        return self._ledger.take_results()

    def can_store(self, num_blocks: int) -> bool:
        """Return whether stores work and the queue has room for the blocks; a nearly empty queue accepts any job."""
        if self._standing.state is not _UP:
            self.start()
        waiting = self._ledger.num_store_blocks
        room = waiting <= self._most_store_blocks // 4 or waiting + num_blocks <= self._most_store_blocks
        works = self._standing.state is _UP and self._store_breaker.state is not _OPEN
        return works and (not waiting or room)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Send the parts submitted in this step together. Polling is done by `get_finished_jobs`, once per step."""
        executor = self._supervisor.executor
        if executor is not None:
            executor.flush()

    def drain_jobs(self) -> None:
        """Cancel waiting jobs, wait at most `deadlines.drain` for running ones, then kill the executor."""
        self._cancel(self._ledger.serials())
        self._wait_for_jobs(self.settings.deadlines.drain)
        if self._ledger.num_jobs:
            self._supervisor.fail("its jobs did not end at a drain")
            self._supervisor.kill()
            self._wait_for_jobs(self.settings.deadlines.kill)

    def start_epoch(self, epoch: bytes) -> None:
        """Start a new executor with the epoch's namespace. The tier is STARTING until its store is open."""
        self._namespace = self._namespace.with_epoch(epoch)
        self._chores.end_life()
        self._forget()
        self._supervisor.restart()

    def shutdown(self) -> None:
        """Wait at most `deadlines.drain` for jobs, then end the executor; kill it if it does not end."""
        self._wait_for_jobs(self.settings.deadlines.drain / 2)
        if self._ledger.num_jobs:
            self._cancel(self._ledger.serials())
            self._wait_for_jobs(self.settings.deadlines.drain / 2)
        self._supervisor.close()
        self._wait(self.settings.deadlines.drain, lambda: self._supervisor.has_executor)
        if self._supervisor.has_executor:
            self._supervisor.kill()
            self._wait(self.settings.deadlines.kill, lambda: self._supervisor.has_executor)

    def get_stats(self) -> Mapping[str, float]:
        """Return the number of breaker openings."""
        return {"breaker_openings": self._supervisor.num_breaker_openings}

    def check_invariants(self) -> None:
        """Raise InvariantError if ledger and supervisor contradict themselves or each other."""
        self._ledger.check_invariants()
        self._supervisor.check_invariants()

    @abstractmethod
    def _begin_store(self, metadata: JobMetadata) -> MovingJob | None:
        """Open a store job in the ledger, with the slots that it needs; return None if it already has its result."""

    @abstractmethod
    def _begin_load(self, metadata: JobMetadata) -> MovingJob | None:
        """Open a load job, as `_begin_store` does."""

    @abstractmethod
    def _end_store(self, job: MovingJob, result: PartResult) -> None:
        """Apply a result for some blocks of a store job to the index."""

    @abstractmethod
    def _end_load(self, job: MovingJob, result: PartResult) -> None:
        """Apply a result for some blocks of a load job to the index."""

    @abstractmethod
    def _handle(self, report: Report) -> None:
        """Handle a report that is not a `PartResult`.

        Raises:
            ProtocolError: the report is not valid for this tier or at this time.
        """

    @abstractmethod
    def _forget(self) -> None:
        """Forget the index, so that all lookups miss until it is known again."""

    def _executor_for(self, metadata: JobMetadata, fits: bool) -> IOExecutor | None:
        """Return the executor for a job; if the job cannot be accepted, refuse it and return None."""
        executor = self._supervisor.executor
        if executor is None or self._standing.state is not _UP:
            self._ledger.refuse(metadata, FailureCause.TIER_DOWN)
        elif not fits or not self._is_sound(metadata):
            self._ledger.refuse(metadata, FailureCause.CANCELLED)
        else:
            return executor
        return None

    def _is_sound(self, metadata: JobMetadata) -> bool:
        """Return whether a job has bytes as keys and one slot of the arena per key."""
        slots, keys = metadata.block_ids, metadata.keys
        if len(slots) != len(keys) or slots.dtype != _INT32 or not _BYTES.issuperset(map(type, keys)):
            return False
        if len(slots) <= _FEW:
            numbers = slots.tolist()
            return not numbers or (min(numbers) >= 0 and max(numbers) < self.num_blocks)
        # Read as unsigned, a negative slot is too large: one look at each slot instead of two.
        return bool(slots.view(_UINT32).max() < self.num_blocks)

    def _pump(self) -> None:
        executor = self._supervisor.attend()
        try:
            for report in self._supervisor.heed(executor.poll()) if executor is not None else ():
                if isinstance(report, ChoreDone):
                    self._chores.end(report)
                    continue
                if not isinstance(report, PartResult):
                    self._handle(report)
                    continue
                job = self._ledger.apply(report)
                if report.failures and FailureCause.BUSY in report.failures:
                    self._supervisor.pause_stores()
                if job.is_promotion:
                    self._end_load(job, report)
                else:
                    self._end_store(job, report)
                if not job.num_left:
                    is_broken = bool(job.failures) and not _BREAKING.isdisjoint(job.failures)
                    self._supervisor.job_ended(job.num_bytes > 0, is_broken, is_store=not job.is_promotion)
        except ProtocolError as error:
            self._supervisor.fail(f"I/O process sent an invalid message: {error}")
            return
        self._supervisor.check_hang()
        if self._chores and self._chores.expire(self.settings.deadlines.job):
            self._supervisor.question_expired()

    def _delete(
        self,
        keys: Sequence[OffloadKey],
        slots: Sequence[int] | None,
        absent: Iterable[OffloadKey],
        on_end: Callable[[Sequence[OffloadKey], Sequence[int], bool], None],
    ) -> Answer[Any]:
        """Let the executor delete blocks; return the answer to the whole deletion.

        Args:
            slots: of the store, if it has slots.
            absent: further keys of the deletion.
            on_end: called with some of `keys` and their slots, and whether the store has deleted them.
        """
        executor = self._supervisor.executor
        if executor is None:
            return failed()
        deletion = Deletion(keys, absent)
        for start in range(0, len(keys), KEYS_PER_CHORE):
            some = keys[start : start + KEYS_PER_CHORE]
            places = None if slots is None else slots[start : start + KEYS_PER_CHORE]

            def end(report: ChoreDone, some: Any = some, places: Any = places) -> None:
                on_end(some, places or (), not report.failed)
                deletion.end_chore()

            executor.do(Delete.of(self._chores.begin(deletion.answer, end), some, places))
        return deletion.answer

    def _end_life(self) -> None:
        self._chores.end_life()
        self._forget()
        self._ledger.fail_all(FailureCause.TIER_DOWN)

    def _wait_for_jobs(self, seconds: float) -> None:
        self._wait(seconds, lambda: self._ledger.num_jobs > 0)

    def _wait(self, seconds: float, busy: Any) -> None:
        """Poll until `busy()` is False, at most `seconds` of real time."""
        deadline = time.monotonic() + seconds
        self._pump()
        while busy() and (left := deadline - time.monotonic()) > 0:
            if self._supervisor.executor is not None:
                self._supervisor.executor.wait(min(left, 0.02))
            self._pump()

    def _make_executor(self) -> IOExecutor:
        description = StoreDescription(
            path=self._store,
            options=self._options,
            namespace=self._namespace,
            num_blocks=self.num_blocks,
            block_bytes=self.block_bytes,
            threads=self.settings.threads,
            call_bytes=self.settings.call_bytes,
            arena_is_foreign=self.context.arena_is_foreign,
            environment_secrets=self.settings.environment_secrets,
        )
        if self.context.inline_io:
            return InlineExecutor(description, arena_rows(self.primary_kv_view))
        if self._arena is None:
            return ThreadExecutor(description, arena_rows(self.primary_kv_view))
        return IOProcess(description, self._arena)


def _shape(view: memoryview) -> tuple[int, int]:
    if view.ndim != 2 or view.itemsize != 1 or view.readonly or not view.c_contiguous:
        raise ConfigError(
            "primary_kv_view", view.shape, "a writable memoryview of bytes, shape (num_blocks, block_bytes)"
        )
    num_blocks, block_bytes = view.shape or (0, 0)
    return num_blocks, block_bytes
