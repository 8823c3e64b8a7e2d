"""The list of secondary tiers: each checked alone, then all against each other, before anything is made."""

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
from kvtier.types import Admission

PRIMARY_NAME = "primary"


def parse_tiers(user: TieringConfig, config: OffloadingConfig) -> tuple[TierConfig, ...]:
    """Return the configured tiers: options checked, names distinct, admission decided, paths of this rank.

    Raises:
        ConfigError: a tier's configuration is wrong, two tiers use one name or one directory, or a persistent tier
            would trust the names of LoRA adapters unasked.
    """
    listed = [parse_tier(entry, f"secondary_tiers[{index}]") for index, entry in enumerate(user.secondary_tiers)]
    named = _with_names(listed, user.secondary_tiers)
    default = Admission.PROMPT_ONLY if user.offload_prompt_only else Admission.ALWAYS
    tiers = [check_tier(replace(tier, admission=tier.admission or default)) for tier in named]
    _check_directories(tiers)
    for tier in tiers:
        _check_lora(tier, user, config)
    return tuple(_for_data_parallel(tier, config) for tier in tiers)


def prompts_only(user: TieringConfig, tiers: Sequence[TierConfig]) -> bool:
    """Return whether engines should offer blocks of prompts only: as configured, else if no tier takes others."""
    if user.offload_prompt_only is not None:
        return user.offload_prompt_only
    return bool(tiers) and all(tier.admission is Admission.PROMPT_ONLY for tier in tiers)


def _with_names(tiers: Sequence[TierConfig], entries: Sequence[Mapping[str, Any]]) -> list[TierConfig]:
    """Return the tiers with distinct names; a type used twice without names gets the position appended."""
    names = [tier.name for tier in tiers]
    named = [
        tier if "name" in entry or names.count(tier.name) == 1 else replace(tier, name=f"{tier.name}-{index}")
        for index, (tier, entry) in enumerate(zip(tiers, entries, strict=True))
    ]
    seen = {PRIMARY_NAME: "the primary tier"}
    for tier in named:
        if tier.name in seen:
            raise ConfigError(join_key(tier.where, "name"), tier.name, f"another name, {seen[tier.name]} has this one")
        seen[tier.name] = tier.where
    return named


def _check_directories(tiers: Sequence[TierConfig]) -> None:
    """Refuse two tiers over one directory, and one tier's directory inside another's."""
    seen: list[tuple[str, str]] = []
    for tier in tiers:
        for path, name in _directories(tier):
            key = join_key(tier.where, name)
            for other, other_key in seen:
                if are_entangled(path, other):
                    raise ConfigError(key, path, f"a directory of its own, neither in nor around that of {other_key}")
            seen.append((path, key))


def _directories(tier: TierConfig) -> list[tuple[str, str]]:
    """Return the directories that a tier names, each with the name of its option."""
    path = tier.options.get("path")
    if isinstance(path, str | os.PathLike):
        return [(os.fspath(path), "path")]
    listed = path if isinstance(path, list | tuple) else ()
    return [(one, f"path[{index}]") for index, one in enumerate(listed) if isinstance(one, str)]


def _check_lora(tier: TierConfig, user: TieringConfig, config: OffloadingConfig) -> None:
    if config.uses_lora and not user.allow_lora and outlives_engine(load_tier_class(tier)):
        allowed = (
            f"must be true for {tier.where} to start with LoRA: block hashes carry the adapters' names, not their"
            " contents, so that blocks of another adapter under the same name would be taken for this one's"
        )
        raise ConfigError("allow_lora", user.allow_lora, allowed)


def outlives_engine(tier_class: type) -> bool:
    """Return whether blocks may be found by a later engine; tiers say so, tiers that need a namespace do, too."""
    return bool(getattr(tier_class, "persistent", False) or getattr(tier_class, "needs_namespace", False))


def _for_data_parallel(tier: TierConfig, config: OffloadingConfig) -> TierConfig:
    """Return the tier as this engine's rank uses it: a directory of its own, and its share of the capacity.

    An engine that does not know of how many it is one takes the whole capacity for itself.
    """
    path = tier.options.get("path")
    if config.data_parallel_size == 1 or not _directories(tier):
        return tier
    folder = f"dp{config.data_parallel_index}"
    own = [os.path.join(one, folder) for one, _ in _directories(tier)]
    mine = {**tier.options, "path": own if isinstance(path, list | tuple) else own[0]}
    if "capacity" in mine and config.data_parallel_size is not None:
        capacity = parse_size(join_key(tier.where, "capacity"), mine["capacity"])
        mine["capacity"] = capacity // config.data_parallel_size
    return replace(tier, options=mine)
