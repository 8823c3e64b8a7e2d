"""Tier type `disk`: slots in files of one local directory, or of several on different devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from kvtier.abc import SecondaryTierManager
from kvtier.errors import ConfigError
from kvtier.secondary.settings import TierSettings
from kvtier.secondary.slotted import SlottedTierManager
from kvtier.secondary.striped import StripedTierManager, StripeSpec, share_settings
from kvtier.stores.integrity.sealing import PORTION_BYTES
from kvtier.stores.slab.layout import SlabGeometry
from kvtier.stores.slab.options import DirectoryOptions, DiskOptions, check_directories
from kvtier.types import Locality, Medium


class DirectoryTier(SlottedTierManager):
    """A tier over one directory, made from options that were already read."""

    medium = Medium.STORAGE
    locality = Locality.LOCAL

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        *,
        options: DirectoryOptions,
        settings: TierSettings,
    ) -> None:
        """Raises: ConfigError: a value is not allowed; the error names its key."""
        super().__init__(
            offloading_spec,
            primary_kv_view,
            tier_type,
            store="kvtier.stores.slab.store:SlabStore",
            options=options.to_json(),
            eviction_policy=options.eviction_policy,
            settings=settings,
        )
        self._most_slots = SlabGeometry.of(options.capacity, self.block_bytes).num_slots


class DiskTierManager(DirectoryTier):
    """Blocks on a local disk, within an exact capacity. They outlive the engine."""

    persistent: ClassVar[bool] = True
    """Blocks outlive the engine. With LoRA, such a tier needs `allow_lora`."""
    options_type = DiskOptions

    @classmethod
    def class_for(cls, options: Mapping[str, Any]) -> type[SecondaryTierManager]:
        """Return `StripedDiskTierManager` for a list of directories."""
        return cls if isinstance(options.get("path"), str) else StripedDiskTierManager

    def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, **options: Any) -> None:
        """Args: options: `DiskOptions` with one directory.

        Raises:
            ConfigError: a value is not allowed; the error names its key.
        """
        read = DiskOptions.read(options)
        if not isinstance(read.path, str):
            raise ConfigError("path", read.path, "a directory")
        super().__init__(
            offloading_spec,
            primary_kv_view,
            tier_type,
            options=read.in_directory(read.directories[0]),
            settings=_settings_of(read),
        )
        read.check(self.block_bytes, self.context.policies)


class StripedDiskTierManager(StripedTierManager):
    """Blocks striped over directories on different devices. A directory that fails is not used until it works again."""

    medium = Medium.STORAGE
    locality = Locality.LOCAL
    persistent: ClassVar[bool] = True
    options_type = DiskOptions

    def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, **options: Any) -> None:
        """Args: options: `DiskOptions`. Each directory has an equal share of the capacity, and its own `threads`.

        Raises:
            ConfigError: a value is not allowed; the error names its key.
        """
        directories = check_directories(options.get("path"))
        read = DiskOptions.read({**options, "path": directories})
        read.check_secret()
        settings = share_settings(_settings_of(read), len(directories))

        def make_stripe(spec: StripeSpec, name: str, index: int) -> DirectoryTier:
            options = read.in_directory(directories[index], len(directories))
            return DirectoryTier(spec, primary_kv_view, name, options=options, settings=settings)

        super().__init__(offloading_spec, primary_kv_view, tier_type, names=directories, make_stripe=make_stripe)


def _settings_of(options: DiskOptions) -> TierSettings:
    """Return the settings for a directory.

    While one thread sums, the device needs something from the others: eight threads with 2 MiB each were faster than
    four with 4 MiB, and have hardly more on their way, behind which a load must wait.

    Raises:
        ConfigError: a value is out of range.
    """
    return replace(TierSettings.checked(options.threads, options.job_deadline), call_bytes=PORTION_BYTES)
