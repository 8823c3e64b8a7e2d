"""vLLM's filesystem tier: one file per block, without checksums, on threads in the scheduler's process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from peer import THREADS, Peer, PeerPlace
from vllm.v1.kv_offload import base
from vllm.v1.kv_offload import config as kinds
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

from kvtier.keys import OffloadKey
from kvtier.types import JobMetadata, ScheduleEndContext

_TOKENS_PER_BLOCK = 16


class VLLMPeer(Peer):
    """Translates jobs: vLLM's have another name for slots, which it reads from them."""

    def __init__(self, place: PeerPlace) -> None:
        self.tier, self.block_bytes = self, place.block_bytes
        self._fs = FileSystemTierManager(
            _spec(place.block_bytes),
            place.view,
            "fs",
            root_dir=str(place.folder),
            n_read_threads=THREADS,
            n_write_threads=THREADS,
        )

    def can_store(self, num_blocks: int) -> bool:
        return True

    def submit_store(self, job: JobMetadata) -> None:
        self._fs.submit_store(self._translated(job))

    def submit_load(self, job: JobMetadata) -> None:
        self._fs.submit_load(self._translated(job))

    def get_finished_jobs(self) -> Iterable[Any]:
        return self._fs.get_finished_jobs()

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Do nothing: vLLM ends its lookups here, and there are none."""

    def _translated(self, job: JobMetadata) -> TransferJob:
        return TransferJob(job.job_id, job.keys, job.block_ids, job.is_promotion, job.req_context)

    def forget(self, keys: Sequence[OffloadKey]) -> None:
        for key in keys:
            os.unlink(self._fs.file_mapper.get_file_name(key))

    def close(self) -> None:
        self._fs.shutdown()


def _spec(block_bytes: int) -> SimpleNamespace:
    """Return what the tier reads of an engine's spec."""
    config = kinds.OffloadingConfig(
        groups=(kinds.OffloadingGroupConfig(_TOKENS_PER_BLOCK, ("layer",), 0),),
        worker_kv_bytes_per_block=block_bytes,
        enable_kv_cache_events=False,
        extra_config={},
        engine_id="benchmark",
        model=kinds.OffloadingModelConfig("benchmark", "float16"),
        cache=kinds.OffloadingCacheConfig(_TOKENS_PER_BLOCK, 1),
        parallel=kinds.OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, True),
    )
    events = base.OffloadingKVEventsConfig(False, False)
    return SimpleNamespace(config=config, blocks_per_chunk=1, kv_events_config=events)
