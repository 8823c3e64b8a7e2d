"""kvtier's own eviction policies, by the name that the option `eviction_policy` takes."""

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
"""`auto` is an alias of `prefix`. It once chose a policy at run time, and existing configurations still name it."""


def find_policy(name: object, more: Mapping[str, type[EvictionPolicy]]) -> type[EvictionPolicy]:
    """Return the eviction policy `name`, from `more` or built in; `more` wins.

    Raises:
        ConfigError: no policy has this name; the error lists the names that exist.
    """
    policies = {**BUILT_IN_POLICIES, **more}
    if not isinstance(name, str) or name not in policies:
        raise ConfigError("eviction_policy", name, f"one of {', '.join(sorted(policies))}")
    return policies[name]
