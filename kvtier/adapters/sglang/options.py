"""The options of `KVTierHiCache`, and the identity of the pages of one SGLang rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from kvtier.adapters.staging_options import StagingOptions
from kvtier.config import Text
from kvtier.errors import ConfigError
from kvtier.spec.staging import StagingSpec
from kvtier.spec.tiers import is_shared


class SGLangOptions(StagingOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The extra configuration of HiCache's dynamic backend, for kvtier. SGLang takes its own keys out before."""

    backend_name: Annotated[Text, msgspec.Meta(description="for SGLang: a name for its log")]
    module_path: Annotated[Text, msgspec.Meta(description='for SGLang: "kvtier.adapters.sglang"')]
    class_name: Annotated[Text, msgspec.Meta(description='for SGLang: "KVTierHiCache"')]
    interface_v1: Annotated[
        int | bool,
        msgspec.Meta(description="for SGLang: 1 lets kvtier copy pages from and to the host pool itself; 0 is slower"),
    ] = 0


def rank_identity(storage_config: Any) -> dict[str, str | int]:
    """Return what tells the pages of this rank from those of others.

    Ranks of a model whose KV is the same on all ranks (multi-head latent attention) share their pages.

    Args:
        storage_config: SGLang's `HiCacheStorageConfig`.
    """
    shared = storage_config.is_mla_model
    return {
        "sglang.model": storage_config.model_name or "",
        "sglang.tp_size": storage_config.tp_size,
        "sglang.tp_rank": "all" if shared else storage_config.tp_rank,
        "sglang.pp_size": storage_config.pp_size,
        "sglang.pp_rank": storage_config.pp_rank,
        "sglang.attn_cp_size": storage_config.attn_cp_size,
        "sglang.attn_cp_rank": storage_config.attn_cp_rank,
        "sglang.dcp_size": storage_config.dcp_size,
        "sglang.dcp_rank": storage_config.dcp_rank,
    }


def make_spec(
    options: SGLangOptions,
    storage_config: Any,
    identity: Mapping[str, str | int],
    block_bytes: int,
    attention_groups: int = 1,
) -> StagingSpec:
    """Return the spec of this rank's tiers; nothing is allocated or opened.

    Args:
        identity: of the host pools, in addition to `rank_identity`.
        block_bytes: bytes in one block of the tiers.
        attention_groups: groups of data-parallel attention in this engine.

    Raises:
        ConfigError: the tiers' configuration is wrong, or a tier of this kind cannot serve this model.
    """
    index, num_ranks = _place_of(storage_config, attention_groups)
    described = {"sglang.model_identity": options.model_identity, **rank_identity(storage_config), **identity}
    spec = options.make_spec(described, block_bytes, index, num_ranks)
    if storage_config.is_mla_model and storage_config.tp_size > 1:
        for tier in spec.tiers:
            if not is_shared(tier):
                allowed = (
                    "a tier that ranks share (resp, filesystem, object, mooncake): with multi-head latent attention one"
                    f" rank stores the pages of all {storage_config.tp_size}, and this tier belongs to one process"
                )
                raise ConfigError(f"{tier.where}.type", tier.tier_type, allowed)
    return spec


def _place_of(storage_config: Any, attention_groups: int) -> tuple[int, int]:
    """Return this rank's index and the number of ranks, which have directories of their own and share a capacity.

    Tensor-parallel ranks that share their pages count as one.
    """
    index, num_ranks = 0, 1
    for rank, size in (
        (storage_config.dp_rank, max(attention_groups, storage_config.dp_rank + 1)),
        (storage_config.pp_rank, storage_config.pp_size),
        (storage_config.attn_cp_rank, storage_config.attn_cp_size),
        (0, 1) if storage_config.is_mla_model else (storage_config.tp_rank, storage_config.tp_size),
    ):
        index, num_ranks = index * size + rank, num_ranks * size
    return index, num_ranks
