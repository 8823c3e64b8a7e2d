"""Takes the place of a tier that could not be made or started, so that states and metrics show it, and why."""

from __future__ import annotations

from collections.abc import Iterable

from kvtier.abc import SecondaryTierManager
from kvtier.events import TierState
from kvtier.keys import OffloadKey
from kvtier.types import JobMetadata, JobResult, LookupResult, ReqContext


class UnusableTierManager(SecondaryTierManager):
    """DOWN for good; holds nothing and takes nothing."""

    verifies_payloads = True

    def __init__(self, primary_kv_view: memoryview, tier_type: str, reason: str) -> None:
        """Args: reason: why there is no better tier in this place, in a few words."""
        super().__init__(None, primary_kv_view, tier_type)
        self._reason = reason
        self._results: list[JobResult] = []

    @property
    def state(self) -> TierState:
        """DOWN."""
        return TierState.DOWN

    @property
    def state_reason(self) -> str:
        """The reason given to the constructor."""
        return self._reason

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Return MISS."""
        return LookupResult.MISS

    def can_store(self, num_blocks: int) -> bool:
        """Return False."""
        return False

    def submit_store(self, job_metadata: JobMetadata) -> None:
        """Refuse the job."""
        self._results.append(JobResult(job_metadata.job_id, False))

    def submit_load(self, job_metadata: JobMetadata) -> None:
        """Refuse the job."""
        self._results.append(JobResult(job_metadata.job_id, False))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Return the refusals since the last call."""
        results, self._results = self._results, []
        return results

    def drain_jobs(self) -> None:
        """Return at once: there is nothing to wait for."""
