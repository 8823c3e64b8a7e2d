"""A secondary tier that does exactly what a test tells it to."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, ClassVar

from kvtier.abc import SecondaryTierManager
from kvtier.events import TierState
from kvtier.keys import OffloadKey
from kvtier.primary.arena import arena_rows
from kvtier.types import JobMetadata, JobResult, Locality, LookupResult, Medium, ReqContext


class ScriptedTierError(RuntimeError):
    """What a scripted tier raises when told to."""


class ScriptedTier(SecondaryTierManager):
    """Holds real bytes in this process; answers when and how the test says.

    Attributes:
        blocks: what is stored, by key; tests may plant and change bytes.
        unknown: keys whose lookup answers RETRY.
        auto: whether jobs are carried out as they are submitted; else they wait in `waiting` for `finish`.
        fail: keys whose copy fails.
        raising: names of methods that raise.
        loads, stores: the jobs submitted so far.
        cancelled: numbers of the loads that nobody waits for any more.
        results: answers waiting to be collected; tests may add any.
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
        """The state the test set."""
        self._maybe_raise("state")
        return self.current_state

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """RETRY for unknown keys, HIT for held ones, else MISS."""
        self._maybe_raise("lookup")
        self.lookups.append(key)
        if key in self.unknown:
            return LookupResult.RETRY
        return LookupResult.HIT if key in self.blocks else LookupResult.MISS

    def can_store(self, num_blocks: int) -> bool:
        """False while `full`."""
        self._maybe_raise("can_store")
        return not self.full

    def submit_store(self, job_metadata: JobMetadata) -> None:
        """Take a store job."""
        self._maybe_raise("submit_store")
        self.stores.append(job_metadata)
        self._take(job_metadata)

    def submit_load(self, job_metadata: JobMetadata) -> None:
        """Take a load job."""
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
        """Carry out a waiting job, key by key, and answer it."""
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
        """Return the answers waiting."""
        self._maybe_raise("get_finished_jobs")
        results, self.results = self.results, []
        return results

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Note the keys."""
        self._maybe_raise("touch")
        self.touched += keys

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Note the request."""
        self._maybe_raise("on_request_finished")
        self.finished_requests.append(req_context.req_id)

    def drain_jobs(self) -> None:
        """Carry out what waits."""
        self._maybe_raise("drain_jobs")
        for job in list(self.waiting):
            self.finish(job)

    def start_epoch(self, epoch: bytes) -> None:
        """Forget everything."""
        self._maybe_raise("start_epoch")
        self.epochs.append(epoch)
        self.blocks.clear()

    def shutdown(self) -> None:
        """Do nothing."""
        self._maybe_raise("shutdown")
