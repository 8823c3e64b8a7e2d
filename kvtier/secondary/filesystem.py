"""Tier type `filesystem`: one file a block in a directory that any number of hosts share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from kvtier.errors import ConfigError
from kvtier.secondary.keyed import KeyedTierManager
from kvtier.secondary.store_tier import TierSettings
from kvtier.sizes import parse_size
from kvtier.stores.filesystem.janitor import LEAST_GROUP_BLOCKS
from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.integrity.secrets import SecretPlace
from kvtier.stores.mounts import mount_point_of
from kvtier.types import Locality, Medium


class FilesystemTierManager(KeyedTierManager):
    """Blocks on NFS, Lustre, CephFS and the like; the oldest leave when the capacity is reached."""

    medium = Medium.STORAGE
    locality = Locality.REMOTE
    persistent: ClassVar[bool] = True
    """Blocks outlive the engine: with LoRA, only where the user allows it."""
    probe_deadline: ClassVar[float] = 0.5

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        *,
        path: str,
        capacity: int | str,
        min_free: int | str = 0,
        secret_env: str | None = None,
        secret_file: str | None = None,
        encrypt: bool = False,
        threads: int = 8,
        job_deadline: float = 10.0,
    ) -> None:
        """Args:
            path: directory, made if it is missing and its parent exists; the same for all engines.
            capacity: most bytes that the blocks of all engines take together; the same for all engines.
            min_free: bytes of the filesystem that stay free.
            secret_env, secret_file: name of an environment variable, or path of a file, with a secret that vouches for
                blocks: what somebody stored who does not know it is never loaded.
            encrypt: whether blocks are encrypted with the secret, too.
            threads: calls to the filesystem at the same time.
            job_deadline: seconds without progress after which the I/O process is killed.

        Raises:
            ConfigError: a value is not allowed; the error names its key.
        """
        if not isinstance(path, str) or not path or "://" in path:
            raise ConfigError("path", path, "a directory")
        absolute = str(Path(path).absolute())
        size = parse_size("capacity", capacity)
        place = SecretPlace.checked(secret_env, secret_file, encrypt)
        options: dict[str, Any] = {
            "path": absolute,
            "capacity": size,
            "min_free": parse_size("min_free", min_free, minimum=0),
            "mount_point": mount_point_of(absolute),
        }
        if place is not None:
            options |= place.to_options()
        super().__init__(
            offloading_spec,
            primary_kv_view,
            tier_type,
            store="kvtier.stores.filesystem.store:FilesystemStore",
            options=options,
            settings=TierSettings.checked(threads, job_deadline),
        )
        least = LEAST_GROUP_BLOCKS * (self.block_bytes + HEADER_BYTES)
        if size < least:
            raise ConfigError("capacity", capacity, f"at least {least} bytes, {LEAST_GROUP_BLOCKS} blocks")
