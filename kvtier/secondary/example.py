"""The smallest complete secondary tier, which keeps blocks in a dict. Copy it to write your own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import xxhash

from kvtier.abc import EvictionPolicy, SecondaryTierManager
from kvtier.errors import ConfigError
from kvtier.keys import OffloadKey
from kvtier.primary.arena import arena_rows
from kvtier.secondary.trial import construct_on_trial
from kvtier.types import JobMetadata, JobResult, Locality, LookupResult, Medium, ReqContext


class ExampleSecondaryTierManager(SecondaryTierManager):
    """Keeps copies of blocks in this process, without a limit. Each job is done when `submit_*` returns.

    These methods run on the engine's thread, so a tier with real I/O must not do it here. Write a store for such a
    tier, and give it to `KeyedTierManager` or `SlottedTierManager`.
    """

    medium = Medium.CPU
    locality = Locality.LOCAL
    verifies_payloads = True

    @classmethod
    def check_options(
        cls, options: Mapping[str, Any], block_bytes: int, policies: Mapping[str, type[EvictionPolicy]]
    ) -> None:
        """Check the options by calling the constructor, which has no side effects."""
        construct_on_trial(cls, options, block_bytes, policies)

    def __init__(
        self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, *, custom_param: int = 0
    ) -> None:
        """Args: custom_param: any int; it shows how a tier declares its own options."""
        super().__init__(offloading_spec, primary_kv_view, tier_type)
        if isinstance(custom_param, bool) or not isinstance(custom_param, int):
            raise ConfigError("custom_param", custom_param, "an int")
        self.custom_param = custom_param
        self._rows = arena_rows(primary_kv_view)
        self._block_bytes = self._rows.block_bytes
        self._blocks: dict[OffloadKey, tuple[bytes, bytes]] = {}
        self._results: list[JobResult] = []

    def get_num_blocks(self) -> int:
        """Return the number of blocks."""
        return len(self._blocks)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Return HIT or MISS; RETRY is for tiers that must ask their store."""
        return LookupResult.HIT if key in self._blocks else LookupResult.MISS

    def submit_store(self, job_metadata: JobMetadata) -> None:
        """Copy the blocks, and keep a digest of each."""
        for key, slot in zip(job_metadata.keys, job_metadata.block_ids, strict=True):
            payload = bytes(self._rows[int(slot)])
            self._blocks[key] = (payload, xxhash.xxh3_128_digest(payload))
        self._finish(job_metadata, list(job_metadata.keys))

    def submit_load(self, job_metadata: JobMetadata) -> None:
        """Copy back the blocks whose digest is right; forget the others."""
        loaded = []
        for key, slot in zip(job_metadata.keys, job_metadata.block_ids, strict=True):
            payload, digest = self._blocks.get(key, (b"", b""))
            if len(payload) == self._block_bytes and xxhash.xxh3_128_digest(payload) == digest:
                self._rows[int(slot)][:] = payload
                loaded.append(key)
            else:
                self._blocks.pop(key, None)
        self._finish(job_metadata, loaded)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results, self._results = self._results, []
        return results

    def drain_jobs(self) -> None:
        """Return at once, since no job is ever in flight."""

    def start_epoch(self, epoch: bytes) -> None:
        """Forget everything: the blocks were computed with earlier weights."""
        self._blocks.clear()

    def get_stats(self) -> Mapping[str, float]:
        return {"blocks": len(self._blocks), "bytes": len(self._blocks) * self._block_bytes}

    def shutdown(self) -> None:
        self._blocks.clear()

    def _finish(self, job: JobMetadata, done: list[OffloadKey]) -> None:
        success = len(done) == len(job.keys)
        partial = None if success or not done else set(done)
        self._results.append(JobResult(job.job_id, success, partial, 0.0, len(done) * self._block_bytes))
