"""Checks that the filesystem of a tier's directory is mounted.

A mount point without its filesystem is an ordinary folder. A slab created in it would fill the disk below, and
disappear when the filesystem is mounted over it. So the mount point is read from the kernel's table (`mountinfo`, see
proc(5)) when the engine starts, and compared later. Device numbers would not do: containers and systemd mount
directories of the same filesystem, which have the same device number.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kvtier.errors import StoreUnavailableError, describe
from kvtier.sizes import format_size
from kvtier.stores.own_files import FOLDER_MODE

FSTAB = Path("/etc/fstab")
MOUNTS = Path("/proc/self/mountinfo")
TELLS_UNWRITTEN = frozenset({"ext4", "xfs"})
"""Filesystems that write in place, and that mark extents as unwritten when they are only allocated."""
_LOCAL = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "tmpfs", "ramfs", "overlay", "devtmpfs", "proc")
)
"""Filesystems without a server: a call on them does not hang because of a network."""
_MAX_LINKS = 40
_OCTAL = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """One line of the kernel's table.

    Attributes:
        number, parent: ids of this mount and of the mount that contains its mount point.
        device: major and minor number, as "8:1".
        place: the mount point.
        kind: type of the filesystem.
    """

    number: str
    parent: str
    device: str
    place: str
    kind: str


class MountTable:
    """The kernel's table of mounts at one moment; empty if it cannot be read."""

    def __init__(self, table: Path = MOUNTS) -> None:
        """Args: table: the file to read it from, as proc(5) describes `mountinfo`."""
        self.mounts = list(_parsed(table))
        numbers = {mount.number for mount in self.mounts}
        self._on = {
            (mount.parent if mount.parent in numbers and mount.parent != mount.number else "", mount.place): mount
            for mount in self.mounts
        }

    def at(self, place: str) -> Mount | None:
        """Return the mount that a path without links is on.

        Mounts may be stacked on one place: the topmost one counts, and so do mounts over the folders above.
        """
        found = None
        for prefix in [*reversed(Path(place).parents), Path(place)]:
            while (over := self._on.get((found.number if found else "", str(prefix)))) is not None:
                found = over
        return found

    def kind_at(self, place: str) -> str | None:
        """Return the type of the filesystem whose mount point is exactly `place`; None if there is none."""
        found = self.at(place)
        return found.kind if found is not None and found.place == place else None


def mount_point_of(path: str, mounts: Path = MOUNTS) -> str:
    """Return the mount point of the filesystem that `path` is on or would be created on; "/" if unknown.

    The engine's thread calls it at the start. So it does no call on a filesystem that may hang, such as NFS.

    Args:
        mounts: the kernel's table.
    """
    table = MountTable(mounts)
    place, rest, links = "/", deque(Path(path).absolute().parts[1:]), 0
    while rest:
        name = rest.popleft()
        if name == "..":
            place = os.path.dirname(place)
            continue
        place = os.path.join(place, name)
        kind = table.kind_at(place)
        if kind is not None:
            if kind not in _LOCAL:
                break
            continue
        target = _target(place)
        if target is not None:
            links += 1
            if links > _MAX_LINKS:
                break
            place = os.path.dirname(place)
            rest.extendleft(reversed(target))
            if target[:1] == ("/",):
                place = rest.popleft()
    found = table.at(place)
    return "/" if found is None else found.place


def check_mounted(path: Path, mount_point: str = "/", *, mounts: Path = MOUNTS, fstab: Path = FSTAB) -> None:
    """Raise StoreUnavailableError if the filesystem for `path` is not mounted.

    Args:
        mount_point: where a filesystem was mounted when the engine started; "/" is always there.
        mounts, fstab: the tables of what is mounted and of what should be.
    """
    table = MountTable(mounts)
    if not table.mounts:
        return  # the table cannot be read: nothing to compare
    real = Path(os.path.realpath(path))
    for place, why in [(mount_point, "was mounted when the engine started"), *_expected_above(real, fstab)]:
        try:
            os.lstat(place)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StoreUnavailableError(f"{path}: {place}: {error.strerror}") from error
        if place != "/" and table.kind_at(place) is None:
            raise StoreUnavailableError(f"{place} is not mounted now, and {why}: {path} belongs there")


def check_size(path: Path, descriptor: int, capacity: int, min_free: int) -> None:
    """Check that the whole filesystem of an open directory is large enough for the tier.

    Space that others use now is ignored here, since it may become free. A store fails while there is too little.

    Args:
        path: of the directory, for messages.
        capacity, min_free: bytes for the tier, and bytes that must stay free.

    Raises:
        StoreUnavailableError: the filesystem is smaller, or its size cannot be read.
    """
    try:
        status = os.statvfs(descriptor)
    except OSError as error:
        raise StoreUnavailableError(f"{path}: {describe(error)}") from error
    size = status.f_blocks * status.f_frsize
    if 0 < size < capacity + min_free:
        wanted = format_size(capacity) + (f" and {format_size(min_free)} to stay free" if min_free else "")
        raise StoreUnavailableError(f"{path}: its filesystem has {format_size(size)}, too small for {wanted}")


def filesystem_type(descriptor: int) -> str:
    """Return the type of the filesystem that an open directory is on; "" if unknown."""
    device = os.fstat(descriptor).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    return next((mount.kind for mount in _parsed(MOUNTS) if mount.device == number), "")


def _target(place: str) -> tuple[str, ...] | None:
    """Return the parts of a symbolic link's target; None if `place` is no link."""
    try:
        return Path(os.readlink(place)).parts
    except OSError:
        return None


def _expected_above(path: Path, fstab: Path) -> list[tuple[str, str]]:
    """Return the mount points of `fstab` that contain `path`, each with a reason for messages."""
    fields = [line.split() for line in _lines_of(fstab) if not line.lstrip().startswith("#")]
    places = [_plain(field[1]) for field in fields if len(field) > 2]
    above = {str(path), *map(str, path.parents)}
    return [(place, f"is in {fstab}") for place in map(os.path.normpath, places) if place in above]


def _parsed(table: Path) -> Iterator[Mount]:
    """Yield the entries of the kernel's table."""
    for line in _lines_of(table):
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) > 4 and after:
            yield Mount(fields[0], fields[1], fields[2], _plain(fields[4]), after.split(" ")[0])


def _lines_of(table: Path) -> list[str]:
    """Return the lines of a table of mounts. Only blanks and line ends are escaped in its paths, not other bytes."""
    try:
        return os.fsdecode(table.read_bytes()).split("\n")
    except OSError:
        return []


def _plain(field: str) -> str:
    """Return a field with its octal escapes decoded: the kernel writes a blank as backslash 040."""
    return _OCTAL.sub(lambda code: chr(int(code[1], 8)), field)


def make_last_directory(path: Path) -> None:
    """Create the directory if it is missing and its parent exists.

    Raises:
        StoreUnavailableError: the parent is missing, or `path` is something else.
        OSError: the directory cannot be created.
    """
    try:
        path.mkdir(mode=FOLDER_MODE, exist_ok=True)
    except FileNotFoundError as error:
        if path.parent.exists():  # some filesystems, such as /proc, refuse mkdir with this error
            raise
        raise StoreUnavailableError(
            f"{path}: {path.parent} does not exist; kvtier creates only the last directory of a path, so that it never"
            " fills the disk below a filesystem that is not mounted"
        ) from error
    except FileExistsError as error:
        raise StoreUnavailableError(f"{path}: is not a directory") from error
