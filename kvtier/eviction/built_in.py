"""The eviction policies that kvtier brings, by the names that options use."""

from __future__ import annotations

from collections.abc import Mapping

from kvtier.abc import EvictionPolicy
from kvtier.errors import ConfigError
from kvtier.eviction.arc import ARCPolicy
from kvtier.eviction.lru import LRUPolicy
from kvtier.eviction.prefix import PrefixPolicy
from kvtier.eviction.s3fifo import S3FIFOPolicy
from kvtier.eviction.tinylfu import TinyLFUPolicy

BUILT_IN_POLICIES: Mapping[str, type[EvictionPolicy]] = {
    "lru": LRUPolicy,
    "arc": ARCPolicy,
    "s3fifo": S3FIFOPolicy,
    "tinylfu": TinyLFUPolicy,
    "prefix": PrefixPolicy,
    "auto": PrefixPolicy,
}
"""`auto` once chose among the others while the cache was in use; configurations still have it."""


def find_policy(name: object, more: Mapping[str, type[EvictionPolicy]]) -> type[EvictionPolicy]:
    """Return the eviction policy called `name`, built in or among `more`.

    Raises:
        ConfigError: there is none; the error lists those that exist.
    """
    policies = {**BUILT_IN_POLICIES, **more}
    if not isinstance(name, str) or name not in policies:
        raise ConfigError("eviction_policy", name, f"one of {', '.join(sorted(policies))}")
    return policies[name]
