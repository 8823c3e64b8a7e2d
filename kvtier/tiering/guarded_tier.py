"""Guards one secondary tier: whatever the tier does, the manager sees values and no exception.

A tier is foreign code. It may raise, never answer a job, answer a job twice, answer a job that it was never given, or
return wrong bytes. The guard keeps the jobs that the tier has not answered. It does not use a tier that misbehaves.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence

from kvtier.abc import SecondaryTierManager
from kvtier.clock import Clock
from kvtier.errors import InvariantError
from kvtier.events import BlocksFailed, JobFinished, Observer, TierState, UnexpectedCall
from kvtier.keys import OffloadKey
from kvtier.primary.arena import arena_rows
from kvtier.secondary.jobs import Job
from kvtier.secondary.stand_ins import LateTier
from kvtier.secondary.standing import Breaker, Standing, StateTimes
from kvtier.tiering.digests import DigestLedger
from kvtier.tiering.late_stores import LateStores
from kvtier.tiering.patience import ProbePatience
from kvtier.tiering.tier_calls import TierCalls
from kvtier.types import (
    Admission,
    FailureCause,
    JobResult,
    LookupResult,
    OffloadingEvent,
    ReqContext,
    RequestOffloadingContext,
)

STORE_SHARE = 0.5
"""Most slots that unanswered stores of one tier pin, as a share of the primary's: the rest is left for new blocks."""
MOST_JOINED_BYTES = 64 << 20
"""Blocks that wait for the end of the step are sent before it from this size on: a tier limits its stores by what it
has got, and may take any job while it has none."""
FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 30.0
"""Shortest and longest pause before a tier that misbehaved is tried again."""
_UP, _STARTING, _DOWN = TierState.UP, TierState.STARTING, TierState.DOWN


