"""Tier type `disk`: slots in preallocated files of a local directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from kvtier.errors import ConfigError
from kvtier.secondary.slotted import SlottedTierManager
from kvtier.secondary.store_tier import TierSettings
from kvtier.sizes import parse_size
from kvtier.stores.slab.geometry import SlabGeometry
from kvtier.types import Locality, Medium


class DiskTierManager(SlottedTierManager):
    """Blocks on a local disk; they outlive the engine, within one exact capacity."""

    medium = Medium.STORAGE
    locality = Locality.LOCAL
    persistent: ClassVar[bool] = True
    """Blocks outlive the engine: with LoRA, only where the user allows it."""

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        *,
        path: str,
        capacity: int | str,
        eviction_policy: str = "lru",
        threads: int = 4,
        job_deadline: float = 10.0,
        min_free: int | str = 0,
    ) -> None:
        """Args:
            path: directory, made if it is missing; alone for this tier.
            capacity: most bytes on the disk, for example "100GiB".
            eviction_policy: name of a policy.
            threads: calls to the disk at the same time.
            job_deadline: seconds without progress after which the I/O process is killed.
            min_free: bytes of the filesystem that stay free.

        Raises:
            ConfigError: a value is not allowed; the error names its key.
        """
        if not isinstance(path, str) or not path:
            raise ConfigError("path", path, "a directory")
        size = parse_size("capacity", capacity)
        options = {
            "path": str(Path(path).absolute()),
            "capacity": size,
            "min_free": parse_size("min_free", min_free, minimum=0),
        }
        super().__init__(
            offloading_spec,
            primary_kv_view,
            tier_type,
            store="kvtier.stores.slab.store:SlabStore",
            options=options,
            eviction_policy=eviction_policy,
            settings=TierSettings.checked(threads, job_deadline),
        )
        SlabGeometry.of(size, self.block_bytes)
