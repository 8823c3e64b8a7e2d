"""Which kind of filesystem a folder is on (proc(5), `mountinfo`)."""

from __future__ import annotations

import os
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
TELLS_UNWRITTEN = frozenset({"ext4", "xfs"})
"""Filesystems that write in place and mark extents that were allocated and never written."""


def filesystem_type(folder: Path) -> str:
    """Return the type of the filesystem that `folder` is on, "" if it cannot be told."""
    try:
        device = folder.stat().st_dev
        lines = MOUNTS.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        mount, _, source = line.partition(" - ")
        if mount.split()[2:3] == [number] and source:
            return source.split()[0]
    return ""
