"""Differences between the vLLM versions that kvtier supports (0.28 to 0.33)."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_offload import base
from vllm.v1.outputs import KVConnectorOutput

from kvtier.keys import GROUP_BYTES, OffloadKey

NEWLY_COMPUTED_ONLY = getattr(base.OffloadPolicy, "CHUNK_LEVEL", None) or base.OffloadPolicy.BLOCK_LEVEL
"""The policy with which vLLM offers only newly computed blocks; 0.32 renamed it to `CHUNK_LEVEL`."""

HAS_REPRODUCIBLE_SEED = hasattr(kv_cache_utils, "resolve_none_hash_seed")
"""Whether cryptographic block hashes start from a fixed seed; older versions start from a random one."""


HAS_FAILED_RECEIVES = any(item.name == "failed_recving" for item in fields(KVConnectorOutput))
"""Whether a worker can name requests whose loads failed, and not only blocks; 0.28 knows no such requests."""

KNOWS_FAILED_STORES = "metadata_only" in {item.name for item in fields(base.OffloadingEvent)}
"""Whether an event can say that a block was never there. Before 0.33 vLLM would publish it as a removal."""


def hash_seed_is_random(algorithm: str, has_reproducible_seed: bool = HAS_REPRODUCIBLE_SEED) -> bool:
    """Return whether the next process will compute other block hashes than this one."""
    if os.environ.get("PYTHONHASHSEED") is not None:
        return False
    return not has_reproducible_seed or algorithm.startswith("xxhash")


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


def groups_to_retry(config: Any) -> frozenset[bytes]:
    """Return the KV groups, as keys end with them, in which a block that is not ready is answered with RETRY.

    In 0.33 HIT_PENDING says that the block has a slot. In a group with full attention vLLM then keeps an entry for its
    KV events until the block is reported as removed. kvtier gives a block its slot only at the end of the step, if at
    all, so most entries would stay for ever. RETRY defers the request as well, and keeps no entry. In a group with a
    sliding window HIT_PENDING is right: vLLM keeps no entries there, and RETRY would restart the window.
    """
    # Before 0.33 vLLM does not tell the kind of a group here, and HIT_PENDING has no such meaning.
    groups = [group.group_id for group in config.groups if getattr(group, _WINDOW, 0) is None]
    return frozenset(group.to_bytes(GROUP_BYTES, "big") for group in groups)


_WINDOW = "sliding_window_size_in_chunks"
"""Attribute of a KV group, from 0.33 on: None for full attention."""


def make_known(kind: type, **values: Any) -> Any:
    """Return an instance of a vLLM dataclass; `values` for fields that it does not have are dropped.

    `OffloadingEvent` has no `ownership` in 0.28, and no `metadata_only` before 0.33. `JobResult` of vLLM's tiers has no
    times and bytes before 0.32.
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
