"""Whether the filesystem that a directory belongs on is there: an unmounted mount point looks like an empty directory.

A slab made there would fill the disk below, and hide from everybody when the right filesystem is mounted over it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from kvtier.errors import StoreUnavailableError

FSTAB = Path("/etc/fstab")
_OCTAL = re.compile(r"\\([0-7]{3})")


def mount_point_of(path: str) -> str:
    """Return the mount point of the filesystem that `path` is on, or would be made on; "/" if it cannot be told."""
    try:
        place = Path(os.path.realpath(path))
        while not os.path.ismount(place) and place != place.parent:
            place = place.parent
    except OSError:
        return "/"
    return str(place)


def check_mounted(path: Path, mount_point: str = "/") -> None:
    """Raise StoreUnavailableError if the filesystem for `path` is not mounted.

    Args:
        mount_point: where a filesystem was mounted when the engine started.
    """
    real = Path(os.path.realpath(path))
    for place, why in [(mount_point, "was mounted when the engine started"), *_expected_above(real)]:
        if not os.path.ismount(place):
            raise StoreUnavailableError(f"{path}: its filesystem is not there: {place} {why}, and is not mounted now")


def _expected_above(path: Path) -> list[tuple[str, str]]:
    """Return the mount points in the system's table that `path` is in or below."""
    try:
        lines = FSTAB.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    fields = [line.split() for line in lines if not line.lstrip().startswith("#")]
    places = [_OCTAL.sub(lambda code: chr(int(code[1], 8)), field[1]) for field in fields if len(field) > 2]
    above = {str(path), *map(str, path.parents)}
    return [(place, f"is in {FSTAB}") for place in map(os.path.normpath, places) if place in above]
