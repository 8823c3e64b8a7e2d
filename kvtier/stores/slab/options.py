"""Options of tier type `disk`, and of the store of one of its directories."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from kvtier.errors import ConfigError
from kvtier.eviction.built_in import find_policy
from kvtier.options import Threads, size_of
from kvtier.stores.integrity.secrets import GuardedOptions
from kvtier.stores.mounts import mount_point_of
from kvtier.stores.slab.layout import SlabGeometry


class DiskOptions(GuardedOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of tier type `disk`."""

    path: Annotated[
        str | list[str],
        msgspec.Meta(
            description="directory for this tier alone. It is created if it is missing and its parent exists. Or a list"
            " of directories on different devices: blocks are striped over them, and a directory that fails is not used"
            " until it works again"
        ),
    ]
    capacity: Annotated[int, size_of("most bytes of everything in the directory. Several directories get equal shares")]
    eviction_policy: Annotated[
        str,
        msgspec.Meta(description="which blocks are evicted first: `lru`, `arc` or any registered policy"),
    ] = "lru"
    min_free: Annotated[
        int, size_of("bytes of each filesystem that must stay free. With less free, nothing is stored", minimum=0)
    ] = 0
    threads: Threads = 8

    @property
    def directories(self) -> list[str]:
        """The directories, as absolute paths.

        Raises:
            ConfigError: as `check_directories`.
        """
        return check_directories(self.path)

    def in_directory(self, path: str, num_directories: int = 1) -> DirectoryOptions:
        """Return the options for the store of one directory, with the mount point of the directory as it is now."""
        values = {**msgspec.structs.asdict(self), "path": path, "capacity": self.capacity // num_directories}
        return DirectoryOptions(**values, mount_point=mount_point_of(path))

    def check(self, block_bytes: int, policies: Mapping[str, type[Any]]) -> None:
        """Refuse options that contradict each other, the block size, or the environment."""
        SlabGeometry.of(self.capacity // len(self.directories), block_bytes)
        find_policy(self.eviction_policy, policies)
        super().check(block_bytes, policies)


class DirectoryOptions(DiskOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The options of `SlabStore`: those of its tier for one directory, and `mount_point`.

    Attributes:
        mount_point: a filesystem must be mounted here, see `check_mounted`.
    """

    path: str
    mount_point: str = "/"


def check_directories(path: object) -> list[str]:
    """Return directories as absolute paths.

    Raises:
        ConfigError: `path` is not a list of directories, or two of them are the same or one within the other.
    """
    listed = [path] if isinstance(path, str) else path
    if not isinstance(listed, Sequence) or not listed or not all(map(_is_path, listed)):
        raise ConfigError("path", path, "a directory, or a list of directories on different devices")
    for index, one in enumerate(listed):
        for other in listed[:index]:
            if are_entangled(one, other):
                raise ConfigError("path", path, f"separate directories: {one!r} and {other!r} contain each other")
    return [str(Path(one).absolute()) for one in listed]


def _is_path(value: object) -> bool:
    return isinstance(value, str) and bool(value) and "://" not in value


def are_entangled(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Return whether two paths lead to the same directory, or one directory is within the other."""
    real_one, real_other = os.path.realpath(one), os.path.realpath(other)
    if os.path.commonpath([real_one, real_other]) in (real_one, real_other):
        return True
    try:
        return os.path.samefile(real_one, real_other)
    except OSError:
        return False  # one does not exist yet
