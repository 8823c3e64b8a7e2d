"""Tier type `memory`: more host memory besides the arena, in the tier's I/O process."""

from __future__ import annotations

from typing import Any

from kvtier.secondary.keyed import KeyedTierManager
from kvtier.secondary.settings import TierSettings
from kvtier.stores.memory import MemoryOptions
from kvtier.types import Locality, Medium


class MemoryTierManager(KeyedTierManager):
    """Blocks in memory. They are lost when the I/O process ends."""

    medium = Medium.CPU
    locality = Locality.LOCAL
    needs_namespace = False
    options_type = MemoryOptions

    def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, **options: Any) -> None:
        """Args: options: `MemoryOptions`.

        Raises:
            ConfigError: a value is not allowed; the error names its key.
        """
        read = MemoryOptions.read(options)
        super().__init__(
            offloading_spec,
            primary_kv_view,
            tier_type,
            store="kvtier.stores.memory:MemoryStore",
            options=read.to_json(),
            settings=TierSettings.checked(read.threads, read.job_deadline),
        )
        read.check(self.block_bytes, self.context.policies)
