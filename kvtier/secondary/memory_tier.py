"""Tier type `memory`: host memory beyond the arena, in a process of its own."""

from __future__ import annotations

from typing import Any

from kvtier.errors import ConfigError
from kvtier.keys import MAX_KEY_BYTES
from kvtier.secondary.keyed import KeyedTierManager
from kvtier.secondary.store_tier import TierSettings
from kvtier.sizes import parse_size
from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.types import Locality, Medium


class MemoryTierManager(KeyedTierManager):
    """Blocks in memory; they end with their process."""

    medium = Medium.CPU
    locality = Locality.LOCAL
    needs_namespace = False

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        *,
        capacity: int | str,
        threads: int = 4,
        job_deadline: float = 10.0,
    ) -> None:
        """Args:
            capacity: most bytes of blocks, their keys and headers, for example "8GiB".
            threads, job_deadline: as for `disk`.

        Raises:
            ConfigError: a value is not allowed; the error names its key.
        """
        size = parse_size("capacity", capacity)
        super().__init__(
            offloading_spec,
            primary_kv_view,
            tier_type,
            store="kvtier.stores.memory:MemoryStore",
            options={"capacity": size},
            settings=TierSettings.checked(threads, job_deadline),
        )
        least = self.block_bytes + HEADER_BYTES + MAX_KEY_BYTES
        if size < least:
            raise ConfigError("capacity", capacity, f"at least {least} bytes, for one block of {self.block_bytes}")
