"""Placeholders for a tier: for ever if the tier could not be made, or until it can be started."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from kvtier.abc import SecondaryTierManager
from kvtier.events import TierState
from kvtier.keys import OffloadKey
from kvtier.types import JobMetadata, JobResult, LookupResult, ReqContext


class UnusableTierManager(SecondaryTierManager):
    """A placeholder that stays DOWN: it has no blocks and accepts none."""

    verifies_payloads = True

    def __init__(self, primary_kv_view: memoryview, tier_type: str, reason: str) -> None:
        """Args: reason: why the tier cannot be used, for `state_reason`."""
        super().__init__(None, primary_kv_view, tier_type)
        self._reason = reason
        self._results: list[JobResult] = []

    @property
    def state(self) -> TierState:
        return TierState.DOWN

    @property
    def state_reason(self) -> str:
        return self._reason

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        return LookupResult.MISS

    def can_store(self, num_blocks: int) -> bool:
        return False

    def submit_store(self, job_metadata: JobMetadata) -> None:
        self._results.append(JobResult(job_metadata.job_id, False))

    def submit_load(self, job_metadata: JobMetadata) -> None:
        self._results.append(JobResult(job_metadata.job_id, False))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results, self._results = self._results, []
        return results

    def drain_jobs(self) -> None:
        return


_REASON = "the engine has not said yet which model this is"


class LateTier(UnusableTierManager):
    """A placeholder that is STARTING until the guard replaces it by its successor, the real tier.

    `succeed` may be called by any thread, everything else by the scheduler's.

    Attributes:
        epoch: the epoch that has begun meanwhile, for the successor; None if there was no reset.
    """

    def __init__(self, primary_kv_view: memoryview, tier_type: str, tier_class: Any) -> None:
        """Args: tier_class: of the successor; managers must see the same class attributes on this placeholder."""
        super().__init__(primary_kv_view, tier_type, _REASON)
        for name in ("medium", "locality", "verifies_payloads", "joins_stores", "probe_deadline"):
            setattr(self, name, getattr(tier_class, name, getattr(SecondaryTierManager, name)))
        self.epoch: bytes | None = None
        self._lock = threading.Lock()
        self._successor: SecondaryTierManager | None = None
        self._has_ended = False

    @property
    def state(self) -> TierState:
        """STARTING, or CLOSED after `shutdown`."""
        return TierState.CLOSED if self._has_ended else TierState.STARTING

    def succeed(self, tier: SecondaryTierManager) -> None:
        """Set the successor, a started tier; after `shutdown`, shut it down at once."""
        with self._lock:
            if not self._has_ended:
                self._successor = tier
                return
        tier.shutdown()

    def take_successor(self) -> SecondaryTierManager | None:
        """Return the successor, which the caller owns from now on; None if there is none yet.

        The caller must tell it the `epoch`.
        """
        if self._successor is None:
            return None
        with self._lock:
            tier, self._successor = self._successor, None
        return tier

    def start_epoch(self, epoch: bytes) -> None:
        """Remember the epoch for the successor."""
        self.epoch = epoch

    def shutdown(self) -> None:
        """Shut down, and shut down the successor if the guard has not taken it."""
        with self._lock:
            self._has_ended = True
            tier, self._successor = self._successor, None
        if tier is not None:
            tier.shutdown()
