"""What differs between the vLLM versions that kvtier runs in (0.28 to 0.32), and which version needs what."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_offload import base

from kvtier.keys import OffloadKey

NEWLY_COMPUTED_ONLY = getattr(base.OffloadPolicy, "CHUNK_LEVEL", None) or base.OffloadPolicy.BLOCK_LEVEL
"""The policy of offering newly computed blocks only: `CHUNK_LEVEL` in 0.32."""

HAS_REPRODUCIBLE_SEED = hasattr(kv_cache_utils, "resolve_none_hash_seed")
"""Whether block hashes of cryptographic algorithms start from a fixed seed; before, from a random one."""


def hash_seed_is_random(algorithm: str) -> bool:
    """Return whether block hashes of this engine will be unlike those of the next process."""
    if os.environ.get("PYTHONHASHSEED") is not None:
        return False
    return not HAS_REPRODUCIBLE_SEED or algorithm.startswith("xxhash")


def cache_hit_source(name: str, is_storage: bool) -> Any:
    """Return vLLM's word for where a hit came from; versions without `CacheHitSource` never ask."""
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    if name == "primary":
        return CacheHitSource.HOST
    return CacheHitSource.DISK if is_storage else CacheHitSource.EXTERNAL_UNSPECIFIED


def kv_bytes_per_block(config: Any) -> int:
    """Return the bytes of one engine block in one worker, over all layers of the largest group."""
    return int(config.worker_kv_bytes_per_block)


def key_positions(context: Any) -> dict[OffloadKey, int]:
    """Return where each block of a request ends, in tokens, by key, KV group by group; empty in 0.28 and 0.30.

    vLLM records it as the request grows, for the prompt before the first lookup. It has no public name for all of it.
    """
    positions: dict[OffloadKey, int] = getattr(context, "_offload_key_positions", {})
    return positions


def make_known(kind: type, **values: Any) -> Any:
    """Return a dataclass of vLLM's with those of `values` that it has.

    `OffloadingEvent` has no `ownership` in 0.28, tiers' `JobResult` no times and bytes before 0.32.
    """
    names = {item.name for item in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


def data_parallel_size(config: Any) -> int | None:
    """Return how many data-parallel engines there are; None if vLLM has not told this one.

    Ranks of models without experts are told, in every version, that they are alone; their engine's id still ends with
    their rank, the first one's, too.
    """
    index, size = config.parallel.data_parallel_index, config.parallel.data_parallel_size
    if size == 1 and (index > 0 or config.engine_id.endswith(f"_dp{index}")):
        return None
    return int(size)


def slots_of_job(job: Any) -> Any:
    """Return the int32 array of slots of a job of vLLM's tiers; `chunk_ids` in 0.32, `block_ids` in 0.28."""
    return job.chunk_ids if hasattr(job, "chunk_ids") else job.block_ids
