"""Differences between the vLLM versions that kvtier supports (0.28 to 0.32)."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_offload import base
from vllm.v1.outputs import KVConnectorOutput

from kvtier.keys import OffloadKey

NEWLY_COMPUTED_ONLY = getattr(base.OffloadPolicy, "CHUNK_LEVEL", None) or base.OffloadPolicy.BLOCK_LEVEL
"""The policy with which vLLM offers only newly computed blocks; 0.32 renamed it to `CHUNK_LEVEL`."""

HAS_REPRODUCIBLE_SEED = hasattr(kv_cache_utils, "resolve_none_hash_seed")
"""Whether cryptographic block hashes start from a fixed seed; older versions start from a random one."""


HAS_FAILED_RECEIVES = any(item.name == "failed_recving" for item in fields(KVConnectorOutput))
"""Whether a worker can name requests whose loads failed, and not only blocks; 0.28 knows no such requests."""


def hash_seed_is_random(algorithm: str) -> bool:
    """Return whether the next process will compute other block hashes than this one."""
    if os.environ.get("PYTHONHASHSEED") is not None:
        return False
    return not HAS_REPRODUCIBLE_SEED or algorithm.startswith("xxhash")


def cache_hit_source(name: str, is_storage: bool) -> Any:
    """Return vLLM's name for the source of a hit."""
    # Imported here, since versions without `CacheHitSource` lack the module; they never call `get_load_source`.
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    if name == "primary":
        return CacheHitSource.HOST
    return CacheHitSource.DISK if is_storage else CacheHitSource.EXTERNAL_UNSPECIFIED


def source_of_medium(medium: Any) -> Any:
    """Return vLLM's name for hits from a medium of its `Medium`, as its own tiers have it."""
    from vllm.v1.metrics.cache_hit_source import CacheHitSource  # see `cache_hit_source`

    return CacheHitSource.HOST if medium is base.Medium.CPU else CacheHitSource.DISK


def kv_bytes_per_block(config: Any) -> int:
    """Return the bytes of one engine block in one worker, over all layers of the largest KV group."""
    return int(config.worker_kv_bytes_per_block)


def key_positions(context: Any) -> dict[OffloadKey, int]:
    """Return the end of each block of a request in tokens, by key, one KV group after the other.

    vLLM records the ends of the prompt's blocks before the first lookup, and the others as the request grows. 0.28 and
    0.30 record none; the result is empty then.
    """
    # vLLM has a public method for one key only, not for all of them.
    positions: dict[OffloadKey, int] = getattr(context, "_offload_key_positions", {})
    return positions


def make_known(kind: type, **values: Any) -> Any:
    """Return an instance of a vLLM dataclass; `values` for fields that it does not have are dropped.

    `OffloadingEvent` has no `ownership` in 0.28. `JobResult` of vLLM's tiers has no times and bytes before 0.32.
    """
    names = {item.name for item in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


def data_parallel_size(config: Any) -> int | None:
    """Return the number of data-parallel engines; None if vLLM does not tell it."""
    # In every version vLLM tells the ranks of models without experts that the size is 1. The index, or an engine id
    # that ends with the rank (the first rank's does, too), shows that there are more.
    index, size = config.parallel.data_parallel_index, config.parallel.data_parallel_size
    if size == 1 and (index > 0 or config.engine_id.endswith(f"_dp{index}")):
        return None
    return int(size)


def slots_of_job(job: Any) -> Any:
    """Return the slots of a job of vLLM's tiers, an int32 array: `chunk_ids` in 0.32, `block_ids` in 0.28."""
    return job.chunk_ids if hasattr(job, "chunk_ids") else job.block_ids
