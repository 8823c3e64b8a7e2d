"""Tier type `resp`: Valkey or Redis, one server or a cluster, shared by any number of engines."""

from __future__ import annotations

from typing import Any, ClassVar

from kvtier.secondary.keyed import KeyedTierManager
from kvtier.secondary.settings import TierSettings
from kvtier.stores.resp.options import RespOptions
from kvtier.types import Locality, Medium


class RespTierManager(KeyedTierManager):
    """Blocks in a server that any number of engines share. The server decides how many and which blocks it keeps."""

    medium = Medium.CPU
    locality = Locality.REMOTE
    persistent: ClassVar[bool] = True
    """Blocks outlive the engine. With LoRA, such a tier needs `allow_lora`."""
    probe_deadline: ClassVar[float] = 0.5
    options_type = RespOptions

    def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, **options: Any) -> None:
        """Args: options: `RespOptions`.

        Raises:
            ConfigError: a value is not allowed; the error names its key.
        """
        read = RespOptions.read(options)
        super().__init__(
            offloading_spec,
            primary_kv_view,
            tier_type,
            store="kvtier.stores.resp.store:RespStore",
            options=read.to_json(),
            settings=TierSettings.checked(read.threads, read.job_deadline),
        )
        read.check(self.block_bytes, self.context.policies)
