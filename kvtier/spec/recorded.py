"""Makes a spec's manager, which records its calls if the configuration has `record`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtier.abc import SecondaryTierManager
from kvtier.primary.manager import CPUPrimaryTierOffloadingManager
from kvtier.recording.recorder import RecordedManager
from kvtier.recording.stream import Recorder
from kvtier.sizes import parse_size
from kvtier.spec.base import ArenaSpec
from kvtier.tier_config import TierConfig
from kvtier.tiering.manager import TieringOffloadingManager
from kvtier.types import Admission

MadeTiers = Sequence[tuple[TierConfig, SecondaryTierManager]]


def make_manager(
    spec: ArenaSpec, primary: CPUPrimaryTierOffloadingManager, tiers: MadeTiers = ()
) -> TieringOffloadingManager:
    """Make the manager over a spec's primary tier and its started secondary tiers."""
    keywords: dict[str, Any] = {
        "names": [config.name for config, _ in tiers],
        "admissions": [config.admission or Admission.ALWAYS for config, _ in tiers],
        "probe_deadlines": [config.probe_deadline for config, _ in tiers],
        "settings": spec.settings,
        "clock": spec.tier_context.clock,
        "observer": spec.observers,
    }
    secondary = [tier for _, tier in tiers]
    user = spec.user_config
    if user.record is None:
        return TieringOffloadingManager(primary, secondary, **keywords)
    limit = parse_size("record_limit", user.record_limit)
    recorder = Recorder(user.record, describe(spec, tiers), spec.tier_context.clock, limit)
    return RecordedManager(primary, secondary, recorder=recorder, **keywords)


def describe(spec: ArenaSpec, tiers: MadeTiers) -> dict[str, Any]:
    """Return the header of a recording: what a replay needs of the configuration, and nothing about the model."""
    settings = spec.settings
    return {
        "tokens_per_block": spec.tokens_per_block,
        "block_bytes": spec.block_bytes,
        "primary_blocks": spec.num_blocks,
        "policy": spec.user_config.eviction_policy,
        "load_deadline": settings.load_deadline,
        "probe_deadline": settings.probe_deadline,
        "lease_timeout": settings.lease_timeout,
        "promotion_budget": settings.promotion_budget,
        "prefill_rate": settings.prefill_rate,
        "retain_share": settings.retain_share,
        "tenant_quotas": settings.tenant_quotas,
        "tiers": [
            {
                "name": config.name,
                "admission": (config.admission or Admission.ALWAYS).value,
                "policy": str(config.options.get("eviction_policy", "lru")),
                "probe_deadline": tier.probe_deadline if config.probe_deadline is None else config.probe_deadline,
            }
            for config, tier in tiers
        ],
    }
