"""Gives back what a namespace that is not in use holds without need: space behind its last block."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from kvtier.stores.seal import HEADER_BYTES, HEADER_DTYPE
from kvtier.stores.slab.geometry import slots_of_segment

_RECORDS_PER_READ = 1 << 16
_DATA_FILE = re.compile(r"data-(\d+)")


def cut_spare(folder: Path) -> None:
    """Shorten the data files of a namespace to its last record, whatever that says; nobody else may use it.

    Slabs take space ahead of their blocks. Without this, one with a handful of blocks would have to be deleted whole
    as soon as another namespace needs the space.

    Raises:
        OSError: the folder cannot be read or written.
    """
    slot, block_bytes = _last_record(folder / "headers")
    segment, length = 0, 0
    if block_bytes:
        segment, index = divmod(slot, max(1, slots_of_segment(block_bytes)))
        length = (index + 1) * block_bytes
    for path in folder.iterdir():
        match = _DATA_FILE.fullmatch(path.name)
        if match is None or path.is_symlink() or int(match[1]) < segment:
            continue
        needed = length if int(match[1]) == segment else 0
        status = path.stat()
        if status.st_size > needed:
            os.truncate(path, needed)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # this was no use of the namespace


def _last_record(headers: Path) -> tuple[int, int]:
    """Return slot and payload length of the last record that is not empty; zeros if there is none."""
    with headers.open("rb") as file:
        end = os.fstat(file.fileno()).st_size // HEADER_BYTES
        while end:
            start = max(0, end - _RECORDS_PER_READ)
            raw = os.pread(file.fileno(), (end - start) * HEADER_BYTES, start * HEADER_BYTES)
            rows = np.frombuffer(raw, dtype=np.uint8, count=len(raw) // HEADER_BYTES * HEADER_BYTES)
            used = np.flatnonzero(rows.reshape(-1, HEADER_BYTES).any(axis=1))
            if used.size:
                record = np.frombuffer(raw, HEADER_DTYPE, count=1, offset=int(used[-1]) * HEADER_BYTES)[0]
                return start + int(used[-1]), int(record["payload_length"])
            end = start
    return 0, 0
