"""Converts between vLLM's types and kvtier's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from vllm.v1.kv_offload import base

from kvtier import types
from kvtier.adapters.vllm.compat import data_parallel_size, key_positions, make_known
from kvtier.config import KVCacheGroup, OffloadingConfig
from kvtier.hints import HINT_KEY
from kvtier.keys import OffloadKey
from kvtier.primary.copies import KVCaches

ANSWERS = {answer: base.LookupResult[answer.name] for answer in types.LookupResult}
MEDIA = {medium: base.Medium[medium.name] for medium in types.Medium}
LOCALITIES = {locality: base.Locality[locality.name] for locality in types.Locality}
_ALL_TIERS = base.TierFilter.ALL
_HAS_HINTS = hasattr(base.ReqContext, "kv_hints")  # from 0.32 on


class KVTierLoadStoreSpec(base.LoadStoreSpec):  # type: ignore[misc]  # vLLM is not there when types are checked
    """Slots of the arena; vLLM pickles it and sends it to the workers with the step's other metadata.

    Attributes:
        block_ids: slots, an int32 array in the order of the prepared keys.
        sequence: number of the transfer, 0 if it has none; see `kvtier.types.CPULoadStoreSpec`.
    """

    def __init__(self, spec: types.CPULoadStoreSpec) -> None:
        self.block_ids = spec.block_ids
        self.sequence = spec.sequence

    def slots(self) -> types.CPULoadStoreSpec:
        """Return the slots as kvtier's type."""
        return types.CPULoadStoreSpec(self.block_ids, self.sequence)

    def __repr__(self) -> str:
        return f"KVTierLoadStoreSpec(sequence={self.sequence}, block_ids={self.block_ids})"


NO_SLOTS = types.CPULoadStoreSpec(np.zeros(0, dtype=np.int32))


class EngineReqContext(types.ReqContext):
    """kvtier's context of a request of vLLM.

    It asks vLLM's own context where blocks end, since vLLM adds ends as the request grows.

    Attributes:
        load_failed: whether the load that is running has failed on a worker.
        is_computed: whether a load of the request has failed and ended, so that nothing more is loaded for it.
        spans_reset: whether the cache was reset since vLLM last looked the request up, and so last placed its blocks.
    """

    load_failed = False
    is_computed = False
    spans_reset = False

    def __init__(self, theirs: Any) -> None:
        # Not the base's constructor, which makes a dict of positions: vLLM keeps them. This runs for every request, and
        # for some it is most of what they cost, so what equals the class's default is not set either.
        self._theirs = theirs
        self.req_id = theirs.req_id
        if theirs.kv_transfer_params is not None or (_HAS_HINTS and theirs.kv_hints is not None):
            self.kv_transfer_params = _with_hint(theirs)
        if theirs.load_tier_filter is not _ALL_TIERS:
            self.load_tier_filter = _tier_filter(theirs.load_tier_filter)

    @property
    def offload_key_positions(self) -> Mapping[OffloadKey, int]:
        """Ends of blocks in tokens, by key; empty if vLLM does not tell them."""
        return key_positions(self._theirs)

    def note_prompt(self) -> None:
        """Set the prompt's length, in whole blocks; to be called before the first lookup."""
        # vLLM records the ends of the prompt's blocks before the first lookup, in order: the last one is its length.
        if self.num_prompt_tokens is None and (positions := key_positions(self._theirs)):
            self.num_prompt_tokens = positions[next(reversed(positions))]

    def get_offload_key_position(self, key: OffloadKey) -> int | None:
        """Return the end of the block `key` in tokens; None if vLLM does not tell it."""
        position = getattr(self._theirs, "get_offload_key_position", None)
        return position(key) if position is not None else None


def _with_hint(theirs: Any) -> dict[str, Any] | None:
    """Return the client's `kv_transfer_params`, with an orchestrator's hint added if the client sent none."""
    params: dict[str, Any] | None = theirs.kv_transfer_params
    envelope = theirs.kv_hints if _HAS_HINTS else None
    if envelope is None or (params is not None and HINT_KEY in params):
        return params
    actions = envelope.actions  # vLLM itself defines no type of action
    payloads = [action.payload for action in actions if action.action_type == HINT_KEY]
    return {**(params or {}), HINT_KEY: payloads[0]} if payloads else params


def _tier_filter(wanted: Any) -> types.TierFilter:
    if wanted is None:
        return types.TierFilter.ALL
    return types.TierFilter(tuple(_matcher(matcher) for matcher in wanted.matchers if _is_known(matcher)))


def _is_known(theirs: Any) -> bool:
    """Return whether kvtier knows the medium and the locality: a later vLLM may have more of them."""
    medium, locality = theirs.medium, theirs.locality
    return (medium is None or medium.name in types.Medium.__members__) and (
        locality is None or locality.name in types.Locality.__members__
    )


def _matcher(theirs: Any) -> types.TierMatcher:
    medium = types.Medium[theirs.medium.name] if theirs.medium is not None else None
    locality = types.Locality[theirs.locality.name] if theirs.locality is not None else None
    return types.TierMatcher(medium, locality)


def offloading_event(event: types.OffloadingEvent) -> Any:
    """Return a KV event as vLLM's type."""
    locality = LOCALITIES[event.locality] if event.locality is not None else None
    return make_known(
        base.OffloadingEvent,
        keys=event.keys,
        medium=MEDIA[event.medium],
        removed=event.removed,
        metadata_only=event.metadata_only,
        locality=locality,
        ownership=event.ownership,
    )


def engine_blocks(spec: Any) -> types.GPULoadStoreSpec:
    """Return vLLM's spec of engine blocks as kvtier's type."""
    return types.GPULoadStoreSpec(spec.block_ids, spec.group_sizes, spec.block_indices)


def kv_caches_of(canonical: Any) -> KVCaches:
    """Return vLLM's KV caches as kvtier's type; each tensor is int8 of shape (num_blocks, page bytes)."""
    tensors = [tensor.tensor for tensor in canonical.tensors]
    groups = [[(ref.tensor_idx, ref.page_size_bytes) for ref in refs] for refs in canonical.group_data_refs]
    return KVCaches(tensors, groups)


def engine_config(config: Any, kv_bytes_per_block: int) -> OffloadingConfig:
    """Return the engine's configuration, without the namespace and LoRA, which only the workers know.

    Args:
        kv_bytes_per_block: bytes of one engine block in one worker.
    """
    parallel = config.parallel
    return OffloadingConfig(
        extra_config=config.extra_config,
        groups=tuple(KVCacheGroup(group.tokens_per_block, tuple(group.layer_names)) for group in config.groups),
        engine_block_bytes=kv_bytes_per_block * (1 if config.replicated_layout else parallel.world_size),
        engine_id=config.engine_id,
        world_size=parallel.world_size,
        rank=parallel.rank,
        data_parallel_index=parallel.data_parallel_index,
        data_parallel_size=data_parallel_size(config),
        enable_kv_cache_events=config.enable_kv_cache_events,
        replicated=config.replicated_layout,
    )
