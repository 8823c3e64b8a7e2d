"""The labels of `vllm:kv_offload_config_info`, which vLLM exports from 0.33 on: one series per tier."""

from __future__ import annotations

from pathlib import Path

from kvtier import __version__
from kvtier.errors import ConfigError
from kvtier.options import options_type_of
from kvtier.registry import load_tier_class
from kvtier.sizes import parse_size
from kvtier.spec.tiering import TieringOffloadingSpec
from kvtier.tier_config import TierConfig

LABELS = ("tier", "type", "capacity_bytes", "eviction_policy", "huge_pages", "kvtier_version")

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def config_info(spec: TieringOffloadingSpec) -> list[dict[str, str]]:
    """Return the values of the labels, for host memory and for each tier. A value that a tier does not have is ""."""
    num_bytes = spec.num_blocks * spec.block_bytes
    primary = _series("primary", "host memory", str(num_bytes), spec.user_config.eviction_policy, _huge_pages())
    return [primary, *(_tier_series(tier) for tier in spec.tiers)]


def _series(*values: str) -> dict[str, str]:
    return dict(zip(LABELS, (*values, __version__), strict=True))


def _tier_series(tier: TierConfig) -> dict[str, str]:
    options = dict(tier.options)
    if (options_type := options_type_of(load_tier_class(tier))) is not None:
        read = options_type.read(tier.options, tier.where)
        options |= {name: getattr(read, name, "") for name in ("capacity", "eviction_policy")}
    capacity, policy = _num_bytes(options.get("capacity")), str(options.get("eviction_policy", ""))
    return _series(tier.name, tier.tier_type, capacity, policy, "")


def _num_bytes(capacity: object) -> str:
    try:
        return str(parse_size("capacity", capacity))
    except ConfigError:  # it has none, or what a tier of the user's own calls so is no size
        return ""


def _huge_pages() -> str:
    """Return the kernel's setting for huge pages of shared memory, in which the arena lies: for example "never"."""
    try:
        chosen = _HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return ""
    return chosen
