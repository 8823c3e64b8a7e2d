"""A simulated secondary tier: the production table and policy with a simulated device.

It makes the same decisions as `SlottedTierManager`, without the processes, messages and breakers that real I/O needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence

from kvtier.abc import EvictionPolicy, SecondaryTierManager
from kvtier.clock import Clock
from kvtier.events import BlocksEvicted, Observer
from kvtier.keys import OffloadKey
from kvtier.primary.retention import Retention
from kvtier.primary.table import BlockTable
from kvtier.primary.uses import TierUses
from kvtier.secondary.jobs import Job
from kvtier.secondary.settings import TierSettings
from kvtier.simulator.devices import Device, DeviceSpeed
from kvtier.types import (
    JobMetadata,
    JobResult,
    Locality,
    LookupResult,
    Medium,
    ReqContext,
    RequestOffloadingContext,
)

_HIT, _MISS = LookupResult.HIT, LookupResult.MISS


class SimulatedTierManager(SecondaryTierManager):
    """A tier with slots on a simulated device.

    Attributes:
        table: the slots of the tier's blocks.
        device: computes when transfers end.
        written: (time of submission in seconds, bytes) of every write, in order.
    """

    medium = Medium.STORAGE
    locality = Locality.LOCAL
    verifies_payloads = True
    joins_stores = True

    def __init__(
        self,
        name: str,
        primary_kv_view: memoryview,
        *,
        policy: EvictionPolicy,
        block_bytes: int,
        speed: DeviceSpeed,
        clock: Clock,
        observer: Observer,
        retention: Retention,
    ) -> None:
        """Args:
        policy: an empty policy; its capacity is the tier's capacity in blocks.
        block_bytes: simulated bytes per block; back-pressure counts these, not the row size of `primary_kv_view`.
        """
        super().__init__(None, primary_kv_view, name)
        self.table = BlockTable(policy.capacity, policy)
        self._uses = TierUses(clock, retention)
        self.device: Device[Job] = Device(speed, clock)
        self._block_bytes = block_bytes
        self._clock, self._observer = clock, observer
        self._most_stores = max(1, TierSettings.most_store_bytes // block_bytes)
        self._num_storing = 0
        self._unmoved: deque[Job] = deque()
        self.written: list[tuple[float, int]] = []

    @property
    def progress(self) -> int:
        """Bytes moved so far; while they grow, a long job is slow but does not hang."""
        return self.device.moved_bytes

    def has_news(self) -> bool:
        """Return whether a job has ended whose result was not collected."""
        return bool(self._unmoved) or self.device.has_finished()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Return HIT for a block that can be loaded now, else MISS."""
        slot = self.table.slot_of.get(key)
        return _MISS if slot is None or slot in self.table.filling else _HIT

    def can_store(self, num_blocks: int) -> bool:
        """Return whether the queue of stores has room for the blocks; an empty queue takes any job."""
        return not self._num_storing or self._num_storing + num_blocks <= self._most_stores

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Count a use of the keys that the tier has, at most one use per block and request.

        Args:
            keys: in the order of the prefix.
        """
        self._uses.touch(self.table, keys, req_context)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._uses.begin(req_context)
        return super().on_new_request(req_context)

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Order the request's blocks in the policy by their positions in the prompt, as far as they are known."""
        self._uses.end(self.table, req_context)

    def submit_store(self, job_metadata: JobMetadata) -> None:
        """Write the blocks that the tier does not have, as far as slots can be freed."""
        table = self.table
        slots: list[int] = []
        successful: list[OffloadKey] = []
        for context, keys in job_metadata.by_request():
            placement = self._uses.plan_store(table, keys, context)
            if len(placement.keys) + placement.num_left_out < len(keys):
                here = [key for key in keys if table.is_ready(key)]
                self._uses.touch(table, here, context)
                successful += here
            slots += self._uses.store(table, keys, placement, context)
            successful += placement.keys
            if placement.victims:
                self._observer.on_event(BlocksEvicted(self.tier_type, placement.victims))
        job = self._open(job_metadata, slots, successful)
        self._num_storing += len(slots)
        if slots:
            self.written.append((job.submitted, job.num_bytes))
            self.device.write(job, job.num_bytes)
        else:
            self._unmoved.append(job)

    def submit_load(self, job_metadata: JobMetadata) -> None:
        """Pin and read the blocks that the tier has."""
        table, keys = self.table, job_metadata.keys
        slots = table.ready_slots(keys)
        if slots is None:
            keys = [key for key in keys if table.is_ready(key)]
            slots = table.slot_of.values_of(keys)
        table.pin(slots)
        self._uses.load(table, keys, job_metadata.req_context)
        job = self._open(job_metadata, slots, keys)
        if slots:
            self.device.read(job, job.num_bytes)
        else:
            self._unmoved.append(job)

    def _open(self, metadata: JobMetadata, slots: Sequence[int], successful: Sequence[OffloadKey]) -> Job:
        """Return a job that moves blocks of the device's `slots`. Simulated blocks do not fail: the rest are absent."""
        job_id, is_promotion, context = metadata.job_id, metadata.is_promotion, metadata.req_context
        num_bytes = len(slots) * self._block_bytes
        return Job(job_id, metadata.keys, slots, is_promotion, context, self._clock(), 0, successful, num_bytes)

    def cancel_loads(self, job_ids: Collection[int]) -> None:
        """Cancel the reads of these jobs that the device has not begun; such a job ends with no block."""
        unwanted = frozenset(job_ids)
        for job in self.device.cancel_reads(lambda job: job.job_id in unwanted):
            self.table.unpin(job.slots)
            job.slots, job.successful, job.num_bytes = (), (), 0
            self._unmoved.append(job)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Return the results of the jobs that have ended by now."""
        return () if not self.has_news() else [self._end(job) for job in self._take_ended(everything=False)]

    def _take_ended(self, everything: bool) -> list[Job]:
        ended = list(self._unmoved)
        self._unmoved.clear()
        return ended + self.device.finished(everything)

    def _end(self, job: Job) -> JobResult:
        if job.is_promotion:
            self.table.unpin(job.slots)
        else:
            self.table.publish(job.slots)
            self._num_storing -= len(job.slots)
        return job.result(self._clock())

    def drain_jobs(self) -> None:
        """End every job at once; `get_finished_jobs` still returns the results."""
        self._unmoved.extend(self._take_ended(everything=True))

    def start_epoch(self, epoch: bytes) -> None:
        """Forget every block."""
        self.table.clear()
        self._uses.clear()

    def get_stats(self) -> Mapping[str, float]:
        """Return the number of blocks and the capacity in blocks."""
        return {"blocks": len(self.table), "capacity_blocks": self.table.num_slots}

    def check_invariants(self) -> None:
        """Raise InvariantError if the table contradicts itself."""
        self.table.check_invariants()
