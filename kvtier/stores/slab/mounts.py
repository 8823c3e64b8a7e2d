"""Whether the filesystem that a directory belongs on is there: an unmounted mount point looks like an empty directory.

A slab made there would fill the disk below, and hide from everybody when the right filesystem is mounted over it.
"""

from __future__ import annotations

import os
import re
from collections import deque
from pathlib import Path

from kvtier.errors import StoreUnavailableError

FSTAB = Path("/etc/fstab")
MOUNTS = Path("/proc/self/mountinfo")
_LOCAL = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "tmpfs", "ramfs", "overlay", "devtmpfs", "proc")
)
"""Filesystems that answer at once, or not at all."""
_MOST_LINKS = 40
_OCTAL = re.compile(r"\\([0-7]{3})")


def mount_point_of(path: str) -> str:
    """Return the mount point of the filesystem that `path` is on, or would be made on; "/" if it cannot be told.

    Called by the engine's thread as it starts: what is on a filesystem that may hang, such as NFS, is not looked at.
    """
    kinds = _mounted()
    place, rest, links = "/", deque(Path(path).absolute().parts[1:]), 0
    while rest:
        name = rest.popleft()
        if name == "..":
            place = os.path.dirname(place)
            continue
        place = os.path.join(place, name)
        if place in kinds:
            if kinds[place] not in _LOCAL:
                break
            continue
        target = _target(place)
        if target is not None:
            links += 1
            if links > _MOST_LINKS:
                break
            place = os.path.dirname(place)
            rest.extendleft(reversed(target))
            if target[:1] == ("/",):
                place = rest.popleft()
    while place not in kinds and place != "/":
        place = os.path.dirname(place)
    return place


def _target(place: str) -> tuple[str, ...] | None:
    """Return the parts of what a symbolic link stands for; None for anything else."""
    try:
        return Path(os.readlink(place)).parts
    except OSError:
        return None


def _mounted() -> dict[str, str]:
    """Return the kind of filesystem that is mounted at each mount point; none if the system does not say."""
    try:
        lines = MOUNTS.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    kinds = {}
    for line in lines:
        fields, _, after = line.partition(" - ")
        kinds[_plain(fields.split()[4])] = after.split()[0]  # the last one of a place is on top
    return kinds


def _plain(field: str) -> str:
    """Return a path as it is, from a table of the system's that writes blanks as octal numbers."""
    return _OCTAL.sub(lambda code: chr(int(code[1], 8)), field)


def check_mounted(path: Path, mount_point: str = "/") -> None:
    """Raise StoreUnavailableError if the filesystem for `path` is not mounted.

    Args:
        mount_point: where a filesystem was mounted when the engine started.
    """
    real = Path(os.path.realpath(path))
    for place, why in [(mount_point, "was mounted when the engine started"), *_expected_above(real)]:
        try:
            os.lstat(place)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StoreUnavailableError(f"{path}: {place}: {error.strerror}") from error
        if not os.path.ismount(place):
            raise StoreUnavailableError(f"{path}: its filesystem is not there: {place} {why}, and is not mounted now")


def _expected_above(path: Path) -> list[tuple[str, str]]:
    """Return the mount points in the system's table that `path` is in or below."""
    try:
        lines = FSTAB.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    fields = [line.split() for line in lines if not line.lstrip().startswith("#")]
    places = [_plain(field[1]) for field in fields if len(field) > 2]
    above = {str(path), *map(str, path.parents)}
    return [(place, f"is in {FSTAB}") for place in map(os.path.normpath, places) if place in above]
