"""A secondary tier that a test controls."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, ClassVar

from kvtier.abc import SecondaryTierManager
from kvtier.events import TierState
from kvtier.keys import OffloadKey
from kvtier.primary.arena import arena_rows
from kvtier.types import JobMetadata, JobResult, Locality, LookupResult, Medium, ReqContext


class ScriptedTierError(RuntimeError):
    """Raised by the methods in `ScriptedTier.raising`."""


class ScriptedTier(SecondaryTierManager):
    """Holds real bytes in this process. The test decides when and how it answers.

    Attributes:
        blocks: stored bytes by key; tests may change them.
        unknown: keys whose lookup returns RETRY.
        auto: whether jobs are done at once; else they wait in `waiting` for `finish`.
        fail: keys whose copy fails.
        raising: names of methods that raise.
        loads, stores: the jobs submitted so far.
        cancelled: ids of the loads that were cancelled.
        results: results that were not collected yet; tests may add any.
        full: whether `can_store` returns False.
    """

    medium: ClassVar[Medium | None] = Medium.STORAGE
    locality: ClassVar[Locality | None] = Locality.LOCAL
    verifies_payloads: ClassVar[bool] = True

    def __init__(self, primary_kv_view: memoryview, tier_type: str = "scripted", offloading_spec: Any = None) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type)
        self.blocks: dict[OffloadKey, bytes] = {}
        self.unknown: set[OffloadKey] = set()
        self.auto = True
        self.fail: set[OffloadKey] = set()
        self.raising: set[str] = set()
        self.loads: list[JobMetadata] = []
        self.stores: list[JobMetadata] = []
        self.cancelled: list[int] = []
        self.waiting: list[JobMetadata] = []
        self.results: list[JobResult] = []
        self.lookups: list[OffloadKey] = []
        self.touched: list[OffloadKey] = []
        self.epochs: list[bytes] = []
        self.finished_requests: list[str] = []
        self.full = False
        self.current_state = TierState.UP
        self._rows = arena_rows(primary_kv_view)

    def _maybe_raise(self, method: str) -> None:
        if method in self.raising:
            raise ScriptedTierError(f"told to raise in {method}")

    @property
    def state(self) -> TierState:
        """The state that the test has set."""
        self._maybe_raise("state")
        return self.current_state

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Return RETRY for unknown keys, HIT for stored ones, else MISS."""
        self._maybe_raise("lookup")
        self.lookups.append(key)
        if key in self.unknown:
            return LookupResult.RETRY
        return LookupResult.HIT if key in self.blocks else LookupResult.MISS

    def can_store(self, num_blocks: int) -> bool:
        self._maybe_raise("can_store")
        return not self.full

    def submit_store(self, job_metadata: JobMetadata) -> None:
        self._maybe_raise("submit_store")
        self.stores.append(job_metadata)
        self._take(job_metadata)

    def submit_load(self, job_metadata: JobMetadata) -> None:
        self._maybe_raise("submit_load")
        self.loads.append(job_metadata)
        self._take(job_metadata)

    def _take(self, job: JobMetadata) -> None:
        self.waiting.append(job)
        if self.auto:
            self.finish(job)

    def cancel_loads(self, job_ids: Collection[int]) -> None:
        """Note the numbers; the jobs stay in `waiting`."""
        self._maybe_raise("cancel_loads")
        self.cancelled += job_ids

    def finish(self, job: JobMetadata) -> None:
        """Do a waiting job, key by key, and add its result."""
        self.waiting.remove(job)
        done = [key for key, slot in zip(job.keys, job.block_ids.tolist(), strict=True) if self._copy(job, key, slot)]
        success = len(done) == len(job.keys)
        num_bytes = sum(len(self.blocks[key]) for key in done)
        self.results.append(JobResult(job.job_id, success, None if success else done, 0.0, num_bytes))

    def _copy(self, job: JobMetadata, key: OffloadKey, slot: int) -> bool:
        if key in self.fail or (job.is_promotion and key not in self.blocks):
            return False
        if job.is_promotion:
            self._rows[slot][:] = self.blocks[key]
        else:
            self.blocks[key] = bytes(self._rows[slot])
        return True

    def get_finished_jobs(self) -> Iterable[JobResult]:
        self._maybe_raise("get_finished_jobs")
        results, self.results = self.results, []
        return results

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        self._maybe_raise("touch")
        self.touched += keys

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._maybe_raise("on_request_finished")
        self.finished_requests.append(req_context.req_id)

    def drain_jobs(self) -> None:
        """Do all waiting jobs."""
        self._maybe_raise("drain_jobs")
        for job in list(self.waiting):
            self.finish(job)

    def start_epoch(self, epoch: bytes) -> None:
        """Forget everything."""
        self._maybe_raise("start_epoch")
        self.epochs.append(epoch)
        self.blocks.clear()

    def shutdown(self) -> None:
        self._maybe_raise("shutdown")
