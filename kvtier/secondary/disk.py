"""Tier type `disk`: slots in files of a local directory, or of several, each on a device of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from kvtier.abc import SecondaryTierManager
from kvtier.errors import ConfigError
from kvtier.secondary.slotted import SlottedTierManager
from kvtier.secondary.store_tier import TierSettings
from kvtier.secondary.striped import StripedTierManager, StripeSpec, share_settings
from kvtier.sizes import parse_size
from kvtier.stores.integrity.secrets import SecretPlace
from kvtier.stores.mounts import mount_point_of
from kvtier.stores.slab.layout import SlabGeometry
from kvtier.types import Locality, Medium


class DirectoryTier(SlottedTierManager):
    """Blocks in one directory; its options have been read."""

    medium = Medium.STORAGE
    locality = Locality.LOCAL

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        *,
        path: str,
        capacity: int,
        min_free: int,
        eviction_policy: str,
        settings: TierSettings,
        place: SecretPlace | None = None,
    ) -> None:
        """Args: as `DiskTierManager`; path: absolute; capacity, min_free: bytes; place: of a secret.

        Raises:
            ConfigError: a value is not allowed; the error names its key.
        """
        options: dict[str, Any] = {
            "path": path,
            "capacity": capacity,
            "min_free": min_free,
            "mount_point": mount_point_of(path),
        }
        if place is not None:
            options |= place.to_options()
        super().__init__(
            offloading_spec,
            primary_kv_view,
            tier_type,
            store="kvtier.stores.slab.store:SlabStore",
            options=options,
            eviction_policy=eviction_policy,
            settings=settings,
        )
        self._most_slots = SlabGeometry.of(capacity, self.block_bytes).num_slots


class DiskTierManager(DirectoryTier):
    """Blocks on a local disk; they outlive the engine, within one exact capacity."""

    persistent: ClassVar[bool] = True
    """Blocks outlive the engine: with LoRA, only where the user allows it."""

    @classmethod
    def class_for(cls, options: Mapping[str, Any]) -> type[SecondaryTierManager]:
        """Return `StripedDiskTierManager` for a list of directories."""
        return cls if isinstance(options.get("path"), str) else StripedDiskTierManager

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
        secret_env: str | None = None,
        secret_file: str | None = None,
        encrypt: bool = False,
    ) -> None:
        """Args:
            path: directory, made if it is missing and its parent exists; alone for this tier.
            capacity: most bytes on the disk, for example "100GiB".
            eviction_policy: name of a policy.
            threads: calls to the disk at the same time.
            job_deadline: seconds without progress after which the I/O process is killed.
            min_free: bytes of the filesystem that stay free.
            secret_env, secret_file: name of an environment variable, or path of a file, with a secret that vouches for
                blocks: what somebody stored who does not know it is never loaded.
            encrypt: whether blocks are encrypted with the secret, too.

        Raises:
            ConfigError: a value is not allowed; the error names its key.
        """
        if not _is_path(path):
            raise ConfigError("path", path, "a directory")
        super().__init__(
            offloading_spec,
            primary_kv_view,
            tier_type,
            path=str(Path(path).absolute()),
            capacity=parse_size("capacity", capacity),
            min_free=parse_size("min_free", min_free, minimum=0),
            eviction_policy=eviction_policy,
            settings=TierSettings.checked(threads, job_deadline),
            place=SecretPlace.checked(secret_env, secret_file, encrypt),
        )


class StripedDiskTierManager(StripedTierManager):
    """Blocks striped over several directories, each on a device of its own; one that fails is done without."""

    medium = Medium.STORAGE
    locality = Locality.LOCAL
    persistent: ClassVar[bool] = True

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        *,
        path: str | list[str],
        capacity: int | str,
        eviction_policy: str = "lru",
        threads: int = 4,
        job_deadline: float = 10.0,
        min_free: int | str = 0,
        secret_env: str | None = None,
        secret_file: str | None = None,
        encrypt: bool = False,
    ) -> None:
        """Args:
            path: directories, as for `DiskTierManager`, none within or the same as another.
            capacity: most bytes on all disks together; each directory has an equal share.
            threads: calls to each disk at the same time.
            min_free: bytes that stay free on each filesystem.
            eviction_policy, job_deadline: as for `DiskTierManager`, in each directory.
            secret_env, secret_file, encrypt: as for `DiskTierManager`, the same for all.

        Raises:
            ConfigError: a value is not allowed; the error names its key.
        """
        directories = check_directories(path)
        size = parse_size("capacity", capacity)
        free = parse_size("min_free", min_free, minimum=0)
        place = SecretPlace.checked(secret_env, secret_file, encrypt)
        settings = share_settings(TierSettings.checked(threads, job_deadline), len(directories))

        def make_stripe(spec: StripeSpec, name: str, index: int) -> DirectoryTier:
            return DirectoryTier(
                spec,
                primary_kv_view,
                name,
                path=directories[index],
                capacity=size // len(directories),
                min_free=free,
                eviction_policy=eviction_policy,
                settings=settings,
                place=place,
            )

        super().__init__(offloading_spec, primary_kv_view, tier_type, names=directories, make_stripe=make_stripe)


def check_directories(path: object) -> list[str]:
    """Return directories as absolute paths.

    Raises:
        ConfigError: not a list of directories, or two of them are one, or one lies within another.
    """
    listed = [path] if isinstance(path, str) else path
    if not isinstance(listed, Sequence) or not listed or not all(map(_is_path, listed)):
        raise ConfigError("path", path, "a directory, or a list of directories on devices of their own")
    for index, one in enumerate(listed):
        for other in listed[:index]:
            if are_entangled(one, other):
                raise ConfigError("path", path, f"{one!r} and {other!r} must be apart, neither in nor around the other")
    return [str(Path(one).absolute()) for one in listed]


def _is_path(value: object) -> bool:
    return isinstance(value, str) and bool(value) and "://" not in value


def are_entangled(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Return whether two directories are the same, under whatever names, or one lies within the other."""
    real_one, real_other = os.path.realpath(one), os.path.realpath(other)
    if os.path.commonpath([real_one, real_other]) in (real_one, real_other):
        return True
    try:
        return os.path.samefile(real_one, real_other)
    except OSError:
        return False  # one does not exist yet