class TierGuard(TierCalls):
    """A tier, its admission rule, its unanswered jobs and whether it may be used.

    Attributes:
        usable: whether lookups and jobs go to the tier now.
        joins_stores: whether the stores of one step are one job: then pass them to `join`.
        most_joined: from this number of blocks on, call `send_joined` before the step ends.
    """

    def __init__(
        self,
        tier: SecondaryTierManager,
        index: int,
        name: str,
        admission: Admission,
        clock: Clock,
        observer: Observer,
        job_ids: Iterator[int],
        tier_deadline: float,
        probe_deadline: float | None,
        num_slots: int,
        block_bytes: int,
    ) -> None:
        """Guard a tier that the caller has started.

        Args:
            job_ids: yields numbers that no job of any tier has had.
            tier_deadline: seconds without progress of any job, after which the tier is no longer used.
            probe_deadline: longest wait for the answer to a lookup, in seconds; None for the tier's own.
            num_slots, block_bytes: of the primary tier. A tier may keep its view in another shape.
        """
        super().__init__(tier)
        self.usable = False
        self.joins_stores = tier.joins_stores
        self._late = tier if isinstance(tier, LateTier) else None
        self.index = index
        self.name = name
        self.admission = admission
        self.jobs: dict[int, Job] = {}
        self._joined: Job | None = None
        """A store that the tier has not got yet, because others may join it until the step ends."""
        self._shares: list[tuple[ReqContext, int]] = []
        self._has_sent = False
        """Whether `_joined` was sent since the last `tell_ends`."""
        self.late = LateStores()
        self._ended_requests: dict[str, ReqContext] = {}
        """Requests that have ended, but have blocks in `_joined` or `late`. The tier learns it after these."""
        self._job_ids = job_ids
        self._num_storing = 0
        self._is_opening = False
        self._was_usable = False
        self.patience = ProbePatience(clock, tier.probe_deadline if probe_deadline is None else probe_deadline)
        self._clock = clock
        self._observer = observer
        self._tier_deadline = tier_deadline
        self._progressed_at, self._progress = 0.0, 0
        # One fault opens the breaker; a trial without a fault, as long as the pause, closes it. `draw` adds no random
        # part to a pause: a replay of a recording must decide as the engine did.
        breaker = Breaker(clock, 1, FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS, draw=lambda: 0.0, calm=1)
        self._standing = Standing(name, breaker, observer)
        self._times = StateTimes(clock())
        self._digests = None if tier.verifies_payloads else DigestLedger(arena_rows(tier.primary_kv_view))
        self._num_slots, self._block_bytes = num_slots, block_bytes
        self.most_joined = max(1, MOST_JOINED_BYTES // block_bytes)
        self._most_pinned = int(self._num_slots * STORE_SHARE)
        self._draining = False
        self._pending_epoch: bytes | None = None
        self._epoch_retry_at = 0.0
        self._closed = False

    # -- use, on the scheduler's thread -------------------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Return the tier's answer; MISS if the tier is not usable or raises, or if nobody could verify the bytes.

        RETRY while a tier that may hold blocks of earlier engines opens for the first time.
        """
        if not self.usable:
            return LookupResult.RETRY if self._is_opening else LookupResult.MISS
        if self._digests is not None and key not in self._digests:
            return LookupResult.MISS
        # Not through `ask`: this runs once per key of every scan, and a further call would cost more than the
        # try block, which CPython enters at no cost since 3.11.
        try:
            return self.tier.lookup(key, req_context)
        except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
            self._fault("lookup", fault)
            return LookupResult.MISS

    def can_store(self, num_blocks: int) -> bool:
        """Return whether the tier would take a store job of this size now.

        Unanswered stores pin at most `STORE_SHARE` of the primary, even if the tier would take more. A tier without
        unanswered stores may take a job of any size.
        """
        if not self.usable or self._busy is not None:
            return False
        if self._num_storing and self._num_storing + num_blocks > self._most_pinned:
            return False
        try:
            return bool(self.tier.can_store(num_blocks + self.num_joined))
        except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
            self._fault("can_store", fault)
            return False

    def open_job(self, keys: Sequence[OffloadKey], slots: list[int], context: ReqContext, *, is_promotion: bool) -> Job:
        """Return a new job for `hand_over`. Its slots stay pinned, or filling, until it has ended."""
        job_id, now = next(self._job_ids), self._clock()
        if not self._has_unanswered:
            self._progressed_at = now
        if not is_promotion:
            self._num_storing += len(slots)
        job = self.jobs[job_id] = Job(job_id, list(keys), list(slots), is_promotion, context, now, len(keys))
        return job

    @property
    def _has_unanswered(self) -> bool:
        """Whether the tier has got a job that it has not answered."""
        return len(self.jobs) > (self._joined is not None)

    @property
    def num_joined(self) -> int:
        """Number of blocks that wait for `send_joined`."""
        return 0 if self._joined is None else len(self._joined.slots)

    def join(self, keys: Sequence[OffloadKey], slots: list[int], context: ReqContext) -> None:
        """Add a request's blocks to the store job of this step, which `send_joined` submits."""
        job = self._joined
        if job is None:
            self._joined = job = self.open_job(keys, slots, context, is_promotion=False)
            self._shares = [(context, len(slots))]
            return
        self._num_storing += len(slots)
        job.keys, job.slots, job.num_left = [*job.keys, *keys], [*job.slots, *slots], job.num_left + len(slots)
        last, count = self._shares[-1]
        if last is context:
            self._shares[-1] = (context, count + len(slots))
        else:
            self._shares.append((context, len(slots)))

    def send_joined(self) -> tuple[Job, bool] | None:
        """Give the store job of this step to the tier.

        Returns:
            The job and whether the tier has taken it, as `hand_over` says; None if nothing was stored.
        """
        job = self._joined
        if job is None:
            return None
        if not self._has_unanswered:
            self._progressed_at = self._clock()
        self._joined = None
        self._has_sent = True
        shares, self._shares = self._shares, []  # the guard keeps no request that has ended
        if len(shares) > 1:
            job.shares = tuple(shares)
        return job, self.hand_over(job)

    def tell_ends(self) -> None:
        """Tell the tier of the requests that have ended and have no blocks left for it. `send_joined` comes before."""
        if not (self._has_sent or self.late.has_let_go):
            return
        self._has_sent = self.late.has_let_go = False
        for req_id, req_context in list(self._ended_requests.items()):
            if req_id not in self.late:
                del self._ended_requests[req_id]
                self.tell("on_request_finished", self.tier.on_request_finished, req_context)

    def hand_over(self, job: Job, *, is_hashed: bool = False) -> bool:
        """Give a job to the tier; return False, and forget the job, if the tier refused it.

        If digests are kept, the blocks of a store are hashed first. The tier gets the job when that is done.
        """
        if self._digests is not None and not job.is_promotion and not is_hashed:
            self._digests.begin(job)
            return True
        if self._busy is None:
            try:
                (self.tier.submit_load if job.is_promotion else self.tier.submit_store)(job.as_metadata())
                return True
            except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
                self._fault("submit_load" if job.is_promotion else "submit_store", fault)
        self._forget(job)
        return False

    def cancel_unwanted(self, unwanted: set[int]) -> None:
        """Tell the tier, once per job, that no request waits for load jobs whose slots are all among `unwanted`."""
        jobs = [
            job
            for job in self.jobs.values()
            if job.is_promotion and not job.is_cancelled and unwanted.issuperset(job.slots)
        ]
        for job in jobs:
            job.is_cancelled = True
        if jobs:
            self.tell("cancel_loads", self.tier.cancel_loads, [job.job_id for job in jobs])

    def _forget(self, job: Job) -> None:
        del self.jobs[job.job_id]
        if not job.is_promotion:
            self._num_storing -= len(job.slots)

    def forget_request(self, req_context: ReqContext) -> None:
        """Tell the tier that a request is over; if blocks wait for the end of the step or for a less busy tier, after
        them.
        """
        self.patience.forget(req_context)
        if self._joined is None and req_context.req_id not in self.late:
            self.tell("on_request_finished", self.tier.on_request_finished, req_context)
        else:
            self._ended_requests[req_context.req_id] = req_context

    def begin_request(self, req_context: ReqContext) -> RequestOffloadingContext | None:
        """Tell the tier of a new request; return its answer, None if it gives none."""
        before = self._ended_requests.pop(req_context.req_id, None)
        if before is not None:  # the engine uses its name again
            self.late.drop(req_context.req_id)
            self.tell("on_request_finished", self.tier.on_request_finished, before)
        nothing: RequestOffloadingContext | None = None
        return self.ask("on_new_request", nothing, self.tier.on_new_request, req_context)

    def readings(self) -> dict[str, float]:
        """Return the metrics of this tier by name. The guard's own values replace those that the tier gives."""
        num_jobs, num_blocks = len(self.jobs), sum(len(job.slots) for job in self.jobs.values())
        num_loads = sum(job.is_promotion for job in self.jobs.values())
        nothing: dict[str, float] = {}
        return {
            **self.ask("get_stats", nothing, lambda: _numbers(self.tier.get_stats())),
            "jobs": num_jobs,
            "store_jobs_in_flight": num_jobs - num_loads,
            "load_jobs_in_flight": num_loads,
            "store_blocks_in_flight": self._num_storing,
            "load_blocks_in_flight": num_blocks - self._num_storing,
            "storing_share": self._num_storing / self._num_slots,
            "loading_share": (num_blocks - self._num_storing) / self._num_slots,
            "up": float(self.usable),
            **self._times.readings(self._clock()),
        }

    def describe(self) -> tuple[TierState, str]:
        """Return the tier's state, seen from outside, and the reason for it."""
        if self._standing.fault is not None:
            return TierState.DOWN, self._standing.fault
        state = self.ask("state", _DOWN, lambda: self.tier.state)
        return state, self.ask("state_reason", "", lambda: self.tier.state_reason)

    def take_events(self) -> list[OffloadingEvent]:
        """Return the tier's KV events since the last call; none if it fails."""
        nothing: list[OffloadingEvent] = []
        return self.ask("take_events", nothing, lambda: list(self.tier.take_events()))

    # -- once a step --------------------------------------------------------------------------------------

    def poll(self) -> list[Job]:
        """Return the jobs that have ended since the last call, and decide whether the tier may be used.

        The keys that succeeded are in each job's `successful`.
        """
        ended: list[Job] = []
        if self._closed:
            return ended
        if self._busy is not None:
            if self._busy.is_alive():
                self._down("does not come back")
                return ended
            self._busy = None
        if self._late is not None:
            self._take_successor(self._late)
        if self._digests is not None and self._digests.hashing:
            self._take_hashed(self._digests, ended)
        results: list[JobResult] = []  # `extend` keeps what a generator yielded before it raised
        try:
            results.extend(self.tier.get_finished_jobs())
        except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
            self._fault("get_finished_jobs", fault)
        for result in results:
            self._take_result(result, ended)
        self._draining = False
        self._refresh()
        if self.usable and self.patience.question is not None:
            self.patience.follow(self.lookup)
        if self._pending_epoch is not None:
            self._resume_epoch(self._pending_epoch)
        return ended

    def _take_successor(self, late: LateTier) -> None:
        """Replace the stand-in by the real tier once that is ready, and start the current epoch there."""
        tier = late.take_successor()
        if tier is None:
            return
        self.tier, self._late = tier, None
        if late.epoch is not None:
            self.start_epoch(late.epoch)

    def _take_result(self, result: JobResult, ended: list[Job]) -> None:
        job: Job | None = None
        successful: Collection[OffloadKey] = ()
        num_bytes, seconds, latency, num_moved = 0, 0.0, 0.0, 0
        try:
            job = self.jobs.get(result.job_id)
            if job is not None:
                seconds = latency = self._clock() - job.submitted
                successful, num_bytes, seconds = _read(result, job.keys, latency)
                num_moved = len(successful)
                if result.transfer_bytes is not None:  # the tier tells which of them it had already
                    num_moved = min(num_moved, -(-num_bytes // self._block_bytes))
        except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
            self._fault("get_finished_jobs", fault)
        if job is None or job is self._joined or (self._digests is not None and job in self._digests.hashing):
            self._observer.on_event(UnexpectedCall(f"result of tier {self.name}", 1))
            return
        job.successful, job.num_bytes = successful, num_bytes
        self._observer.on_event(
            JobFinished(
                self.name, job.is_promotion, len(job.keys), len(successful), num_bytes, seconds, num_moved, latency
            )
        )
        if self._digests is None or not job.is_promotion or not successful:
            self._end(job, ended)
        elif self._draining:  # the primary is about to forget the blocks anyway
            job.successful = ()
            self._end(job, ended)
        else:
            self._digests.begin(job)

    def _end(self, job: Job, ended: list[Job]) -> None:
        self._forget(job)
        self._progressed_at = self._clock()
        ended.append(job)

    def _take_hashed(self, digests_of: DigestLedger, ended: list[Job]) -> None:
        """Handle jobs whose digests are computed: hand over the stores, and accept what loads returned unchanged."""
        for job, digests in digests_of.take_hashed():
            self._progressed_at = self._clock()
            if job.is_promotion:
                good = frozenset(job.successful).intersection(digests_of.matching(job.keys, digests))
                num_wrong = len(job.successful) - len(good)
                if num_wrong:
                    self._observer.on_event(BlocksFailed(self.name, FailureCause.CORRUPT, num_wrong))
                    self._down(f"returned {num_wrong} blocks with wrong bytes")
                job.successful = good
                self._end(job, ended)
            elif self._draining:  # nothing may be handed over between a drain and the new epoch
                self._end(job, ended)
            else:
                digests_of.record(job.keys, digests)
                if not self.hand_over(job, is_hashed=True):
                    ended.append(job)

    def _refresh(self) -> None:
        now = self._clock()
        try:
            state, progress = self.tier.state, self.tier.progress
        except Exception as fault:  # noqa: BLE001 - a tier's fault never reaches the engine: it is reported
            self._fault("state", fault)
            state, progress = TierState.DOWN, self._progress
        if progress != self._progress:
            self._progress, self._progressed_at = progress, now
        if self._has_unanswered and self._is_overdue(now):
            self._down("its jobs make no progress", is_told=state is _DOWN)
        elif self._standing.fault is not None and self._pending_epoch is None:
            self._reconsider()
        is_trusted = self._standing.is_trusted
        if is_trusted and state is _UP and not self.usable:
            self._was_usable = True
            self.patience.begin_life()
        self.usable = is_trusted and state is _UP
        seen = state if is_trusted else _DOWN
        if seen is not self._times.state:
            self._times.enter(seen, now)
        self._is_opening = is_trusted and state is _STARTING and self.tier.persistent and not self._was_usable

    def _reconsider(self) -> None:
        """Try the tier when its pause is over, and trust it after a trial without a fault."""
        standing = self._standing
        if not standing.breaker.try_again() and standing.breaker.has_passed_trial:
            standing.breaker.succeed()
            standing.recover()
            if standing.state is _DOWN:
                standing.change(_UP, "works again")

    def _is_overdue(self, now: float) -> bool:
        """Return whether no job has progressed for too long. A job that waits while others progress is not late."""
        return now - self._progressed_at > self._tier_deadline

    # -- faults -------------------------------------------------------------------------------------------

    def _fault(self, where: str, fault: Exception) -> None:
        self._down(f"{where} raised {type(fault).__name__}: {fault}")

    def _down(self, reason: str, *, is_told: bool = False) -> None:
        """Stop using the tier for a while. Only the first fault is published until it works again."""
        self.usable = False
        self._standing.lose(reason, is_told=is_told or self._standing.fault is not None)
        self._times.enter(_DOWN, self._clock())

    # -- reset and end ------------------------------------------------------------------------------------

    def start_epoch(self, epoch: bytes) -> None:
        """Make all blocks stored so far miss. The tier stays down until it has begun the epoch."""
        self._pending_epoch = epoch
        if self._digests is not None:
            self._digests.clear()
        if self.jobs or self._busy is not None:
            self._down("jobs unanswered at a reset")
        else:
            self._begin_epoch(epoch)

    def _begin_epoch(self, epoch: bytes) -> None:
        if self.tell("start_epoch", self.tier.start_epoch, epoch):
            self._pending_epoch = None
            if self._digests is not None:
                self._digests.clear()
        else:
            self._epoch_retry_at = self._standing.breaker.retry_at

    def _resume_epoch(self, epoch: bytes) -> None:
        """Start the epoch that had to wait, once every job has been answered. If the tier fails, try again later."""
        if not self.jobs and self._clock() >= self._epoch_retry_at:
            self._begin_epoch(epoch)

    def begin_drain(self) -> None:
        """Hand over no waiting store until the next poll has ended, because the cache is being reset."""
        self._draining = True

    def drain(self) -> None:
        """Wait until the tier touches no primary memory. Runs on a thread of its own; the caller limits the wait."""
        if self._digests is not None:
            self._digests.wait()
        self.tier.drain_jobs()

    def busy_with(self, thread: threading.Thread | None) -> None:
        """Make no call of the tier until `thread` has returned from its own; None allows calls at once."""
        self._busy = thread

    def shutdown(self) -> None:
        """End the tier and the thread for digests. Runs on a thread of its own; the caller limits the wait."""
        self.usable, self._closed = False, True
        self._times.enter(TierState.CLOSED, self._clock())
        self.tier.shutdown()
        if self._digests is not None:
            self._digests.close()

    def has_live_cascade(self, now: float) -> bool:
        """Return whether a store waits for the end of the step, or is unanswered and the tier makes progress."""
        return self._joined is not None or (self._num_storing > 0 and not self._is_overdue(now))

    def check_invariants(self) -> None:
        """Raise InvariantError if an ended job is being hashed or stores are miscounted; then check the tier."""
        if self._digests is not None and not self._digests.hashing.keys() <= set(self.jobs.values()):
            raise InvariantError(f"tier {self.name} hashes jobs that nobody waits for")
        if self._num_storing != sum(len(job.slots) for job in self.jobs.values() if not job.is_promotion):
            raise InvariantError(f"tier {self.name} miscounts the blocks of its stores")
        self.late.check_invariants()
        self.tier.check_invariants()


def _numbers(stats: Mapping[str, float]) -> dict[str, float]:
    return {str(name): float(value) for name, value in stats.items()}


def _read(result: JobResult, keys: Sequence[OffloadKey], took: float) -> tuple[Collection[OffloadKey], int, float]:
    """Return the keys that succeeded, the bytes moved and the seconds taken, from a tier's result.

    Args:
        took: seconds since the job was submitted, for a result that does not say.

    Raises:
        Exception: of any kind, if the fields have wrong types.
    """
    successful = keys if result.success else frozenset(keys).intersection(result.successful_keys or ())
    seconds = took if result.transfer_time is None else float(result.transfer_time)
    return successful, int(result.transfer_bytes or 0), seconds
