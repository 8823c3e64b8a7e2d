"""Checks the list of secondary tiers before any is made: each alone, then all together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvtier.config import OffloadingConfig, TieringConfig
from kvtier.errors import ConfigError
from kvtier.options import join_key
from kvtier.registry import check_tier, load_tier_class
from kvtier.sizes import parse_size
from kvtier.stores.slab.options import are_entangled
from kvtier.tier_config import TierConfig, parse_tier
from kvtier.types import Admission, Locality

PRIMARY_NAME = "primary"


def parse_tiers(user: TieringConfig, config: OffloadingConfig) -> tuple[TierConfig, ...]:
    """Return the configured tiers with checked options, distinct names, admission rules, and paths of this rank.

    Raises:
        ConfigError: a tier's configuration is wrong, two tiers have the same name or directory, or a persistent tier is
            used with LoRA without `allow_lora`.
    """
    listed = [parse_tier(entry, f"{config.tiers_key}[{index}]") for index, entry in enumerate(user.secondary_tiers)]
    named = with_distinct_names(listed, user.secondary_tiers)
    default = Admission.PROMPT_ONLY if user.offload_prompt_only else Admission.ALWAYS
    tiers = [check_tier(replace(tier, admission=tier.admission or default)) for tier in named]
    _check_directories(tiers)
    for tier in tiers:
        _check_lora(tier, user, config)
    return tuple(_for_data_parallel(tier, config) for tier in tiers)


def prompts_only(user: TieringConfig, tiers: Sequence[TierConfig]) -> bool:
    """Return whether engines should offer blocks of prompts only: as configured, else if no tier accepts others."""
    if user.offload_prompt_only is not None:
        return user.offload_prompt_only
    return bool(tiers) and all(tier.admission is Admission.PROMPT_ONLY for tier in tiers)


def with_distinct_names(tiers: Sequence[TierConfig], entries: Sequence[Mapping[str, Any]]) -> list[TierConfig]:
    """Return the tiers with distinct names: unnamed tiers of the same type get their positions appended.

    Raises:
        ConfigError: two entries give the same name, or one gives that of the primary tier.
    """
    names = [tier.name for tier in tiers]
    named = [
        tier if "name" in entry or names.count(tier.name) == 1 else replace(tier, name=f"{tier.name}-{index}")
        for index, (tier, entry) in enumerate(zip(tiers, entries, strict=True))
    ]
    seen = {PRIMARY_NAME: "the primary tier"}
    for tier in named:
        if tier.name in seen:
            raise ConfigError(join_key(tier.where, "name"), tier.name, f"another name: {seen[tier.name]} has this one")
        seen[tier.name] = tier.where
    return named


def _check_directories(tiers: Sequence[TierConfig]) -> None:
    """Refuse tiers whose directories are the same or within each other."""
    seen: list[tuple[str, str]] = []
    for tier in tiers:
        for path, name in _directories(tier):
            key = join_key(tier.where, name)
            for other, other_key in seen:
                if are_entangled(path, other):
                    raise ConfigError(key, path, f"a separate directory: this one and {other_key} contain each other")
            seen.append((path, key))


def _directories(tier: TierConfig) -> list[tuple[str, str]]:
    """Return the directories in a tier's options, each with its option's name."""
    path = tier.options.get("path")
    if isinstance(path, str | os.PathLike):
        return [(os.fspath(path), "path")]
    listed = path if isinstance(path, list | tuple) else ()
    return [(one, f"path[{index}]") for index, one in enumerate(listed) if isinstance(one, str)]


def _check_lora(tier: TierConfig, user: TieringConfig, config: OffloadingConfig) -> None:
    if config.uses_lora and not user.allow_lora and outlives_engine(load_tier_class(tier)):
        allowed = (
            f"true expected, since {tier.where} keeps blocks and the engine uses LoRA: block hashes contain adapters'"
            " names, not their weights, so blocks of another adapter with the same name would be loaded"
        )
        raise ConfigError("allow_lora", user.allow_lora, allowed)


def outlives_engine(tier_class: type) -> bool:
    """Return whether a tier's blocks outlive the engine: the class has `persistent`, or needs a namespace."""
    return bool(getattr(tier_class, "persistent", False) or getattr(tier_class, "needs_namespace", False))


def is_shared(tier: TierConfig) -> bool:
    """Return whether any number of engines may use the tier at once, with the same options."""
    return getattr(load_tier_class(tier), "locality", None) is Locality.REMOTE


def _for_data_parallel(tier: TierConfig, config: OffloadingConfig) -> TierConfig:
    """Return the tier for this data-parallel rank: with its own directory and its share of the capacity.

    An engine that does not know the number of ranks uses the whole capacity. A shared tier stays as it is.
    """
    path = tier.options.get("path")
    if config.data_parallel_size == 1 or not _directories(tier) or is_shared(tier):
        return tier
    folder = f"dp{config.data_parallel_index}"
    own = [os.path.join(one, folder) for one, _ in _directories(tier)]
    mine = {**tier.options, "path": own if isinstance(path, list | tuple) else own[0]}
    if "capacity" in mine and config.data_parallel_size is not None:
        capacity = parse_size(join_key(tier.where, "capacity"), mine["capacity"])
        mine["capacity"] = capacity // config.data_parallel_size
    return replace(tier, options=mine)
