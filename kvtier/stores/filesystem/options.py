"""Options of tier type `filesystem`, and of its store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from kvtier.errors import ConfigError
from kvtier.options import Threads, size_of
from kvtier.stores.filesystem.janitor import MIN_GROUP_BLOCKS
from kvtier.stores.integrity.header import HEADER_BYTES
from kvtier.stores.integrity.secrets import GuardedOptions
from kvtier.stores.mounts import mount_point_of


class FilesystemOptions(GuardedOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of tier type `filesystem`."""

    path: Annotated[
        str,
        msgspec.Meta(
            description="directory, the same for all engines; empty, or kvtier's already. Made if it is missing, but"
            " not its parent: a mount that is not there must not fill the disk below"
        ),
    ]
    capacity: Annotated[
        int,
        size_of(
            "most bytes that the files and folders of all engines take together; the same for all engines, since the"
            " smallest wins. At least 64 blocks"
        ),
    ]
    min_free: Annotated[
        int,
        size_of("bytes of the filesystem that stay free: below that nothing is stored, and blocks give way", minimum=0),
    ] = 0
    threads: Threads = 8

    def for_store(self) -> SharedDirectoryOptions:
        """Return what the store is opened with; what is mounted at the directory is noted now.

        Raises:
            ConfigError: `path` is no directory's.
        """
        if not self.path or "://" in self.path:
            raise ConfigError("path", self.path, "a directory")
        path = str(Path(self.path).absolute())
        values = {**msgspec.structs.asdict(self), "path": path}
        return SharedDirectoryOptions(**values, mount_point=mount_point_of(path))

    def check(self, block_bytes: int, policies: Mapping[str, type[Any]]) -> None:
        """Refuse options that contradict each other, the size of a block, or what the environment shows."""
        self.for_store()
        least = MIN_GROUP_BLOCKS * (block_bytes + HEADER_BYTES)
        if self.capacity < least:
            raise ConfigError("capacity", self.capacity, f"at least {least} bytes, {MIN_GROUP_BLOCKS} blocks")
        super().check(block_bytes, policies)


class SharedDirectoryOptions(FilesystemOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `FilesystemStore` is opened with: the options of its tier.

    Attributes:
        mount_point: what must be mounted for `path` to be the right directory.
    """

    mount_point: str = "/"
