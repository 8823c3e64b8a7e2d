"""Options of tier type `filesystem`, and of its store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from kvtier.errors import ConfigError
from kvtier.options import Threads, size_of
from kvtier.stores.compression.options import CompressedOptions
from kvtier.stores.filesystem.janitor import MIN_GROUP_BLOCKS
from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.mounts import mount_point_of


class FilesystemOptions(CompressedOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of tier type `filesystem`."""

    path: Annotated[
        str,
        msgspec.Meta(
            description="directory, the same for all engines. It must be empty or already kvtier's. It is created if it"
            " is missing, but its parent is not, so that an absent mount does not fill the disk below"
        ),
    ]
    capacity: Annotated[
        int,
        size_of(
            "most bytes that the files and folders of all engines take together. Set the same for all engines, since"
            " the smallest value wins. At least 64 blocks"
        ),
    ]
    min_free: Annotated[
        int,
        size_of(
            "bytes of the filesystem that must stay free. With less free, nothing is stored and old blocks are deleted",
            minimum=0,
        ),
    ] = 0
    threads: Threads = 8

    def for_store(self) -> SharedDirectoryOptions:
        """Return the options for the store, with the mount point of the directory as it is now.

        Raises:
            ConfigError: `path` is empty or a URL.
        """
        if not self.path or "://" in self.path:
            raise ConfigError("path", self.path, "a directory")
        path = str(Path(self.path).absolute())
        values = {**msgspec.structs.asdict(self), "path": path}
        return SharedDirectoryOptions(**values, mount_point=mount_point_of(path))

    def check(self, block_bytes: int, policies: Mapping[str, type[Any]]) -> None:
        """Refuse options that contradict each other, the block size, or the environment."""
        self.for_store()
        least = MIN_GROUP_BLOCKS * (block_bytes + HEADER_BYTES)
        if self.capacity < least:
            raise ConfigError("capacity", self.capacity, f"at least {least} bytes, {MIN_GROUP_BLOCKS} blocks")
        super().check(block_bytes, policies)


class SharedDirectoryOptions(FilesystemOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The options of `FilesystemStore`: those of its tier, and `mount_point`.

    Attributes:
        mount_point: a filesystem must be mounted here, see `check_mounted`.
    """

    mount_point: str = "/"
