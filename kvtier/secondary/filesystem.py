"""Tier type `filesystem`: one file per block in a directory that any number of hosts share."""

from __future__ import annotations

from typing import Any, ClassVar

from kvtier.secondary.keyed import KeyedTierManager
from kvtier.secondary.settings import TierSettings
from kvtier.stores.filesystem.options import FilesystemOptions
from kvtier.types import Locality, Medium


class FilesystemTierManager(KeyedTierManager):
    """Blocks on NFS, Lustre, CephFS and the like. The oldest are deleted when the capacity is reached."""

    medium = Medium.STORAGE
    locality = Locality.REMOTE
    persistent: ClassVar[bool] = True
    """Blocks outlive the engine. With LoRA, such a tier needs `allow_lora`."""
    probe_deadline: ClassVar[float] = 0.5
    options_type = FilesystemOptions

    def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, **options: Any) -> None:
        """Args: options: `FilesystemOptions`.

        Raises:
            ConfigError: a value is not allowed; the error names its key.
        """
        read = FilesystemOptions.read(options)
        super().__init__(
            offloading_spec,
            primary_kv_view,
            tier_type,
            store="kvtier.stores.filesystem.store:FilesystemStore",
            options=read.for_store().to_json(),
            settings=TierSettings.checked(read.threads, read.job_deadline),
        )
        read.check(self.block_bytes, self.context.policies)
